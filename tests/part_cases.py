"""The commands whose work is in parts, on tiny models."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import LENGTH, PROMPT, calibrated, contents, tiny_flow, train_options

from lynx_learn.fit.train import train
from lynx_learn.measure.calibrate import CalibrateOptions, calibrate
from lynx_learn.measure.coverage import CoverageOptions, coverage
from lynx_learn.measure.evaluate import EvaluateOptions, evaluate
from lynx_learn.traces.collect import CollectOptions, collect


@dataclass(frozen=True)
class Case:
    """A command on tiny models: its options by folder of results, what runs it, a part of rank 1 (of train, which has two
    layers here: of rank 0), and what is written last."""

    options: Callable[[Path], Any]
    run: Callable[[Any], object]
    part: str
    last: str


def collecting(out: Path) -> CollectOptions:
    flow = tiny_flow()
    shape: dict[str, Any] = {"tokens": 9 * 2 * LENGTH, "length": LENGTH, "batch_size": 2, "mode": "generate"}
    return CollectOptions(str(flow.model), str(out), str(flow.texts), prompt=PROMPT, **shape)


def calibrating(out: Path) -> CalibrateOptions:
    shutil.copytree(tiny_flow().selector, out, dirs_exist_ok=True)
    shape: dict[str, Any] = {"length": LENGTH, "prompt": PROMPT, "groups": 12, "batch_sizes": [1, 2, 3, 4, 5]}
    return CalibrateOptions(str(out), corpus=str(tiny_flow().texts), mode="teacher", budgets=[0.05, 0.1], **shape)


def covering(out: Path) -> CoverageOptions:
    shape: dict[str, Any] = {"length": LENGTH, "prompt": PROMPT, "groups": 40, "calibration_groups": 12}
    few: dict[str, Any] = {"batch_sizes": [8], "budgets": [0.1], "resplits": 5, "bootstraps": 5}
    texts = str(tiny_flow().texts)
    return CoverageOptions(str(tiny_flow().selector), str(out), corpus=texts, mode="teacher", **shape, **few)


def evaluating(out: Path) -> EvaluateOptions:
    shape: dict[str, Any] = {"length": LENGTH, "prompt": PROMPT, "tokens": 1, "levels": [0.03, 0.1]}
    batches: dict[str, Any] = {"batch_sizes": [2], "batches": ["mixed", "single"], "methods": ["learned", "random"]}
    return EvaluateOptions(
        str(calibrated()), str(out), corpus=str(tiny_flow().texts), mode="teacher", **shape, **batches
    )


CASES = {
    "collect": Case(collecting, collect, "index/00003.safetensors", "manifest.json"),
    "train": Case(
        lambda out: train_options(tiny_flow(), out, tune_steps=2), train, ".train.part/00000.safetensors", "config.json"
    ),
    # Large batches are the first parts.
    "calibrate": Case(calibrating, calibrate, ".calibrate-kl.part/batch-00004.json", "run-calibrate-kl.yaml"),
    "coverage": Case(covering, coverage, "-00001.safetensors", "coverage.json"),
    "evaluate": Case(evaluating, evaluate, "groups/2-mixed/00004.json", "report.json"),
}


def results(folder: Path) -> dict[str, bytes]:
    """What a command has left, without the words in it that name the folder."""
    return {name: data.replace(str(folder).encode(), b"OUT") for name, data in contents(folder).items()}
