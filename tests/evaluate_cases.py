"""A small evaluation of the tiny selector, which the tests of evaluating start from."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flows import (
    LENGTH,
    PROMPT,
    SIZES,
    calibrated,
    tiny_flow,
)
from shared import SHARED

from lynx_learn.decode.simulate import Comparison, compare
from lynx_learn.measure.evaluate import FEWEST_GROUPS, EvaluateOptions, evaluate
from lynx_learn.moe.decision import Policy
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.loading import load_model
from lynx_learn.traces.groups import Batches, decode_groups

TOP_K, SEED = 2, 2
SCORED = LENGTH - PROMPT - 1
LEVELS = [0.03, 0.1]
METHODS_HERE = ["learned", "xshare", "random", "gate_sq"]
CELLS: list[tuple[int, Batches]] = [(2, "mixed"), (4, "mixed"), (4, "single")]


def choices(out: Path, **changes: Any) -> EvaluateOptions:
    options = EvaluateOptions(
        str(calibrated()),
        str(out),
        corpus=str(tiny_flow().texts),
        methods=METHODS_HERE,
        batch_sizes=SIZES,
        batches=["single:4", "mixed"],
        tokens=1,
        levels=LEVELS,
        length=LENGTH,
        prompt=PROMPT,
        mode="teacher",
    )
    return replace(options, **changes)


def little(out: Path, **changes: Any) -> EvaluateOptions:
    """Options for a run that is about something else."""
    return choices(out, **{"methods": ["xshare"], "batch_sizes": [2], "batches": ["mixed"], **changes})


@cache
def tiny_run() -> tuple[dict[str, Any], Path]:
    """A report on CELLS, and its folder; nobody may write to it."""
    out = SHARED.folder("evaluated", lambda folder: evaluate(choices(folder)))
    return json.loads((out / "report.json").read_text()), out


def tiny_report() -> dict[str, Any]:
    return tiny_run()[0]


def points(report: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [p for p in report["points"] if all(p[key] == value for key, value in wanted.items())]


def groups_of(
    size: int, batches: Batches = "mixed", count: int = FEWEST_GROUPS
) -> list[tuple[torch.Tensor, list[str]]]:
    tokenizer = load_model(str(tiny_flow().model), "cpu").tokenizer
    return decode_groups(str(tiny_flow().texts), tokenizer, "test", size, LENGTH, count, SEED, batches=batches)


def comparison(size: int, batches: Batches, policy: Policy) -> Comparison:
    loaded = load_model(str(tiny_flow().model), "cpu")
    (result,) = compare(loaded.model, find_moe_layers(loaded.model), groups_of(size, batches), [policy], PROMPT)
    return result
