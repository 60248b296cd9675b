"""`lynx-learn calibrate`: the largest threshold whose loss stays within a budget, with confidence.

Learn then Test (Angelopoulos et al., arXiv 2110.01052) with fixed-sequence testing: thresholds are chosen on pilot
groups, then tested in increasing order on other groups, and the last one before the first failure is taken. The test of
one threshold is a one-sided upper confidence bound of the mean loss over groups by Student's t with Hall's correction
for skewness (Hall 1983, Annals of Statistics 11, 569–576); the unit is a group of sequences decoded together, since
the tokens of a group share their fate. The bound is asymptotic in the number of groups and holds for text like the
calibration text.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..decode.simulate import compare
from ..errors import OptionError
from ..files import check_writable
from ..moe.families import MoeLayer, find_moe_layers
from ..moe.loading import LoadedModel, load_model
from ..selector.saving import read_metrics, run_record, write_card
from ..selector.selector import LynxSelector
from ..show.progress import track
from ..traces import corpus as corpora
from .bound import BOUND, Curve, last_within, plan, rising

# The pilot's thresholds go down from twice the largest budget times the root of the batch size, by this factor.
PILOT_STEP, PILOT_POINTS = 3.0, 8
PILOT_GROUPS = 4
FEWEST_GROUPS = 8

Group = tuple[Tensor, list[str]]


@dataclass(frozen=True)
class CalibrateOptions:
    """Find the thresholds that keep the loss within quality budgets, with confidence."""

    selector: str
    """selector folder; its thresholds for this metric are replaced"""
    model: str | None = None
    """folder or Hub id; by default the model that the selector names"""
    corpus: str = corpora.BUILT_IN
    """calibration text; must not be text that the selector was fitted on, nor test text"""
    split: corpora.Split = "calibrate"
    """part of the corpus to read, by document"""
    budgets: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03])
    """budgets to find thresholds for, in units of the metric per token"""
    metric: Literal["kl", "nll", "agreement"] = "kl"
    """what a budget counts: kl (nats), nll (rise of the loss, nats) or agreement (share of changed greedy tokens)"""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    """decode batch sizes to find thresholds for"""
    confidence: float = 0.95
    """confidence of the bound"""
    groups: int = 64
    """groups measured for a batch size, at most; 4 of them choose thresholds, the others test them"""
    tokens: int = 60_000
    """tokens measured for a batch size, at most; but 12 groups are, whatever they hold"""
    length: int = 128
    """tokens of a sequence"""
    prompt: int = 32
    """tokens at the start of a sequence that stand for the prompt and are not scored"""
    bos: corpora.Bos = "auto"
    """begin every sequence with the BOS token: auto as the tokenizer begins a text, yes, or no"""
    device: str = "auto"
    """where the model runs: cpu, cuda, cuda:1, …; auto takes a GPU where there is one"""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: what the checkpoint holds, but float32 on a CPU without native bfloat16"""
    seed: int = 1
    """seed of the grouping"""

    def __post_init__(self) -> None:
        for name in ("budgets", "batch_sizes"):
            if not getattr(self, name):
                raise OptionError(f"--{name} is empty: expected one number or more")
        for budget in self.budgets:
            if not (budget > 0 and math.isfinite(budget)):
                raise OptionError(f"--budgets {budget:g} is not usable: expected numbers above 0")
        for size in self.batch_sizes:
            if size < 1:
                raise OptionError(f"--batch_sizes {size} is not usable: expected 1 or more")
        if not 0.5 < self.confidence < 1:
            raise OptionError(f"--confidence {self.confidence:g} is not usable: expected above 0.5 and below 1")
        check_groups("groups", self.groups)
        if not 0 < self.prompt < self.length - 1:
            raise OptionError(f"--prompt {self.prompt} is not usable: expected 1 to --length - 2 ({self.length - 2})")


def check_groups(option: str, groups: int) -> None:
    """Refuse fewer groups than a certificate needs.

    Raises:
        OptionError: with the option's name and what was expected.
    """
    fewest = PILOT_GROUPS + FEWEST_GROUPS
    if groups < fewest:
        raise OptionError(
            f"--{option} {groups} is not usable: expected {fewest} or more, {PILOT_GROUPS} to choose thresholds on and "
            f"{FEWEST_GROUPS} to test them"
        )


def calibrate(options: CalibrateOptions, loaded: LoadedModel | None = None) -> LynxSelector:
    """Find the thresholds and write them into the selector directory.

    Args:
        loaded: the model that the options name, where it is loaded already.
    """
    folder = Path(options.selector)
    metrics = read_metrics(folder)
    check_writable(folder)
    selector = LynxSelector.from_pretrained(options.selector)
    loaded = loaded or load_model(options.model or selector.config.base_model, options.device, options.dtype)
    layers = find_moe_layers(loaded.model)
    selector.check(layers)
    cells: dict[str, dict[str, dict[str, Any]]] = {str(b): {} for b in sorted(options.budgets)}
    sources: Counter[str] = Counter()
    for size in track(sorted(options.batch_sizes), "calibrate", len(options.batch_sizes), unit="batch sizes"):
        most = max(FEWEST_GROUPS + PILOT_GROUPS, min(options.groups, options.tokens // (size * options.length)))
        groups = corpora.decode_groups(
            options.corpus,
            loaded.tokenizer,
            options.split,
            size,
            options.length,
            most,
            options.seed,
            FEWEST_GROUPS + PILOT_GROUPS,
            bos=options.bos,
        )
        groups = [(tokens.to(loaded.input_device), names) for tokens, names in groups]
        sources.update(name for _, names in groups for name in names)
        for budget, cell in certify(loaded.model, layers, selector, groups, options).items():
            cells[str(budget)][str(size)] = cell
    thresholds = {b: {n: cell["threshold"] for n, cell in row.items()} for b, row in cells.items()}
    figures = {"bound": BOUND, "corpus": options.corpus, "split": options.split, "cells": cells}
    metrics["calibrate"] = {**metrics.get("calibrate", {}), options.metric: figures}
    limits = {"confidence": options.confidence, "sources": shares(sources)}
    config = selector.config
    # Read again: what ran has been rounded to the precision that the model was loaded in.
    selector = LynxSelector.from_pretrained(options.selector).with_config(
        thresholds={**config.thresholds, options.metric: thresholds},
        calibration={**config.calibration, options.metric: limits},
    )
    write_card(
        folder,
        selector,
        metrics,
        {f"run-calibrate-{options.metric}.yaml": run_record("calibrate", asdict(options))},
    )
    return selector


def shares(counts: Counter[str]) -> dict[str, float]:
    """Each source's share of what was counted, by name."""
    return {name: count / counts.total() for name, count in sorted(counts.items())}


def certify(
    model: nn.Module, layers: list[MoeLayer], selector: LynxSelector, groups: Sequence[Group], options: CalibrateOptions
) -> dict[float, dict[str, Any]]:
    """For each budget the certified threshold of one batch size, with what was measured at it."""
    pilot, rest = groups[:PILOT_GROUPS], groups[PILOT_GROUPS:]
    curve = pilot_curve(model, layers, selector, pilot, options)
    planned = plan(curve, options.budgets)
    distinct = sorted({tau for taus in planned.values() for tau in taus})
    measured = compare(model, layers, rest, [selector.at_threshold(tau) for tau in distinct], options.prompt)
    results = dict(zip(distinct, measured, strict=True))
    found = {}
    for budget, taus in planned.items():
        tau, upper = last_within(taus, lambda tau: results[tau].group_means(options.metric), budget, options.confidence)
        cell: dict[str, Any] = {"threshold": tau, "mean": 0.0, "upper": upper, "groups": len(rest)}
        if tau:
            result = results[tau]
            cell |= {"mean": result.mean(options.metric), "by_source": result.by_source(options.metric)}
            cell |= result.mean_stats()
        found[budget] = cell
    return found


def pilot_thresholds(budgets: list[float], size: int) -> list[float]:
    """The thresholds, rising, that the pilot groups of batches of `size` are measured at."""
    top = 2 * max(budgets) * math.sqrt(size)
    return [top * PILOT_STEP**-step for step in reversed(range(PILOT_POINTS))]


def pilot_curve(
    model: nn.Module, layers: list[MoeLayer], selector: LynxSelector, groups: Sequence[Group], options: CalibrateOptions
) -> Curve:
    """What the pilot groups lose at thresholds that span the budgets."""
    taus = pilot_thresholds(options.budgets, groups[0][0].shape[0])
    measured = compare(model, layers, groups, [selector.at_threshold(tau) for tau in taus], options.prompt)
    return rising(taus, [result.mean(options.metric) for result in measured])
