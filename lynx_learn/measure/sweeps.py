"""Measuring policies on groups of sequences that decode together, in this process or in several.

The first group of a batch size decides which settings of a rule's sweep are measured on the others: the sweep is walked
from gentle to harsh until its KL leaves the range of the levels that methods are compared at, and of the settings
within that range, and those next to it, a few are kept. This places points on a curve that is reported as it is. No
rule's parameter is chosen by it, and nothing is tuned.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..decode.simulate import Losses, Run, Simulation
from ..decode.tally import Stats
from ..moe.decision import Policy
from ..moe.families import find_moe_layers
from ..moe.loading import LoadedModel, load_base
from ..rules.expert_stats import measure_experts
from ..rules.grids import curves
from ..selector.selector import LynxSelector
from ..traces.format import Trace

# KL that is worth measuring: from the lowest level by the first to the highest level times the second.
BELOW, ABOVE = 3.0, 2.0
# How far beyond a level a setting must be on the first group to be beyond it on all groups, too.
ROOM = 1.3
MOST_SETTINGS = 5
# Groups have seeds of their own, this far apart: a random rule adds the layer to it.
SEED_STEP = 1000

Key = tuple[str, int, str]
"""Method, number of its curve, setting."""
Row = dict[str, Any]
"""One policy on one group, ready for JSON: method, curve, setting, losses `[sequences][METRICS]`, stats."""


@dataclass(frozen=True)
class Setup:
    """All that it takes to measure groups."""

    selector: str
    model: str | None
    trace: str | None
    device: str
    dtype: str
    methods: tuple[str, ...]
    levels: tuple[float, ...]
    prompt: int
    seed: int


@dataclass(frozen=True)
class Task:
    """One group to measure.

    Attributes:
        cell: folder of its results.
        tokens: `[sequences][positions]`.
        plan: what to measure; None for the first group, which decides that.
        ends: tokens after which a sequence is not scored.
    """

    cell: str
    index: int
    tokens: list[list[int]]
    plan: list[Key] | None
    ends: tuple[int, ...] = ()


class Subject:
    """A loaded model with a selector, and with expert statistics where a trace is given.

    Raises:
        SelectorError, ModelError, TraceError: what is named does not load or does not belong together.
    """

    def __init__(self, setup: Setup, loaded: LoadedModel | None = None) -> None:
        self.setup = setup
        self.selector = LynxSelector.from_pretrained(setup.selector)
        self.trace = Trace.open(setup.trace) if setup.trace else None
        self.loaded = loaded or load_base(
            setup.model, self.selector.config.base_model, self.selector.config.base_revision, setup.device, setup.dtype
        )
        self.layers = find_moe_layers(self.loaded.model)
        self.selector.check(self.layers, self.loaded.model)
        self.curves: dict[tuple[str, int, int], list[list[Policy]]] = {}
        self.stats = None
        if self.trace is not None:
            self.stats = measure_experts(self.layers, self.trace, pairs="exfold" in setup.methods)

    def sweeps(self, size: int, index: int) -> dict[tuple[str, int], list[Policy]]:
        """Every curve of every method, each from gentle to harsh, for one group of `size` sequences."""
        found: dict[tuple[str, int], list[Policy]] = {}
        for method in self.setup.methods:
            # Others do not depend on it, and some hold a copy of the selector, which may be large.
            seed = self.setup.seed + SEED_STEP * index if method == "random" else 0
            if (method, size, seed) not in self.curves:
                self.curves[method, size, seed] = curves(method, self.layers, size, self.stats, self.selector, seed)
            found |= {(method, number): curve for number, curve in enumerate(self.curves[method, size, seed])}
        return found

    def budgeted(self) -> list[Policy]:
        """The calibrated policies; they lie on the first learned curve, and are measured with it or without any method."""
        if self.setup.methods and "learned" not in self.setup.methods:
            return []
        budgets = self.selector.config.thresholds.get("kl", {})
        prices = self.selector.calibrated_prices
        return [self.selector.policy(float(budget), prices=prices()) for budget in budgets]


def measure(subject: Subject, task: Task) -> list[Row]:
    """The untouched model, then the policies in the plan, on one group; without plan what `walk` finds."""
    tokens = torch.tensor(task.tokens, device=subject.loaded.input_device)
    simulation = Simulation(subject.loaded.model, subject.layers, subject.setup.prompt, task.ends)

    def score(method: str, curve: int, policies: Sequence[Policy]) -> Iterator[Row]:
        for policy in policies:
            policy.bind(subject.layers)
        results = simulation.losses(Run(tokens, policy) for policy in policies)
        for policy, (losses, stats) in zip(policies, results, strict=True):
            yield make_row(method, curve, policy.setting, losses, stats)

    rows = [make_row("untouched", 0, "", simulation.nothing(tokens), simulation.untouched(tokens))]
    wanted = None if task.plan is None else set(task.plan)
    for (method, number), curve in subject.sweeps(len(tokens), task.index).items():
        if wanted is None:
            rows += walk(score(method, number, curve), max(subject.setup.levels))
        else:
            rows += score(method, number, [p for p in curve if (method, number, p.setting) in wanted])
    rows += score("learned", 0, subject.budgeted())
    return rows


def make_row(method: str, curve: int, setting: str, losses: Losses, stats: Stats) -> Row:
    """What is stored of one policy on one group."""
    figures = {name: part.tolist() for name, part in losses._asdict().items()}
    return {"method": method, "curve": curve, "setting": setting, **figures, "stats": asdict(stats)}


def walk(rows: Iterable[Row], highest: float) -> Iterator[Row]:
    """Rows of a sweep from gentle to harsh, up to the first whose KL is beyond the range of the levels."""
    for row in rows:
        yield row
        if not kl(row) <= ABOVE * highest:
            return


def kl(row: Row) -> float:
    """KL per token of one policy on one group."""
    return float(sum(losses[0] for losses in row["sums"]) / sum(row["tokens"]))


def plan(rows: list[Row], levels: tuple[float, ...]) -> list[Key]:
    """What to measure on the other groups, from the rows of the first one."""
    swept: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["method"] != "untouched" and not row["setting"].startswith("budget="):
            swept.setdefault((row["method"], row["curve"]), []).append(row)
    dropped = set()
    for curve in swept.values():
        kept = settings_to_measure([kl(row) for row in curve], levels)
        dropped |= {key(row) for i, row in enumerate(curve) if i not in kept}
    return [key(row) for row in rows if key(row) not in dropped]


def key(row: Row) -> Key:
    return row["method"], row["curve"], row["setting"]


def settings_to_measure(losses: list[float], levels: tuple[float, ...]) -> set[int]:
    """Which positions of a walked sweep are worth measuring on all groups, by their KL on one; at least one.

    Those within the range of the levels, and where these do not reach beyond the levels with some room, the next one
    on that side; of too many, those most evenly spaced on the logarithm of the loss.
    """
    low, high = min(levels), max(levels)
    inside = [i for i, loss in enumerate(losses) if low / BELOW <= loss <= high * ABOVE]
    gentler = [i for i, loss in enumerate(losses) if loss < low / BELOW]
    harsher = [i for i, loss in enumerate(losses) if not loss <= high * ABOVE]
    kept = list(inside)
    if gentler and not any(losses[i] <= low / ROOM for i in inside):
        kept.append(max(gentler, key=losses.__getitem__))
    if harsher and not any(losses[i] >= high * ROOM for i in inside):
        kept.append(harsher[0])
    kept.sort(key=losses.__getitem__)
    place = [math.log(max(losses[i], low / BELOW**2)) for i in kept]
    while len(kept) > MOST_SETTINGS:
        crowded = min(range(1, len(kept) - 1), key=lambda i: place[i + 1] - place[i - 1])
        del kept[crowded], place[crowded]
    return set(kept)
