"""Pools of `coverage`: what groups of sequences lose and read at a grid of thresholds, measured once and kept in files.

The thresholds of a plan fall between those of the grid. There each group's loss is read off the straight line between
its two measured ones. Rounding down to the grid instead would make every certified threshold smaller than that of
`calibrate`, and so hide overruns.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..decode.simulate import METRICS, Comparison, compare, per_token
from ..files import write
from ..moe.families import MoeLayer, find_moe_layers
from ..moe.loading import LoadedModel
from ..selector.selector import LynxSelector
from ..show.progress import track
from ..traces.groups import Group
from .bound import FRACTIONS, Curve, threshold_at
from .calibrate import PILOT_GROUPS, PILOT_STEP, CalibrateOptions, pilot_curve

# Thresholds of the grid to one step of the pilot's: 25% apart.
GRID = 5
# The grid reaches beyond the losses that plans aim at by this factor, since pilots differ.
MARGIN = 1.5


@dataclass(frozen=True)
class Pool:
    """What each group loses and reads at the thresholds that were measured, and by straight lines between them.

    Attributes:
        thresholds: `(points,)`, rising from 0, where nothing is skipped.
        sums: `(points, guarded, groups)`; losses summed over the tokens of each part of a group whose mean shall stay
            within the budget: all of them, those of the last quarter of the positions, and those of each source.
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


def guarded_sums(result: Comparison, options: CalibrateOptions) -> tuple[Tensor, Tensor]:
    """Sums and counts of tokens, both `(guarded, groups)`, in the order of `calibrate.guarded`."""
    place = METRICS.index(options.metric)
    rows = [(result.sums[:, :, place].sum(1), result.counts.sum(1))]
    rows.append((result.part_sums[:, -1, place], result.part_counts[:, -1]))
    if options.guarantee == "worst-source":
        for source in sorted({name for names in result.sources for name in names}):
            own = torch.tensor([[name == source for name in names] for names in result.sources])
            rows.append(((result.sums[:, :, place] * own).sum(1), (result.counts * own).sum(1)))
    sums, counts = zip(*rows, strict=True)
    return torch.stack(sums), torch.stack(counts)


class Meter:
    """Measures pools, each into a file that is named by what decides its content."""

    def __init__(self, folder: Path, options: CalibrateOptions, selector: LynxSelector, loaded: LoadedModel) -> None:
        self.folder, self.options, self.selector, self.loaded = folder, options, selector, loaded
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
            "guarantee": options.guarantee,
            "prices": options.prices,
            "ends": options.text.ends(loaded),
            "budgets": sorted(options.budgets),
        }

    def pool(self, groups: list[Group], thresholds: list[float] | None = None) -> Pool:
        """The groups' losses at `thresholds`, or at their own grid, measured now or before."""
        digest = hashlib.sha256(json.dumps({**self.decided_by, "thresholds": thresholds}).encode())
        for tokens, names in groups:
            digest.update(tokens.cpu().numpy().tobytes() + "\n".join(names).encode())
        name = f"batch-{len(groups[0][1])}-{digest.hexdigest()[:12]}.safetensors"
        path = self.folder / "pools" / name
        tensors = read_tensors(path)
        if tensors is None:
            tensors = self._measure(groups, thresholds)
            write(path, save(tensors))
        return Pool(**tensors)

    def _measure(self, groups: list[Group], thresholds: list[float] | None) -> dict[str, Tensor]:
        loaded, options, (count, size) = self.loaded, self.options, (len(groups), len(groups[0][1]))
        if thresholds is None:
            first = groups[:PILOT_GROUPS]
            curve = pilot_curve(loaded, self.layers, self.selector, first, options)
            thresholds = grid(curve, options.budgets)
        results = compare(
            loaded.model,
            self.layers,
            groups,
            [self.options.at(self.selector, tau) for tau in thresholds],
            options.prompt,
            lambda steps: track(steps, f"coverage, batch {size}", count, unit="groups"),
            options.text.ends(loaded),
        )
        sums, counts = zip(*(guarded_sums(result, options) for result in results), strict=True)
        return {
            "thresholds": torch.tensor([0.0, *thresholds], dtype=torch.float64),
            "sums": torch.stack([torch.zeros_like(sums[0]), *sums]),
            "counts": counts[0],
            "bytes": torch.tensor(
                [[1.0] * count, *([s.bytes_ratio for s in r.stats] for r in results)], dtype=torch.float64
            ),
        }


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
