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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..decode.served import ServedText, TextOptions
from ..errors import OptionError
from ..files import check_writable
from ..moe.loading import LoadedModel, versions
from ..parts import ALL, Share, ShareOptions, deciding, in_workers
from ..rules.grids import METHODS
from ..selector.saving import read_metrics, run_record, write_card
from ..selector.selector import LynxSelector
from ..show.figures import frontier
from ..show.progress import track
from ..traces.corpus import BUILT_IN, Split, check_corpus
from ..traces.groups import Batches
from .report import Cell, Store, make_report
from .sweeps import Setup, Subject, Task, measure, plan

FEWEST_GROUPS = 8
# Options that do not decide what is measured.
INCIDENTAL = ("out", "card")


@dataclass(frozen=True)
class EvaluateOptions(TextOptions, ShareOptions):
    """Measure loss and savings of methods on test text, and compare them at equal loss."""

    selector: str
    """selector folder or Hub id"""
    out: str
    """folder for the report; a run that was broken off goes on there"""
    trace: str | None = None
    """trace of the same model, for rules that need statistics of its experts"""
    split: Split = "test"
    """part of the corpus to read, by document"""
    skipping_budget: float = 0.01
    """budget at which text is sampled in mode skipping"""
    methods: list[str] = field(default_factory=lambda: ["random", "xshare", "gate_sq", "learned"])
    """methods to measure; untouched is always there; none: only the calibrated thresholds, without a sweep"""
    batch_sizes: list[int] = field(default_factory=lambda: [16])
    """decode batch sizes"""
    batches: list[str] = field(default_factory=lambda: ["mixed"])
    """mixed draws each batch from all sources, single from one; single:16 is for batches of 16 only"""
    tokens: int = 50_000
    """decode tokens scored for each point, at least; at least 8 groups of sequences are"""
    levels: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03])
    """losses in nats per token at which methods are compared"""
    card: bool = False
    """also put the figures into the selector's card"""
    _: KW_ONLY
    corpus: str = BUILT_IN
    """test text; must be used for nothing else"""
    seed: int = 2
    """seed of the grouping, the random rule and the intervals"""

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "batches", "levels"):
            if not getattr(self, name):
                raise OptionError(f"--{name} is empty: expected one value or more")
        for method in self.methods:
            if method not in METHODS:
                raise OptionError(f"--methods {method} is unknown: expected some of {', '.join(METHODS)}")
        if self.tokens < 1:
            raise OptionError(f"--tokens {self.tokens} is not usable: expected 1 or more")
        for level in self.levels:
            if not (level > 0 and math.isfinite(level)):
                raise OptionError(f"--levels {level:g} is not usable: expected numbers above 0")
        self.text, self.share  # noqa: B018  # refuse what cannot be used
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
    def text(self) -> ServedText:
        """What the losses are measured on."""
        return self.served(self.split)

    @property
    def cells(self) -> list[tuple[int, Batches]]:
        """Batch size and kind of batches of each cell, in the order of the report."""
        wanted = {(kind, size) for kind, _, size in (text.partition(":") for text in self.batches)}
        kinds: tuple[Batches, ...] = ("mixed", "single")
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


@in_workers
def evaluate(options: EvaluateOptions, loaded: LoadedModel | None = None) -> dict[str, Any]:
    """Measure, write `report.json` and the figure, and return the report.

    Args:
        loaded: the model that the options name, where it is loaded already.

    Raises:
        Unfinished: this process's groups are measured, and those of others are not all there.
    """
    share = options.share
    metrics = read_metrics(options.selector) if options.card else {}
    for place in (options.out, *([options.selector] if options.card else [])):
        check_writable(Path(place))
    check_corpus(options.corpus)
    subject = Subject(options.setup, loaded)
    if not (options.methods or subject.budgeted()):
        raise OptionError(
            f"--methods is empty and {options.selector} has no thresholds: run `lynx-learn calibrate` first"
        )
    cells = [read_cell(options, subject, *cell) for cell in options.cells]
    for cell in cells:
        subject.sweeps(cell.size, 0)  # refuses what does not apply to the model before anything is written
    store = Store(Path(options.out), identity(options, subject, cells), share.by)
    own = sum(len(part) for part in parts(cells, share.own))
    if not share.merge:
        for _ in track(finish(cells, store, subject, share), "evaluate", own, unit="groups"):
            pass
    first, rest = parts(cells, range)
    missing = [i for part in (first, rest) for i, task in enumerate(part) if store.read(*task) is None]
    share.check_all_there(missing, len(first) + len(rest), "groups", store.folder)
    with share.alone(store.folder):
        return put_together(options, subject, cells, store, metrics)


def put_together(
    options: EvaluateOptions, subject: Subject, cells: list[Cell], store: Store, metrics: dict[str, Any]
) -> dict[str, Any]:
    """Write and return the report of what is stored; also put it beside `metrics` into the card, if it is to be there."""
    report = make_report(deciding(options), subject, cells, store)
    store.put_json("report.json", report)
    frontier(report, store.folder)
    if options.card:
        folder = Path(options.selector)
        own = [p for p in report["points"] if p["method"] in ("untouched", "learned")]
        write_card(
            folder,
            LynxSelector.from_pretrained(folder),  # what ran has been rounded to the model's precision
            {**metrics, "evaluate": {**report, "points": own}},
            {"run-evaluate.yaml": run_record("evaluate", deciding(options))},
        )
    return report


def read_cell(options: EvaluateOptions, subject: Subject, size: int, batches: Batches) -> Cell:
    """The text of one cell: as many groups as it takes to score `options.tokens`, if no sequence ends early."""
    scored = size * (options.length - options.prompt - 1)
    most = max(FEWEST_GROUPS, -(-options.tokens // scored))
    text, loaded = options.text, subject.loaded
    units = text.units(loaded, [(size, most)], batches=batches)
    groups = text.groups(loaded, units, size, most, FEWEST_GROUPS, batches)
    if options.mode == "skipping":
        skipping = subject.selector.policy(options.skipping_budget, prices=subject.selector.calibrated_prices())
        groups = text.while_skipping(loaded, groups, skipping)
    if len(groups) < most:
        print(
            f"{text.name} holds {len(groups) * scored:,} of the {options.tokens:,} tokens asked for in batches of {size}"
        )
    return Cell(size, batches, [(tokens.cpu(), names) for tokens, names in groups], text.ends(loaded))


def identity(options: EvaluateOptions, subject: Subject, cells: list[Cell]) -> dict[str, Any]:
    """What two runs must have in common for their groups to belong together."""
    selector, text = hashlib.sha256(subject.selector.config.to_json().encode()), hashlib.sha256()
    for name, tensor in sorted(subject.selector.state_dict().items()):
        selector.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    for tokens, names in (group for cell in cells for group in cell.groups):
        text.update(tokens.numpy().tobytes() + "\n".join(names).encode())
    trace = subject.trace and hashlib.sha256(json.dumps(subject.trace.sha256).encode()).hexdigest()
    return {
        **{name: value for name, value in deciding(options).items() if name not in INCIDENTAL},
        "version": __version__,
        "versions": versions(),
        "selector_sha256": selector.hexdigest(),
        "text_sha256": text.hexdigest(),
        "trace_sha256": trace,
    }


def parts(cells: list[Cell], chosen: Callable[[int], Iterable[int]]) -> list[list[tuple[str, int]]]:
    """Cell and index of the first groups, which decide what is measured on the others, and of those others.

    Args:
        chosen: which places of a list to take, by its length.
    """
    cells = by_size(cells)
    first = [(cell.name, 0) for cell in cells]
    rest = [(cell.name, index) for cell in cells for index in range(1, len(cell.groups))]
    return [[part[i] for i in chosen(len(part))] for part in (first, rest)]


def by_size(cells: list[Cell]) -> list[Cell]:
    """Large ones first: what takes longest shall not be last."""
    return sorted(cells, key=lambda cell: -cell.size)


def finish(cells: list[Cell], store: Store, subject: Subject, share: Share = ALL) -> Iterator[None]:
    """Measure this process's groups that are not stored, and yield once for each: first groups first.

    Everybody needs all first groups, and measures those that nobody has measured when it comes to them.
    """
    known = {cell.name: cell for cell in cells}
    own_first, own = parts(cells, share.own)
    yield from _store(store, subject, [known[name].task(index, None) for name, index in own_first])
    for name, index in parts(cells, share.own_first)[0]:
        for _ in _store(store, subject, [known[name].task(index, None)]):
            pass
    wanted = {name: plan(store.read(name, 0) or [], subject.setup.levels) for name in known}
    yield from _store(store, subject, [known[name].task(index, wanted[name]) for name, index in own])


def _store(store: Store, subject: Subject, tasks: list[Task]) -> Iterator[None]:
    for task in tasks:
        if store.read(task.cell, task.index) is None:
            store.write(task.cell, task.index, measure(subject, task))
        yield
