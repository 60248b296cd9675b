"""What an evaluation has finished, on disk, and the report that is made from it.

    options.json                 written first; what a run must match to go on
    groups/16-mixed/00000.json   per group: what every policy lost on each sequence, and what it loaded

Every file is written under a temporary name, flushed and renamed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..decode.simulate import METRICS, Comparison
from ..decode.tally import Stats
from ..files import RunFolder
from ..moe.loading import environment
from ..traces.groups import Batches, Group
from .bound import margin
from .equal_loss import Readings, Sweep, matched, ratios
from .sweeps import Key, Row, Subject, Task, key


@dataclass(frozen=True)
class Cell:
    """The groups of one batch size: token rows and the source of each, and tokens after which a row is not scored."""

    size: int
    batches: Batches
    groups: list[Group]
    ends: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.size}-{self.batches}"

    @property
    def place(self) -> dict[str, Any]:
        return {"batch_size": self.size, "batches": self.batches}

    def task(self, index: int, wanted: list[Key] | None) -> Task:
        return Task(self.name, index, self.groups[index][0].tolist(), wanted, self.ends)


class Store(RunFolder):
    """The folder of an evaluation; one that holds finished groups of the same identity is gone on with.

    Raises:
        OptionError: it holds something else, or cannot be written to.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], by: str = "") -> None:
        super().__init__(folder, identity, "an evaluation", by)

    def read(self, cell: str, index: int) -> list[Row] | None:
        """A finished group, or None; a damaged file counts as none."""
        try:
            rows: list[Row] = json.loads((self.folder / self._name(cell, index)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return rows

    def write(self, cell: str, index: int, rows: list[Row]) -> None:
        self.put(self._name(cell, index), json.dumps(rows).encode())

    def _name(self, cell: str, index: int) -> str:
        return f"groups/{cell}/{index:05d}.json"


def make_report(options: dict[str, Any], subject: Subject, cells: list[Cell], store: Store) -> dict[str, Any]:
    """The report, from what is stored."""
    layer_bytes = torch.tensor([float(layer.expert_bytes) for layer in subject.layers], dtype=torch.float64)
    points: list[dict[str, Any]] = []
    at_loss: dict[str, list[dict[str, Any]]] = {"matched": [], "ratios": []}
    for cell in cells:
        stored = [{key(row): row for row in store.read(cell.name, i) or []} for i in range(len(cell.groups))]
        measured = {k: Measured(cell, [rows[k] for rows in stored], layer_bytes) for k in stored[-1]}
        untouched = next(iter(measured.values())).loaded
        points += [m.point(untouched) for m in measured.values()]
        curves: dict[tuple[str, int], list[Measured]] = {}
        for (method, curve, _), m in measured.items():
            if method != "untouched":
                curves.setdefault((method, curve), []).append(m)
        swept = [make_sweep(method, own) for (method, _), own in curves.items()]
        readings = Readings(swept, untouched, options["seed"])
        for name, make in (("matched", matched), ("ratios", ratios)):
            at_loss[name] += [{**cell.place, **row} for row in make(readings, sorted(set(options["levels"])))]
    return {
        "environment": environment(),
        "options": options,
        "base_model": subject.selector.config.base_model,
        "sources": sorted({name for cell in cells for _, names in cell.groups for name in names}),
        "points": points,
        **at_loss,
    }


class Measured:
    """One policy on all groups of a cell.

    Attributes:
        loaded: bytes read in a step, by group `(groups,)`.
    """

    def __init__(self, cell: Cell, rows: list[Row], layer_bytes: Tensor) -> None:
        self.cell, self.method, self.curve = cell, rows[0]["method"], rows[0]["curve"]
        stats = [Stats(**row["stats"]) for row in rows]
        sources = [names for _, names in cell.groups]
        sums, counts, part_sums, part_counts = (
            torch.tensor([row[name] for row in rows], dtype=torch.float64)
            for name in ("sums", "tokens", "part_sums", "part_tokens")
        )
        name = rows[0]["setting"]
        self.result = Comparison(self.method, name, sums, counts, part_sums, part_counts, stats, sources)
        before = torch.tensor([s.experts_before for s in stats], dtype=torch.float64) @ layer_bytes
        self.loaded = before * torch.tensor([s.bytes_ratio for s in stats], dtype=torch.float64)

    def point(self, untouched: Tensor) -> dict[str, Any]:
        """One row of the report; bytes are relative to what the untouched model loads on the same text."""
        result = self.result
        row: dict[str, Any] = {
            "method": self.method,
            "setting": result.setting,
            "curve": self.curve,
            **self.cell.place,
            "groups": len(result.stats),
            "tokens": result.tokens,
            **result.mean_stats(),
            "bytes": float(self.loaded.mean() / untouched.mean()),
            **{metric: result.mean(metric) for metric in METRICS},
            **{f"{metric}_margin": margin(result.group_means(metric)) for metric in METRICS},
        }
        if self.method != "untouched":
            row["kl_by_part"] = result.by_part("kl")
            by_source = {metric: result.by_source(metric) for metric in METRICS}
            row |= {"by_source": by_source, "worst_source": max(by_source["kl"], key=by_source["kl"].__getitem__)}
        return row


def make_sweep(method: str, measured: list[Measured]) -> Sweep:
    """What is read at equal loss of one curve."""
    experts = [[sum(s.experts_after) / len(s.experts_after) for s in m.result.stats] for m in measured]
    losses = {metric: torch.stack([m.result.group_means(metric) for m in measured]) for metric in METRICS}
    return Sweep(method, losses, torch.tensor(experts).double(), torch.stack([m.loaded for m in measured]))
