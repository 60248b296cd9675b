"""`lynx-learn calibrate`: the largest threshold whose loss stays within a budget, with confidence.

Learn then Test (Angelopoulos et al., arXiv 2110.01052) with fixed-sequence testing: thresholds are chosen on pilot
groups, then tested in increasing order on other groups, and the last one before the first failure is taken. The test of
one threshold is a one-sided upper confidence bound of the mean loss over groups by Student's t with Hall's correction
for skewness (Hall 1983, Annals of Statistics 11, 569–576); the unit is a group of sequences decoded together, since
the tokens of a group share their fate. The bound is asymptotic in the number of groups and holds for text like the
calibration text.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from . import corpus as corpora
from .card import run_record, write_card
from .errors import OptionError
from .families import MoeLayer, find_moe_layers
from .models import load_model
from .progress import track
from .selector import LynxSelector, read_metrics
from .simulate import compare

BOUND = "one-sided Student t with Hall's skewness correction, fixed-sequence testing (Learn then Test)"
# Thresholds tested for a budget, as the shares of it that the pilot groups lose at them.
FRACTIONS = (0.5, 0.7, 0.8, 0.87, 0.94, 1.0)
# The pilot's thresholds go down from twice the largest budget times the root of the batch size, by this factor.
PILOT_STEP, PILOT_POINTS = 3.0, 8
PILOT_GROUPS = 4
FEWEST_GROUPS = 8

Group = tuple[Tensor, list[str]]


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of `lynx-learn calibrate`.

    Attributes:
        selector: selector directory; its thresholds for this metric are replaced.
        model: folder or Hub id; by default the selector's base model.
        corpus, split: calibration text; must not be text the selector was fitted on, nor test text.
        budgets: of the metric, per token.
        metric: `kl` (nats), `nll` (rise of the loss, nats) or `agreement` (share of changed greedy choices).
        batch_sizes: decode batch sizes to find thresholds for.
        confidence: of the bound.
        groups: groups measured for a batch size, at most.
        tokens: tokens measured for a batch size, at most; at least 8 groups are.
        length, prompt: tokens of a sequence, and how many of them stand for the prompt and are not scored.
        device, dtype: of the model, as in `collect`.
        seed: of the grouping.
    """

    selector: str
    model: str | None = None
    corpus: str = corpora.BUILT_IN
    split: corpora.Split = "calibrate"
    budgets: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03])
    metric: Literal["kl", "nll", "agreement"] = "kl"
    batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    confidence: float = 0.95
    groups: int = 64
    tokens: int = 60_000
    length: int = 128
    prompt: int = 32
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 1

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
        if not 0 < self.prompt < self.length - 1:
            raise OptionError(f"--prompt {self.prompt} is not usable: expected 1 to --length - 2 ({self.length - 2})")


def calibrate(options: CalibrateOptions) -> LynxSelector:
    """Find the thresholds and write them into the selector directory."""
    folder = Path(options.selector)
    metrics = read_metrics(folder)
    selector = LynxSelector.from_pretrained(options.selector)
    loaded = load_model(options.model or selector.config.base_model, options.device, options.dtype)
    layers = find_moe_layers(loaded.model)
    selector.check(layers)
    cells: dict[str, dict[str, dict[str, Any]]] = {str(b): {} for b in sorted(options.budgets)}
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
        )
        groups = [(tokens.to(loaded.input_device), names) for tokens, names in groups]
        for budget, cell in certify(loaded.model, layers, selector, groups, options).items():
            cells[str(budget)][str(size)] = cell
    thresholds = {b: {n: cell["threshold"] for n, cell in row.items()} for b, row in cells.items()}
    how = {
        "bound": BOUND,
        "confidence": options.confidence,
        "corpus": options.corpus,
        "split": options.split,
        "cells": cells,
    }
    config = selector.config
    # Read again: what ran has been rounded to the precision that the model was loaded in.
    selector = LynxSelector.from_pretrained(options.selector).with_config(
        thresholds={**config.thresholds, options.metric: thresholds},
        calibration={**config.calibration, options.metric: how},
    )
    write_card(
        folder,
        selector,
        metrics,
        {f"run-calibrate-{options.metric}.yaml": run_record("calibrate", asdict(options))},
    )
    return selector


def upper_bound(values: Tensor, confidence: float) -> float:
    """One-sided upper confidence bound of the mean of independent `values` `(n,)`; infinite for fewer than two.

    Student's t with the correction of Hall (1983) for the skewness that losses have.
    """
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return math.inf
    mean, spread = float(values.mean()), float(values.std())
    if spread == 0.0:
        return mean
    third = float((values - mean).pow(3).mean())
    quantile = float(t.ppf(confidence, n - 1))
    return mean + quantile * spread / math.sqrt(n) + third * (2 * quantile**2 + 1) / (6 * n * spread**2)


def certify(
    model: nn.Module, layers: list[MoeLayer], selector: LynxSelector, groups: Sequence[Group], options: CalibrateOptions
) -> dict[float, dict[str, Any]]:
    """For each budget the certified threshold of one batch size, with what was measured at it."""
    pilot, rest = groups[:PILOT_GROUPS], groups[PILOT_GROUPS:]
    curve = pilot_curve(model, layers, selector, pilot, options)
    plan = {budget: [threshold_at(curve, f * budget) for f in FRACTIONS] for budget in sorted(options.budgets)}
    distinct = sorted({tau for taus in plan.values() for tau in taus})
    measured = compare(model, layers, rest, [selector.at_threshold(tau) for tau in distinct], options.prompt)
    losses = {tau: result.group_means(options.metric) for tau, result in zip(distinct, measured, strict=True)}
    stats = {tau: result.mean_stats() for tau, result in zip(distinct, measured, strict=True)}
    found = {}
    for budget, taus in plan.items():
        cell: dict[str, Any] = {"threshold": 0.0, "mean": 0.0, "upper": 0.0, "groups": len(rest)}
        for tau in sorted(set(taus)):
            upper = upper_bound(losses[tau], options.confidence)
            if not upper <= budget:
                break
            cell = {
                "threshold": tau,
                "mean": float(losses[tau].mean()),
                "upper": upper,
                "groups": len(rest),
                **stats[tau],
            }
        found[budget] = cell
    return found


def pilot_curve(
    model: nn.Module, layers: list[MoeLayer], selector: LynxSelector, groups: Sequence[Group], options: CalibrateOptions
) -> list[tuple[float, float]]:
    """(threshold, mean loss) at thresholds that span the budgets, made non-decreasing."""
    top = 2 * max(options.budgets) * math.sqrt(groups[0][0].shape[0])
    taus = [top * PILOT_STEP**-step for step in reversed(range(PILOT_POINTS))]
    measured = compare(model, layers, groups, [selector.at_threshold(tau) for tau in taus], options.prompt)
    curve, highest = [], 0.0
    for tau, result in zip(taus, measured, strict=True):
        highest = max(highest, result.mean(options.metric))
        curve.append((tau, highest))
    return curve


def threshold_at(curve: list[tuple[float, float]], loss: float) -> float:
    """The threshold at which the pilot loses `loss`, interpolated on logarithms; the curve's ends beyond it."""
    below = [(tau, value) for tau, value in curve if 0 < value <= loss]
    above = [(tau, value) for tau, value in curve if value > loss]
    if not above:
        return curve[-1][0]
    if not below:
        return above[0][0] * min(1.0, loss / above[0][1])
    (t0, v0), (t1, v1) = below[-1], above[0]
    share = (math.log(loss) - math.log(v0)) / (math.log(v1) - math.log(v0))
    return math.exp(math.log(t0) + share * (math.log(t1) - math.log(t0)))
