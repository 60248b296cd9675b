"""`lynx-learn evaluate`: what methods lose and save on test text, side by side.

A cell is a decode batch size with mixed batches or batches of a single source. In each cell every rule is a curve, its
main parameter swept from gentle to harsh, and the first group of sequences decides which of these settings are measured
on the other groups (see `sweeps`): that places points on a curve that is reported as it is, and tunes nothing. The
thresholds calibrated for the selector's budgets are always measured.

    options.json                 written first; what an interrupted run must match to go on
    groups/16-mixed/00000.json   per group: what every policy lost on each sequence, and what it loaded
    report.json                  written last, from the groups' files alone
    frontier.svg, frontier.png   loss against bytes
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..decode.runtime import Stats
from ..decode.simulate import METRICS, Comparison
from ..errors import OptionError
from ..moe.loading import environment
from ..rules.grids import METHODS
from ..selector.selector import LynxSelector, read_metrics
from ..show.card import run_record, write_card
from ..show.figures import frontier
from ..show.progress import track
from ..traces import corpus as corpora
from .equal_loss import Readings, Sweep, matched, ratios
from .store import Store
from .sweeps import Key, Row, Run, Setup, Subject, Task, key, measuring, plan

FEWEST_GROUPS = 8
# Options that do not decide what is measured.
INCIDENTAL = ("out", "card", "workers")


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `lynx-learn evaluate`.

    Attributes:
        selector: selector directory or Hub id.
        out: folder for the report; an interrupted run goes on there.
        model: folder or Hub id; by default the selector's base model.
        trace: trace directory of the same model, for rules that need statistics of its experts.
        corpus, split: test text; must be used for nothing else.
        methods: which to measure; `untouched` is always there.
        batch_sizes: decode batch sizes.
        batches: `mixed`: each decode batch draws from all sources; `single`: each from one, sources taking turns.
            `single:16` is for batches of 16 alone.
        tokens: decode tokens scored for each point, at least; at least 8 groups of sequences are.
        levels: losses in nats per token at which methods are compared.
        length, prompt: tokens of a sequence, and how many of them stand for the prompt and are not scored.
        card: also put the figures into the selector's card.
        workers: processes on a CPU, each with one thread and a model of its own; 1: this process with all its threads.
        device, dtype: of the model, as in `collect`.
        seed: of the grouping, the random rule and the intervals.
    """

    selector: str
    out: str
    model: str | None = None
    trace: str | None = None
    corpus: str = corpora.BUILT_IN
    split: corpora.Split = "test"
    methods: list[str] = field(default_factory=lambda: ["random", "xshare", "gate_sq", "learned"])
    batch_sizes: list[int] = field(default_factory=lambda: [16])
    batches: list[str] = field(default_factory=lambda: ["mixed"])
    tokens: int = 50_000
    levels: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03])
    length: int = 128
    prompt: int = 32
    card: bool = False
    workers: int = 1
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 2

    def __post_init__(self) -> None:
        for name in ("methods", "batch_sizes", "batches", "levels"):
            if not getattr(self, name):
                raise OptionError(f"--{name} is empty: expected one value or more")
        for method in self.methods:
            if method not in METHODS:
                raise OptionError(f"--methods {method} is unknown: expected some of {', '.join(METHODS)}")
        for name in ("tokens", "workers"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)} is not usable: expected 1 or more")
        for level in self.levels:
            if not (level > 0 and math.isfinite(level)):
                raise OptionError(f"--levels {level:g} is not usable: expected numbers above 0")
        if not 0 < self.prompt < self.length - 1:
            raise OptionError(f"--prompt {self.prompt} is not usable: expected 1 to --length - 2 ({self.length - 2})")
        for size in self.batch_sizes:
            if size < 1:
                raise OptionError(f"--batch_sizes {size} is not usable: expected 1 or more")
        for text in self.batches:
            kind, colon, size_text = text.partition(":")
            if kind not in ("mixed", "single") or (colon and size_text not in map(str, self.batch_sizes)):
                raise OptionError(
                    f"--batches {text} is not usable: expected mixed or single, alone or with a colon and one of --batch_sizes"
                )

    @property
    def cells(self) -> list[tuple[int, corpora.Batches]]:
        """Batch size and kind of batches of each cell, in the order of the report."""
        wanted = {(kind, size) for kind, _, size in (text.partition(":") for text in self.batches)}
        kinds: tuple[corpora.Batches, ...] = ("mixed", "single")
        return [
            (size, kind)
            for kind in kinds
            for size in sorted(set(self.batch_sizes))
            if (kind, "") in wanted or (kind, str(size)) in wanted
        ]

    @property
    def setup(self) -> Setup:
        methods = tuple(method for method in METHODS if method in self.methods)
        levels = tuple(sorted(set(self.levels)))
        own = (self.selector, self.model, self.trace, self.device, self.dtype)
        return Setup(*own, methods, levels, self.prompt, self.seed)


@dataclass(frozen=True)
class Cell:
    """The groups of one batch size: token rows and the source of each."""

    size: int
    batches: corpora.Batches
    groups: list[tuple[Tensor, list[str]]]

    @property
    def name(self) -> str:
        return f"{self.size}-{self.batches}"

    @property
    def place(self) -> dict[str, Any]:
        return {"batch_size": self.size, "batches": self.batches}

    def task(self, index: int, wanted: list[Key] | None) -> Task:
        return Task(self.name, index, self.groups[index][0].tolist(), wanted)


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Measure, write `report.json` and the figure, and return the report."""
    metrics = read_metrics(options.selector) if options.card else {}
    subject = Subject(options.setup)
    if options.workers > 1 and subject.loaded.input_device.type != "cpu":
        raise OptionError(f"--workers {options.workers} is for a CPU: leave it out, or add --device cpu")
    cells = [read_cell(options, subject, *cell) for cell in options.cells]
    for cell in cells:
        subject.sweeps(cell.size, 0)  # refuses what does not apply to the model before anything is written
    store = Store(Path(options.out), identity(options, subject, cells))
    total = sum(len(cell.groups) for cell in cells)
    with measuring(subject, options.workers) as run:
        for _ in track(finish(cells, store, run, options.setup.levels), "evaluate", total, unit="groups"):
            pass
    report = make_report(options, subject, cells, store)
    store.put("report.json", json.dumps(report, indent=2) + "\n")
    frontier(report, store.folder)
    if options.card:
        folder = Path(options.selector)
        own = [p for p in report["points"] if p["method"] in ("untouched", "learned")]
        write_card(
            folder,
            LynxSelector.from_pretrained(folder),  # what ran has been rounded to the model's precision
            {**metrics, "evaluate": {**report, "points": own}},
            {"run-evaluate.yaml": run_record("evaluate", asdict(options))},
        )
    return report


def read_cell(options: EvaluateOptions, subject: Subject, size: int, batches: corpora.Batches) -> Cell:
    """The text of one cell: as many groups as it takes to score `options.tokens`."""
    scored = size * (options.length - options.prompt - 1)
    most = max(FEWEST_GROUPS, -(-options.tokens // scored))
    tokenizer = subject.loaded.tokenizer
    groups = corpora.decode_groups(
        options.corpus, tokenizer, options.split, size, options.length, most, options.seed, FEWEST_GROUPS, batches
    )
    if len(groups) < most:
        text = f"{options.corpus!r} ({options.split} split)"
        print(f"{text} holds {len(groups) * scored:,} of the {options.tokens:,} tokens asked for in batches of {size}")
    return Cell(size, batches, groups)


def identity(options: EvaluateOptions, subject: Subject, cells: list[Cell]) -> dict[str, Any]:
    """What two runs must have in common for their groups to belong together."""
    selector, text = hashlib.sha256(subject.selector.config.to_json().encode()), hashlib.sha256()
    for name, tensor in sorted(subject.selector.state_dict().items()):
        selector.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    for tokens, names in (group for cell in cells for group in cell.groups):
        text.update(tokens.numpy().tobytes() + "\n".join(names).encode())
    trace = subject.trace and hashlib.sha256(json.dumps(subject.trace.sha256).encode()).hexdigest()
    return {
        **{name: value for name, value in asdict(options).items() if name not in INCIDENTAL},
        "version": __version__,
        "environment": environment(),
        "selector_sha256": selector.hexdigest(),
        "text_sha256": text.hexdigest(),
        "trace_sha256": trace,
    }


def finish(cells: list[Cell], store: Store, run: Run, levels: tuple[float, ...]) -> Iterator[None]:
    """Measure every group that is not stored, and yield once for each group: first groups first, large ones first."""
    cells = sorted(cells, key=lambda cell: -cell.size)
    yield from _store(store, run, [cell.task(0, None) for cell in cells])
    rest = []
    for cell in cells:
        wanted = plan(store.read(cell.name, 0) or [], levels)
        rest += [cell.task(index, wanted) for index in range(1, len(cell.groups))]
    yield from _store(store, run, rest)


def _store(store: Store, run: Run, tasks: list[Task]) -> Iterator[None]:
    missing = [task for task in tasks if store.read(task.cell, task.index) is None]
    yield from [None] * (len(tasks) - len(missing))
    for task, rows in run(missing):
        store.write(task.cell, task.index, rows)
        yield


def make_report(options: EvaluateOptions, subject: Subject, cells: list[Cell], store: Store) -> dict[str, Any]:
    """The report, from what is stored."""
    layer_bytes = torch.tensor([float(layer.expert_bytes) for layer in subject.layers], dtype=torch.float64)
    points: list[dict[str, Any]] = []
    at_loss: dict[str, list[dict[str, Any]]] = {"matched": [], "ratios": []}
    for cell in cells:
        stored = [{key(row): row for row in store.read(cell.name, i) or []} for i in range(len(cell.groups))]
        measured = {k: Measured(cell, [rows[k] for rows in stored], options, layer_bytes) for k in stored[-1]}
        untouched = next(iter(measured.values())).loaded
        points += [m.point(untouched) for m in measured.values()]
        curves: dict[tuple[str, int], list[Measured]] = {}
        for (method, curve, _), m in measured.items():
            if method != "untouched":
                curves.setdefault((method, curve), []).append(m)
        swept = [make_sweep(method, own) for (method, _), own in curves.items()]
        readings = Readings(swept, untouched, options.seed)
        for name, make in (("matched", matched), ("ratios", ratios)):
            at_loss[name] += [{**cell.place, **row} for row in make(readings, list(options.setup.levels))]
    return {
        "environment": environment(),
        "options": asdict(options),
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

    def __init__(self, cell: Cell, rows: list[Row], options: EvaluateOptions, layer_bytes: Tensor) -> None:
        self.cell, self.method, self.curve = cell, rows[0]["method"], rows[0]["curve"]
        losses = torch.tensor([row["losses"] for row in rows], dtype=torch.float64)
        stats = [Stats(**row["stats"]) for row in rows]
        tokens = len(rows) * cell.size * (options.length - options.prompt - 1)
        sources = [names for _, names in cell.groups]
        self.result = Comparison(self.method, rows[0]["setting"], losses, stats, sources, tokens)
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
            by_source = {metric: result.by_source(metric) for metric in METRICS}
            row |= {"by_source": by_source, "worst_source": max(by_source["kl"], key=by_source["kl"].__getitem__)}
        return row


def make_sweep(method: str, measured: list[Measured]) -> Sweep:
    """What is read at equal loss of one curve."""
    experts = [[sum(s.experts_after) / len(s.experts_after) for s in m.result.stats] for m in measured]
    losses = {metric: torch.stack([m.result.group_means(metric) for m in measured]) for metric in METRICS}
    return Sweep(method, losses, torch.tensor(experts).double(), torch.stack([m.loaded for m in measured]))


def margin(values: Tensor) -> float:
    """Half the width of the 95% interval of the mean of independent `values`, by Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1) * values.std() / math.sqrt(len(values)))
