"""`lynx-learn coverage`: does the bound of `calibrate` hold, and how sharp is it?

For each batch size a pool of groups of sequences is measured once, at a grid of thresholds around those of the budgets
(see `pools`). Then the procedure of `calibrate`, by its own functions, is repeated on groups drawn from the pool, and the
loss at the threshold it certifies is read off the pool. Two ways of drawing:

*Re-splits*: the pool is split at random into groups for the pilot, groups that thresholds are tested on, and the rest.
Counted are the splits in which the mean of the rest, and that of the whole pool, exceeds the budget. Neither share is an
estimate of the error that the confidence allows: the rest is a sample with noise of its own, the groups tested are part
of the pool, and the splits share one pool, so they depend on each other and no binomial interval holds for their
number. `exact_levels` says what a procedure that uses up its error exactly would show.

*Bootstrap*: pilot and tested groups are drawn from the pool with replacement. The pool is then the population, its mean
the true one and the draws are independent, so the share of draws whose certified threshold has a true mean above the
budget is a binomial share with a Clopper-Pearson interval; the bound holds if it is no larger than 1 − confidence. It is
smaller where the plan's thresholds stay away from the budget. What the bound does on its own is counted beside it: how
often, at the threshold whose true mean is the budget, it lies below that mean.

With `shift` both are repeated with calibration groups of some sources and test groups of others, where nothing is
guaranteed. No two groups of a pool share a document, in `calibrate` as here, so to draw groups is to draw documents.
What is guaranteed of a cell is all that `calibrate` guards there: the mean, that of the last quarter of the positions,
and with `worst-source` that of every source. Draws from the same pools say beside it, for every guarantee and for several
numbers of groups, how often what it promises fails anywhere (see `guarantees`).
"""

import itertools
import json
import math
from collections import Counter
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..decode.served import ServedText, TextOptions
from ..errors import OptionError
from ..files import check_writable, write_json
from ..moe.loading import LoadedModel, load_base
from ..parts import ShareOptions, deciding, in_workers
from ..selector.saving import read_metrics, run_record, write_card
from ..selector.selector import LynxSelector
from ..show.progress import track
from ..traces.corpus import BUILT_IN, Split, open_sources
from ..traces.groups import Group
from .bound import Bound, clopper_pearson, exact_levels, last_within, plan, rising, threshold_at, upper_bound
from .calibrate import (
    FEWEST_GROUPS,
    PILOT_GROUPS,
    CalibrateOptions,
    Guarantee,
    check_groups,
    pilot_thresholds,
    shares,
)
from .pools import Meter, Pool

# Groups that a threshold is tested on, of the calibrations that `guarantees` draws.
TESTED_GROUPS = (8, 16, 32, 64)


@dataclass(frozen=True)
class CoverageOptions(TextOptions, ShareOptions):
    """Repeat the calibration on many random splits, to see whether its bound holds and how sharp it is."""

    selector: str
    """selector folder or Hub id; it needs no thresholds"""
    out: str
    """folder for coverage.json and the measured pools; a run that was broken off goes on there"""
    split: list[Split] = field(default_factory=lambda: ["calibrate", "test"])
    """parts of the corpus to read, by document"""
    budgets: list[float] = field(default_factory=lambda: [0.01, 0.03])
    """budgets, as in calibrate"""
    metric: Literal["kl", "nll", "agreement"] = "kl"
    """what a budget counts, as in calibrate"""
    guarantee: Guarantee = "cell"
    """what holds together at the confidence in the splits, as in calibrate; all of them are drawn beside it"""
    batch_sizes: list[int] = field(default_factory=lambda: [8, 32])
    """decode batch sizes"""
    confidence: float = 0.95
    """confidence of the bound, as in calibrate"""
    groups: int = 96
    """groups measured for a batch size; with shift as many again, two thirds of them to calibrate"""
    calibration_groups: int = 24
    """groups drawn for one calibration, the 4 that choose thresholds included"""
    resplits: int = 200
    """random splits of the pool"""
    bootstraps: int = 2000
    """independent draws from the pool"""
    shift: dict[str, list[str]] | None = None
    """sources to calibrate on and others to test on, such as {"calibrate": ["code"], "test": ["prose"]}"""
    card: bool = False
    """also put the figures into the selector's card"""
    _: KW_ONLY
    corpus: str = BUILT_IN
    """text of the pools; must not be text that the selector was fitted on"""
    seed: int = 3
    """seed of the documents, the sampling and the draws"""

    def __post_init__(self) -> None:
        check_groups("calibration_groups", self.calibration_groups)
        if self.mode == "skipping":
            raise OptionError("--mode skipping is not usable here: expected generate or teacher")
        self.procedure(), self.share  # refuse what cannot be used
        fewest = self.calibration_groups + FEWEST_GROUPS
        if self.groups < fewest:
            raise OptionError(
                f"--groups {self.groups} is not usable: expected {fewest} or more, {self.calibration_groups} to calibrate "
                f"and {FEWEST_GROUPS} to test"
            )
        for name in ("resplits", "bootstraps"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)} is not usable: expected 1 or more")
        if not self.split or len(self.split) > len(set(self.split)) or ("all" in self.split and len(self.split) > 1):
            raise OptionError(
                f"--split {' '.join(self.split) or '(nothing)'} is not usable: expected different splits, or all alone"
            )
        if self.shift is not None:
            self._check_shift(self.shift)

    def _check_shift(self, shift: dict[str, list[str]]) -> None:
        if (
            set(shift) != {"calibrate", "test"}
            or not all(shift.values())
            or set(shift["calibrate"]) & set(shift["test"])
        ):
            raise OptionError(
                f'--shift {json.dumps(shift)} is not usable: expected {{"calibrate": [sources], "test": [other sources]}}'
            )
        fewest = math.ceil(3 * (self.calibration_groups + PILOT_GROUPS) / 2)
        if self.groups < fewest:
            raise OptionError(
                f"--groups {self.groups} is not usable with --shift: expected {fewest} or more, so that two thirds of them, "
                "which are calibrated on, can be split in different ways"
            )

    def procedure(self) -> CalibrateOptions:
        """The options of the calibration that is repeated."""
        return CalibrateOptions(
            self.selector,
            budgets=self.budgets,
            metric=self.metric,
            guarantee=self.guarantee,
            batch_sizes=self.batch_sizes,
            confidence=self.confidence,
            groups=self.calibration_groups,
            **{f.name: getattr(self, f.name) for f in fields(TextOptions)},
        )

    @property
    def text(self) -> ServedText:
        """What the losses are measured on."""
        return self.served(*self.split)


@in_workers
def coverage(options: CoverageOptions) -> dict[str, Any]:
    """Measure what is not measured yet, draw, write `coverage.json`, and return it.

    Raises:
        Unfinished: this process's passes are measured, and those of others are not all there.
    """
    share = options.share
    metrics = read_metrics(options.selector) if options.card else {}
    for place in (options.out, *([options.selector] if options.card else [])):
        check_writable(Path(place))
    check_sources(options)
    selector = LynxSelector.from_pretrained(options.selector)
    loaded = load_base(
        options.model, selector.config.base_model, selector.config.base_revision, options.device, options.dtype
    )
    meter = Meter(Path(options.out), options.procedure(), selector, loaded, share)
    # All text before the first measurement, so that too little of it is found out at once.
    texts = [read_texts(options, loaded, size) for size in sorted(set(options.batch_sizes))]
    measured: list[list[Pool | None]] = []
    for whole, *shifted in texts:
        measured.append([meter.pool(whole)])
        if shifted:
            measured[-1] += [meter.pool(shifted[0]), meter.pool(shifted[1], meter.thresholds)]
    share.check_all_there(meter.missing, meter.parts, "passes", Path(options.out))
    with share.alone(Path(options.out)):
        return put_together(options, selector.config.base_model, texts, measured, metrics)


def put_together(
    options: CoverageOptions,
    base_model: str,
    texts: list[list[list[Group]]],
    measured: list[list[Pool | None]],
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """Draw from the pools of each batch size, which are all there, and write the report."""
    rows: list[dict[str, Any]] = []
    pools: list[tuple[int, Pool]] = []
    sources: Counter[str] = Counter()
    steps = track(list(zip(texts, measured, strict=True)), "coverage: draws", len(texts), unit="batch sizes")
    for (whole, *_), found in steps:
        size = len(whole[0][1])
        sources.update(name for _, names in whole for name in names)
        complete = [part for part in found if part is not None]
        pools.append((size, complete[0]))
        pool, *shifted = [part.guarding(options.guarantee) for part in complete]
        rows += figures(pool, None, options, size)
        if shifted:
            first, second = shifted
            rows += figures(first, second, options, size)
    tested = options.calibration_groups - PILOT_GROUPS
    report = {
        "options": deciding(options),
        "base_model": base_model,
        "sources": shares(sources),
        "exact": exact_levels(tested, options.groups - options.calibration_groups, options.groups, options.confidence),
        "rows": sorted(rows, key=lambda row: row["shift"]),
        "guarantees": guarantees(pools, options),
    }
    write_json(Path(options.out) / "coverage.json", report)
    if options.card:
        folder = Path(options.selector)
        write_card(
            folder,
            LynxSelector.from_pretrained(folder),  # what ran has been rounded to the model's precision
            {**metrics, "coverage": report},
            {"run-coverage.yaml": run_record("coverage", deciding(options))},
        )
    return report


def check_sources(options: CoverageOptions) -> None:
    """Refuse a shift between sources that the corpus has not.

    Raises:
        OptionError: with those it has.
    """
    if not options.shift:
        return
    streams = (stream for split in options.split for stream in open_sources(options.corpus, split))
    known = sorted({document.source for stream in streams for document in islice(stream, 1)})
    if unknown := sorted({name for names in options.shift.values() for name in names} - set(known)):
        raise OptionError(
            f"--shift names {', '.join(unknown)}, which corpus {options.corpus!r} does not hold in these splits: expected "
            f"some of {', '.join(known)}"
        )


def read_texts(options: CoverageOptions, loaded: LoadedModel, size: int) -> list[list[Group]]:
    """The groups of one batch size: of all sources; with a shift, also of the sources of either side.

    Raises:
        CorpusError: there is too little text.
    """
    parts: list[tuple[list[str] | None, int]] = [(None, options.groups)]
    if options.shift:
        first = options.groups * 2 // 3
        parts += [(options.shift["calibrate"], first), (options.shift["test"], options.groups - first)]
    return [read_groups(options, loaded, size, sources, count) for sources, count in parts]


def read_groups(
    options: CoverageOptions, loaded: LoadedModel, size: int, sources: list[str] | None, count: int
) -> list[Group]:
    """`count` groups of `size` sequences of these sources, without a common document.

    Raises:
        CorpusError: there is too little text.
    """
    units = options.text.units(loaded, [(size, count)], sources)
    return options.text.groups(loaded, units, size, count, count)


class Outcome(NamedTuple):
    """One re-split and budget: what was certified (zeros: nothing), and what it loses and reads on other groups."""

    threshold: float
    upper: float
    test: float
    """Mean loss of the groups that were not used; of all that is guarded the largest."""
    whole: float
    """The same of all groups."""
    bytes: float


def recertify(
    pool: Pool, pilot: Tensor, tested: Tensor, options: CoverageOptions, size: int, bound: Bound
) -> dict[float, tuple[float, float]]:
    """What `calibrate` certifies from these groups of the pool: threshold and largest bound for each budget."""
    confidence = options.procedure().confidence_of_each
    known = set(pool.thresholds.tolist())
    taus = [tau for tau in pilot_thresholds(options.budgets, size) if tau in known]
    curve = rising(taus, [float(pool.losses_at(tau, pilot)[0].mean()) for tau in taus])

    def uppers(tau: float) -> list[float]:
        return [bound(values, confidence) for values in pool.losses_at(tau, tested)]

    found = {}
    for budget, planned in plan(curve, options.budgets).items():
        tau, upper = last_within(planned, uppers, budget)
        found[budget] = (tau, max(upper, default=0.0))
    return found


def resplit(
    pool: Pool, other: Pool | None, options: CoverageOptions, size: int, bound: Bound = upper_bound
) -> dict[float, list[Outcome]]:
    """Calibrate on random groups of the pool and test on its other groups, or on all of the `other` pool."""
    generator = torch.Generator().manual_seed(options.seed)
    found: dict[float, list[Outcome]] = {budget: [] for budget in sorted(options.budgets)}
    for _ in range(options.resplits):
        order = torch.randperm(pool.groups, generator=generator)
        pilot, tested, rest = order.tensor_split([PILOT_GROUPS, options.calibration_groups])
        for budget, (tau, upper) in recertify(pool, pilot, tested, options, size, bound).items():
            target = other or pool
            test = target.worst_at(tau) if other else target.worst_at(tau, rest)
            outcome = (test, target.worst_at(tau), float(target.bytes_at(tau).mean()))
            found[budget].append(Outcome(tau, upper, *outcome))
    return found


class Draws(NamedTuple):
    """What calibrations on independent draws from a pool came to, of one budget."""

    over: Tensor
    """(bootstraps,), whether the certified threshold has a true mean above the budget, of anything that is guarded."""
    missed: int
    """Draws whose bound, at the threshold that loses the budget, lies below the true mean."""
    bytes: float
    """Read at the certified threshold, mean over the draws."""
    least_bytes: float
    """Read at the largest threshold that keeps the budget, which one would take who knew the true means."""


def bootstrap(
    pool: Pool, other: Pool | None, options: CoverageOptions, size: int, bound: Bound = upper_bound
) -> dict[float, Draws]:
    """Calibrate on independent draws from the pool, which stands for the population that its groups came from.

    Args:
        other: where given, its means are those that certified thresholds have to keep within the budget.
    """
    generator = torch.Generator().manual_seed(options.seed)
    over = {budget: torch.zeros(options.bootstraps, dtype=torch.bool) for budget in sorted(options.budgets)}
    missed = dict.fromkeys(over, 0)
    points = pool.thresholds.tolist()[1:]
    whole = rising(points, [float(pool.losses_at(tau)[0].mean()) for tau in points])
    at_budget = {budget: threshold_at(whole, budget) for budget in over}
    true = {budget: float(pool.losses_at(tau)[0].mean()) for budget, tau in at_budget.items()}
    worst = rising(points, [pool.worst_at(tau) for tau in points])
    least = {budget: float(pool.bytes_at(threshold_at(worst, budget)).mean()) for budget in over}
    read = dict.fromkeys(over, 0.0)
    for draw in range(options.bootstraps):
        chosen = torch.randint(pool.groups, (options.calibration_groups,), generator=generator)
        pilot, tested = chosen.tensor_split([PILOT_GROUPS])
        for budget, (tau, _) in recertify(pool, pilot, tested, options, size, bound).items():
            over[budget][draw] = (other or pool).worst_at(tau) > budget
            read[budget] += float(pool.bytes_at(tau).mean())
            missed[budget] += bound(pool.losses_at(at_budget[budget], tested)[0], options.confidence) < true[budget]
    return {b: Draws(over[b], missed[b], read[b] / options.bootstraps, least[b]) for b in over}


def guarantees(pools: list[tuple[int, Pool]], options: CoverageOptions) -> list[dict[str, Any]]:
    """For every guarantee, calibrated on several numbers of groups: how often what it promises fails, in independent draws.

    A promise covers one cell, all sizes of a budget, or everything; of several the one that fails most often is counted.
    """
    steps = list(itertools.product(get_args(Guarantee), TESTED_GROUPS))
    rows = []
    for guarantee, tested in track(steps, "coverage of guarantees", len(steps), unit="rows"):
        count = tested + PILOT_GROUPS
        own = replace(options, guarantee=guarantee, calibration_groups=count, groups=count + FEWEST_GROUPS, shift=None)
        drawn = [bootstrap(pool.guarding(guarantee), None, own, size) for size, pool in pools]
        cells = [cell for found in drawn for cell in found.values()]
        promises = [cell.over for cell in cells]
        if guarantee == "sizes":
            promises = [torch.stack([found[b].over for found in drawn]).any(0) for b in sorted(options.budgets)]
        elif guarantee == "all":
            promises = [torch.stack(promises).any(0)]
        fails, missed = max(int(over.sum()) for over in promises), max(cell.missed for cell in cells)
        rows.append(
            {
                "guarantee": guarantee,
                "groups": tested,
                "true_over": fails / options.bootstraps,
                "true_over_interval": clopper_pearson(fails, options.bootstraps),
                "bound_misses": missed / options.bootstraps,
                "bound_misses_interval": clopper_pearson(missed, options.bootstraps),
                "bytes": mean([cell.bytes for cell in cells]),
                "least_bytes": mean([cell.least_bytes for cell in cells]),
            }
        )
    return rows


def figures(pool: Pool, other: Pool | None, options: CoverageOptions, size: int) -> list[dict[str, Any]]:
    """One row of the report per budget; means are over the re-splits that certified something."""
    drawn = bootstrap(pool, other, options, size)
    rows = []
    for budget, outcomes in resplit(pool, other, options, size).items():
        over, missed = int(drawn[budget].over.sum()), drawn[budget].missed
        certified = [o for o in outcomes if o.threshold > 0]
        rows.append(
            {
                "shift": other is not None,
                "batch_size": size,
                "budget": budget,
                "groups": pool.groups,
                "test_groups": other.groups if other else pool.groups - options.calibration_groups,
                "test_over": sum(o.test > budget for o in outcomes) / len(outcomes),
                "pool_over": sum(o.whole > budget for o in outcomes) / len(outcomes),
                "true_over": over / options.bootstraps,
                "true_over_interval": clopper_pearson(over, options.bootstraps),
                "bound_misses": missed / options.bootstraps,
                "bound_misses_interval": clopper_pearson(missed, options.bootstraps),
                "nothing": 1 - len(certified) / len(outcomes),
                "test_share": mean([o.test / budget for o in certified]),
                "upper_share": mean([o.upper / budget for o in certified]),
                "bytes": mean([o.bytes for o in certified]),
            }
        )
    return rows


def mean(values: list[float]) -> float | None:
    """None of no values."""
    return sum(values) / len(values) if values else None
