"""Pools of `coverage`: what groups of sequences lose and read at a grid of thresholds, measured once and kept in files.

The thresholds of a plan fall between those of the grid. There each group's loss is read off the straight line between
its two measured ones. Rounding down to the grid instead would make every certified threshold smaller than that of
`calibrate`, and so hide overruns.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..decode.simulate import METRICS, Comparison, Run, compare, per_token, stacks
from ..files import write
from ..moe.families import MoeLayer, find_moe_layers
from ..moe.loading import LoadedModel
from ..parts import ALL, Share
from ..selector.selector import LynxSelector
from ..show.progress import track
from ..traces.groups import Group
from .bound import FRACTIONS, Curve, threshold_at
from .calibrate import PILOT_GROUPS, PILOT_STEP, CalibrateOptions, Guarantee, pilot_curve

# Thresholds of the grid to one step of the pilot's: 25% apart.
GRID = 5
# The grid reaches beyond the losses that plans aim at by this factor, since pilots differ.
MARGIN = 1.5
# Parts of a group that every guarantee is about: all positions, and their last quarter.
EVERYWHERE = 2


@dataclass(frozen=True)
class Pool:
    """What each group loses and reads at the thresholds that were measured, and by straight lines between them.

    Attributes:
        thresholds: `(points,)`, rising from 0, where nothing is skipped.
        sums: `(points, guarded, groups)`; losses summed over the tokens of each part of a group whose mean may have to
            stay within the budget: all of them, those of the last quarter of the positions, and those of each source.
        counts: `(guarded, groups)`; how many tokens these are.
        bytes: `(points, groups)`; bytes read relative to the untouched model.
    """

    thresholds: Tensor
    sums: Tensor
    counts: Tensor
    bytes: Tensor

    @property
    def groups(self) -> int:
        return self.counts.shape[1]

    def guarding(self, guarantee: Guarantee) -> "Pool":
        """The same with those parts alone that a guarantee is about, in the order of `calibrate.guarded`."""
        if guarantee == "worst-source":
            return self
        return replace(self, sums=self.sums[:, :EVERYWHERE], counts=self.counts[:EVERYWHERE])

    def losses_at(self, threshold: float, chosen: Tensor | slice = slice(None)) -> list[Tensor]:
        """Of everything that is guarded one value per chosen group, see `per_token`."""
        sums = self._between(self.sums, threshold)[:, chosen]
        return [per_token(*pair) for pair in zip(sums, self.counts[:, chosen], strict=True)]

    def worst_at(self, threshold: float, chosen: Tensor | slice = slice(None)) -> float:
        """The largest mean loss of what is guarded, over the chosen groups."""
        return max(float(values.mean()) for values in self.losses_at(threshold, chosen) if len(values))

    def bytes_at(self, threshold: float) -> Tensor:
        """Bytes of every group `(groups,)`."""
        return self._between(self.bytes, threshold)

    def _between(self, values: Tensor, threshold: float) -> Tensor:
        above = int(torch.searchsorted(self.thresholds, threshold).clamp(1, len(self.thresholds) - 1))
        low, high = self.thresholds[above - 1 : above + 1].tolist()
        return torch.lerp(values[above - 1], values[above], min(1.0, (threshold - low) / (high - low)))


def guarded_sums(result: Comparison, metric: str, sources: list[str]) -> tuple[Tensor, Tensor]:
    """Sums and counts of tokens, both `(guarded, groups)`, of all that any guarantee is about.

    Args:
        sources: of the whole pool.
    """
    place = METRICS.index(metric)
    rows = [(result.sums[:, :, place].sum(1), result.counts.sum(1))]
    rows.append((result.part_sums[:, -1, place], result.part_counts[:, -1]))
    for source in sources:
        own = torch.tensor([[name == source for name in names] for names in result.sources])
        rows.append(((result.sums[:, :, place] * own).sum(1), (result.counts * own).sum(1)))
    sums, counts = zip(*rows, strict=True)
    return torch.stack(sums), torch.stack(counts)


class Meter:
    """Measures pools, the groups of one pass of the model at a time, into files named by what decides their content.

    Attributes:
        thresholds: those of the last pool.
        parts, missing: how many files the pools have so far, and which of them other processes have not written yet.
    """

    def __init__(
        self,
        folder: Path,
        options: CalibrateOptions,
        selector: LynxSelector,
        loaded: LoadedModel,
        share: Share = ALL,
    ) -> None:
        self.folder, self.options, self.selector, self.loaded, self.share = folder, options, selector, loaded, share
        self.thresholds: list[float] = []
        self.parts, self.missing = 0, list[int]()
        self.layers: list[MoeLayer] = find_moe_layers(loaded.model)
        selector.check(self.layers, loaded.model)
        weights = save({name: value.contiguous() for name, value in selector.state_dict().items()})
        self.decided_by = {
            "selector": hashlib.sha256(weights).hexdigest(),
            "identity": selector.config.identity,
            "revision": loaded.revision,
            "dtype": str(self.layers[0].dtype),
            "prompt": options.prompt,
            "metric": options.metric,
            "prices": options.prices,
            "ends": options.text.ends(loaded),
            "budgets": sorted(options.budgets),
        }

    def pool(self, groups: list[Group], thresholds: list[float] | None = None) -> Pool | None:
        """The groups' losses at `thresholds`, or at their own grid, measured now or before.

        Only this process's parts are measured; None where others are missing.
        """
        digest = hashlib.sha256(json.dumps({**self.decided_by, "thresholds": thresholds}).encode())
        for tokens, names in groups:
            digest.update(tokens.cpu().numpy().tobytes() + "\n".join(names).encode())
        name, size = f"batch-{len(groups[0][1])}-{digest.hexdigest()[:12]}", len(groups[0][1])
        parts = list(passes(groups))
        paths = [self.folder / "pools" / f"{name}-{number:05d}.safetensors" for number in range(len(parts))]
        own = [number for number in self.share.own(len(parts)) if read_tensors(paths[number]) is None]
        self.thresholds = self._thresholds(paths, groups, thresholds) if own or not self.share.merge else []
        sources = sorted({name for _, names in groups for name in names})
        for number in track(own, f"coverage, batch {size}", len(own), unit="passes"):
            tensors = self._measure(parts[number], self.thresholds, sources)
            write(paths[number], save(tensors), self.share.by)
        found = [read_tensors(path) for path in paths]
        self.missing += [self.parts + number for number, part in enumerate(found) if part is None]
        self.parts += len(parts)
        whole = [part for part in found if part is not None]
        if len(whole) < len(parts):
            return None
        joined = {key: torch.cat([part[key] for part in whole], -1) for key in ("sums", "counts", "bytes")}
        return Pool(whole[0]["thresholds"], **joined)

    def _thresholds(self, paths: list[Path], groups: list[Group], given: list[float] | None) -> list[float]:
        """Given ones, or those of what is measured already, or the groups' own grid; everybody finds the same."""
        if given is not None:
            return given
        for path in paths:
            if (part := read_tensors(path)) is not None:
                return part["thresholds"].tolist()[1:]
        curve = pilot_curve(self.loaded, self.layers, self.selector, groups[:PILOT_GROUPS], self.options)
        return grid(curve, self.options.budgets)

    def _measure(self, groups: list[Group], thresholds: list[float], sources: list[str]) -> dict[str, Tensor]:
        results = compare(
            self.loaded.model,
            self.layers,
            groups,
            [self.options.at(self.selector, tau) for tau in thresholds],
            self.options.prompt,
            ends=self.options.text.ends(self.loaded),
        )
        sums, counts = zip(*(guarded_sums(result, self.options.metric, sources) for result in results), strict=True)
        bytes_read = [[1.0] * len(groups), *([s.bytes_ratio for s in r.stats] for r in results)]
        return {
            "thresholds": torch.tensor([0.0, *thresholds], dtype=torch.float64),
            "sums": torch.stack([torch.zeros_like(sums[0]), *sums]),
            "counts": counts[0],
            "bytes": torch.tensor(bytes_read, dtype=torch.float64),
        }


def passes(groups: list[Group]) -> Iterator[list[Group]]:
    """The groups that share a pass of the model."""
    start = 0
    for stack in stacks(Run(tokens, None) for tokens, _ in groups):
        yield groups[start : start + len(stack)]
        start += len(stack)


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """What was measured before, or None; a crash of the machine may have damaged the file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in ("thresholds", "sums", "counts", "bytes")}
    except (OSError, SafetensorError):
        return None


def grid(curve: Curve, budgets: list[float]) -> list[float]:
    """Thresholds to measure, rising: GRID to a step of the pilot's where plans may look, elsewhere the pilot's own."""
    step = PILOT_STEP ** (1 / GRID)
    aims = [(threshold_at(curve, FRACTIONS[0] * b / MARGIN), threshold_at(curve, b * MARGIN)) for b in budgets]
    lowest, highest = min(low for low, _ in aims) / step, max(high for _, high in aims)
    pilot = [tau for tau, _ in curve]
    further = max(0, math.ceil(math.log(pilot[0] / lowest, PILOT_STEP)))
    coarse = [*(pilot[0] * PILOT_STEP**-k for k in range(further, 0, -1)), *pilot]
    fine = (low * (high / low) ** (k / GRID) for low, high in pairwise(coarse) for k in range(GRID))
    near = {tau for tau in fine if any(low / step <= tau <= high * step for low, high in aims)}
    first = max((tau for tau in coarse if tau <= lowest), default=coarse[0])
    last = min((tau for tau in pilot if tau >= highest), default=pilot[-1])
    return sorted(near | {tau for tau in coarse if first <= tau <= last})
