"""Methods at equal loss: read off each method's measured curve, and set against each other with intervals.

A curve is one rule at several settings, points of loss and of bytes loaded. Intervals are percentile bootstrap intervals
over groups of sequences decoded together (Efron 1979, Annals of Statistics 7, 1–26), which are the unit of independence:
groups are drawn with replacement, the same for every method, and each curve and its reading are computed again.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 200
# Share of the resamples in which a level may be out of a curve's reach before there is no interval.
UNREACHED = 0.05
# Not rules that anybody could deploy without training, so a learned method is not measured against the best of them.
NO_RULES = ("learned", "learned_lda", "formula", "oracle", "one_expert")
METRICS = ("kl", "nll")

Reading = tuple[float, float] | None


@dataclass(frozen=True)
class Sweep:
    """One rule at several settings on the same groups, every tensor `(settings, groups)`.

    Attributes:
        losses: nats per token, by metric.
        experts: mean distinct experts per layer and step.
        bytes: weights of experts, surrogates and scorers read in a step, in any unit that all sweeps share.
    """

    method: str
    losses: dict[str, Tensor]
    experts: Tensor
    bytes: Tensor


def interpolate(curve: Iterable[tuple[float, float, float]], level: float) -> Reading:
    """Experts and bytes where a curve of points (loss, experts, bytes) reaches `level`; None where it does not.

    Neighbours by bytes are joined on the logarithm of the loss, and nothing is read beyond the points. Noise can make
    a curve cross a level more than once: the crossing with the fewest bytes counts. Points without a positive, finite
    loss have no place on the logarithm and are left out.
    """
    points = sorted((p for p in curve if 0 < p[0] < math.inf), key=lambda p: (p[2], p[0], p[1]))
    for (l0, e0, b0), (l1, e1, b1) in itertools.pairwise(points):
        if min(l0, l1) <= level <= max(l0, l1):
            start, end = math.log(l0), math.log(l1)  # equal for neighbouring floats, too
            share = 0.0 if start == end else (math.log(level) - start) / (end - start)
            return e0 + share * (e1 - e0), b0 + share * (b1 - b0)
    return None


class Readings:
    """The sweeps of one cell read at any level, on the groups themselves and on every resample of them.

    Args:
        untouched: bytes that the untouched model reads in a step, by group `(groups,)`, in the unit of the sweeps.
    """

    def __init__(self, sweeps: list[Sweep], untouched: Tensor, seed: int) -> None:
        groups = len(untouched)
        drawn = torch.randint(groups, (RESAMPLES, groups), generator=torch.Generator().manual_seed(seed))
        counts = torch.zeros(RESAMPLES, groups, dtype=torch.float64)
        counts = counts.scatter_add(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
        self.weights = torch.cat([torch.ones(1, groups, dtype=torch.float64), counts]).T / groups
        self.untouched = untouched.double() @ self.weights
        self.sweeps: dict[str, list[Sweep]] = {}
        for sweep in sweeps:
            self.sweeps.setdefault(sweep.method, []).append(sweep)

    def __call__(self, method: str, metric: str, level: float, resamples: bool = False) -> list[Reading]:
        """Experts and relative bytes of the method's best curve: first on all groups, then with `resamples` on each."""
        best: list[Reading] = []
        for sweep in self.sweeps.get(method, []):
            weights = self.weights if resamples else self.weights[:, :1]
            loss, experts, size = (
                part.double() @ weights for part in (sweep.losses[metric], sweep.experts, sweep.bytes)
            )
            size = size / self.untouched[: weights.shape[1]]
            curves = torch.stack([loss, experts, size], dim=-1).transpose(0, 1).tolist()
            found = [interpolate(map(tuple, curve), level) for curve in curves]
            best = [fewer(*pair) for pair in zip(best, found, strict=True)] if best else found
        return best or [None] * (RESAMPLES + 1 if resamples else 1)


def fewer(one: Reading, other: Reading) -> Reading:
    """The reading with fewer bytes."""
    if one is None or other is None:
        return one or other
    return min(one, other, key=lambda reading: reading[1])


def matched(readings: Readings, levels: list[float]) -> list[dict[str, Any]]:
    """Experts and relative bytes of every method at every level of KL and of ΔNLL; None: not reached."""
    rows = []
    for metric, level, method in itertools.product(METRICS, sorted(levels), readings.sweeps):
        (found,) = readings(method, metric, level)
        experts, size = found or (None, None)
        rows.append({"metric": metric, "level": level, "method": method, "experts": experts, "bytes": size})
    return rows


def ratios(readings: Readings, levels: list[float]) -> list[dict[str, Any]]:
    """The learned method against the best rule, the oracle and the formula at equal loss, a row per metric and level.

    `bytes_to_best_rule` and `bytes_to_formula` are ratios of bytes, `experts_to_oracle` one of distinct experts; each
    is None where either side is not reached, else `ratio` with the 95% interval `low` to `high`. `best_rule` is the
    method with the fewest bytes on all groups among those of which nothing is trained.
    """
    rows = []
    rules = [method for method in readings.sweeps if method not in NO_RULES]
    for metric, level in itertools.product(METRICS, sorted(levels)):
        reached = {m: found[1] for m in rules if (found := readings(m, metric, level)[0]) is not None}
        best = min(reached, key=reached.__getitem__, default=None)
        learned, rule, formula, oracle = (
            readings(method or "", metric, level, resamples=True) for method in ("learned", best, "formula", "oracle")
        )
        rows.append(
            {
                "metric": metric,
                "level": level,
                "best_rule": best,
                "bytes_to_best_rule": ratio(learned, rule, 1),
                "experts_to_oracle": ratio(learned, oracle, 0),
                "bytes_to_formula": ratio(learned, formula, 1),
            }
        )
    return rows


def ratio(top: list[Reading], bottom: list[Reading], column: int) -> dict[str, float | None] | None:
    """`top` by `bottom` in one column of their readings, with its interval where enough resamples reach both."""
    shares = [
        a[column] / b[column] if a is not None and b is not None else None for a, b in zip(top, bottom, strict=True)
    ]
    if shares[0] is None:
        return None
    drawn = [share for share in shares[1:] if share is not None]
    low = high = None
    if len(drawn) >= (1 - UNREACHED) * RESAMPLES:
        low, high = torch.tensor(drawn, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return {"ratio": shares[0], "low": low, "high": high}
