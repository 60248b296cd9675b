"""`lynx-learn calibrate`: the largest threshold whose loss stays within a budget, with confidence.

Learn then Test (Angelopoulos et al., arXiv 2110.01052) with fixed-sequence testing: thresholds are chosen on pilot
groups, then tested in increasing order on other groups, and the last one before the first failure is taken. The test of
one threshold is a one-sided upper confidence bound of the mean loss (`bound.upper_bound`); the unit is a group of
sequences decoded together, and no two groups share a document. Both the mean over all scored positions and that over
the last quarter of them have to stay within the budget. The bound is asymptotic in the number of groups, and holds for
text like the calibration text, by default what the model itself writes when it is sampled.
"""

import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..decode.real import RealDecode
from ..decode.served import ServedText, TextOptions
from ..decode.simulate import Comparison, Simulation
from ..errors import OptionError
from ..files import PART, RunFolder, check_writable, read_object
from ..moe.families import MoeLayer, find_moe_layers
from ..moe.loading import LoadedModel, load_base, versions
from ..parts import Share, ShareOptions, deciding, in_workers
from ..selector.prices import read_prices
from ..selector.saving import is_made_by, read_metrics, run_record, write_card
from ..selector.selector import LynxSelector, ThresholdPolicy
from ..show.progress import track
from ..traces.corpus import BUILT_IN, Split, check_corpus
from ..traces.groups import Group
from .bound import BOUND, Curve, count_bound, last_within, plan, rising, upper_bound

# The pilot's thresholds go down from twice the largest budget times the root of the batch size, by this factor.
PILOT_STEP, PILOT_POINTS = 3.0, 8
PILOT_GROUPS = 4
FEWEST_GROUPS = 8

Guarantee = Literal["cell", "sizes", "all", "worst-source"]


@dataclass(frozen=True)
class CalibrateOptions(TextOptions, ShareOptions):
    """Find the thresholds that keep the loss within quality budgets, with confidence."""

    selector: str
    """selector folder; its thresholds for this metric are replaced"""
    split: Split = "calibrate"
    """part of the corpus to read, by document"""
    budgets: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03])
    """budgets to find thresholds for, in units of the metric per token"""
    metric: Literal["kl", "nll", "agreement"] = "kl"
    """what a budget counts: kl (nats), nll (rise of the loss, nats) or agreement (share of changed greedy tokens)"""
    guarantee: Guarantee = "cell"
    """what holds together at the confidence: each budget and batch size on its own (cell), all sizes of a budget (sizes),
    all sizes and budgets (all), or each source of each cell (worst-source)"""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 16, 64])
    """decode batch sizes to find thresholds for; in between they are interpolated"""
    speculative_tokens: int = 0
    """drafts that a server will verify with each sequence's next token: a decode batch then holds that many positions more of
    each sequence, and its threshold goes by all of its tokens"""
    prices: str = "uniform"
    """what reading each expert costs, as where the selector will be used: uniform, bytes, residency:SHARE (of the experts
    that fast memory holds) or devices:COUNT (experts in equal blocks on devices that read side by side)"""
    confidence: float = 0.95
    """confidence of the bound"""
    groups: int = 64
    """groups measured for a batch size, at most; 4 of them choose thresholds, the others test them"""
    tokens: int = 60_000
    """tokens measured for a batch size, at most; but 12 groups are, whatever they hold"""
    _: KW_ONLY
    corpus: str = BUILT_IN
    """calibration text; must not be text that the selector was fitted on, nor test text"""
    length: int = 512
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
        check_groups("groups", self.groups)
        read_prices(self.prices)
        self.text, self.share  # noqa: B018  # refuse what cannot be used
        if self.speculative_tokens < 0:
            raise OptionError(f"--speculative_tokens {self.speculative_tokens} is not usable: expected 0 or more")
        if over := (self.length - self.prompt) % self.together:
            raise OptionError(
                f"--length {self.length} is not usable with --speculative_tokens {self.speculative_tokens}: expected --prompt "
                f"and a multiple of {self.together} tokens, such as {self.length - over}"
            )

    @property
    def text(self) -> ServedText:
        """What the losses are measured on."""
        return self.served(self.split)

    @property
    def together(self) -> int:
        """Tokens of each sequence in a decode batch."""
        return 1 + self.speculative_tokens

    @property
    def confidence_of_each(self) -> float:
        """Of a single bound, so that what is guaranteed together holds at `confidence` (Bonferroni)."""
        together = {"sizes": len(self.batch_sizes), "all": len(self.batch_sizes) * len(self.budgets)}
        return 1 - (1 - self.confidence) / together.get(self.guarantee, 1)

    def at(self, selector: LynxSelector, threshold: float) -> ThresholdPolicy:
        """The policy that is measured at a threshold."""
        return selector.at_threshold(threshold, prices=read_prices(self.prices))

    def most_groups(self, size: int) -> int:
        """Groups of `size` sequences that are measured."""
        return max(FEWEST_GROUPS + PILOT_GROUPS, min(self.groups, self.tokens // (size * self.length)))


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


@in_workers
def calibrate(options: CalibrateOptions, loaded: LoadedModel | None = None) -> LynxSelector:
    """Find the thresholds and write them into the selector directory.

    What is found for a batch size is written at once, and a run that was broken off goes on with the next one.

    Args:
        loaded: the model that the options name, where it is loaded already.

    Raises:
        Unfinished: this process's batch sizes are done, and those of others are not all there.
    """
    folder, share = Path(options.selector), options.share
    metrics = read_metrics(folder)

    def is_done() -> bool:
        shared = share.world_size > 1 or share.merge
        return shared and is_made_by(folder, run_record("calibrate", deciding(options)), record_name(options))

    if is_done():
        return LynxSelector.from_pretrained(folder)
    check_writable(folder)
    check_corpus(options.corpus)
    selector = LynxSelector.from_pretrained(options.selector)
    loaded = loaded or load_base(
        options.model, selector.config.base_model, selector.config.base_revision, options.device, options.dtype
    )
    layers = find_moe_layers(loaded.model)
    selector.check(layers, loaded.model)
    cells: dict[str, dict[str, dict[str, Any]]] = {str(b): {} for b in sorted(options.budgets)}
    sources: Counter[str] = Counter()
    given = read_groups(options, loaded, sorted(set(options.batch_sizes)))
    decode = RealDecode(loaded.model, layers, given[usual_size(given)][0][0], options.prompt)
    # Large batches first: what takes longest shall not be last.
    found = SizesFound(options, selector, given, str(layers[0].dtype), share)
    sizes = sorted(given, reverse=True)
    wanted = [sizes[i] for i in share.own(len(sizes)) if found.read(sizes[i]) is None]
    for size in track(wanted, "calibrate", len(wanted), unit="batch sizes"):
        found.write(size, certify(loaded, layers, selector, given[size], options))
    missing = [i for i, size in enumerate(sizes) if found.read(size) is None]
    if is_done():  # by another process meanwhile
        return LynxSelector.from_pretrained(folder)
    share.check_all_there(missing, len(sizes), "batch sizes", found.folder)
    with share.alone(found.folder):
        for size, groups in given.items():
            sources.update(name for _, names in groups for name in names)
            for budget, cell in (found.read(size) or {}).items():
                cells[budget][str(size * options.together)] = cell
        usual = str(usual_size(given) * options.together)
        real = decode_one(decode, selector, {b: row[usual] for b, row in cells.items()}, options)
        figures = {"bound": BOUND, "cells": cells, "floor": asdict(decode.floor(options.metric)), "real": real}
        metrics["calibrate"] = {**metrics.get("calibrate", {}), options.metric: figures}
        limits = {
            "confidence": options.confidence,
            "guarantee": options.guarantee,
            "prices": read_prices(options.prices).describe(),
            "speculative_tokens": options.speculative_tokens,
            **options.text.describe(loaded),
            "sources": shares(sources),
        }
        selector = write_thresholds(options, metrics, limits)
        shutil.rmtree(found.folder, ignore_errors=True)
    return selector


def write_thresholds(options: CalibrateOptions, metrics: dict[str, Any], limits: dict[str, Any]) -> LynxSelector:
    """Write the thresholds of what was measured into the selector's directory, with what they are certified for."""
    # Read again: what ran has been rounded to the precision that the model was loaded in.
    selector = LynxSelector.from_pretrained(options.selector)
    config, cells = selector.config, metrics["calibrate"][options.metric]["cells"]
    thresholds = {b: {n: cell["threshold"] for n, cell in row.items()} for b, row in cells.items()}
    selector = selector.with_config(
        thresholds={**config.thresholds, options.metric: thresholds},
        calibration={**config.calibration, options.metric: limits},
    )
    record = run_record("calibrate", deciding(options))
    write_card(Path(options.selector), selector, metrics, {record_name(options): record})
    return selector


def record_name(options: CalibrateOptions) -> str:
    """The file that says how the thresholds of a metric were found."""
    return f"run-calibrate-{options.metric}.yaml"


class SizesFound(RunFolder):
    """What is found for each batch size, in a folder beside the selector's files that goes away at the end.

    Raises:
        OptionError: it holds that of another calibration, or cannot be written to.
    """

    def __init__(
        self, options: CalibrateOptions, selector: LynxSelector, given: dict[int, list[Group]], dtype: str, share: Share
    ) -> None:
        weights, text = hashlib.sha256(), hashlib.sha256()
        for name, tensor in sorted(selector.state_dict().items()):
            weights.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        for tokens, names in (group for groups in given.values() for group in groups):
            text.update(tokens.cpu().numpy().tobytes() + "\n".join(names).encode())
        decided = {
            name: value for name, value in deciding(options).items() if name not in ("selector", "model", "device")
        }
        identity = {
            **decided,
            "computed_in": dtype,
            "versions": versions(),
            "selector_sha256": weights.hexdigest(),
            "text_sha256": text.hexdigest(),
        }
        folder = Path(options.selector) / f".calibrate-{options.metric}{PART}"
        super().__init__(folder, identity, "a calibration", share.by)

    def read(self, size: int) -> dict[str, dict[str, Any]] | None:
        """The cells of a batch size by budget, or None; a damaged file counts as none."""
        return read_object(self.folder / f"batch-{size:05d}.json") or None

    def write(self, size: int, cells: dict[float, dict[str, Any]]) -> None:
        self.put_json(f"batch-{size:05d}.json", {str(budget): cell for budget, cell in cells.items()})


def read_groups(options: CalibrateOptions, loaded: LoadedModel, sizes: list[int]) -> dict[int, list[Group]]:
    """The groups of each batch size, all out of one draw of documents.

    Raises:
        CorpusError: there is too little text.
    """
    text = options.text
    units = text.units(loaded, [(size, options.most_groups(size)) for size in sizes])
    fewest = FEWEST_GROUPS + PILOT_GROUPS
    return {size: text.groups(loaded, units, size, options.most_groups(size), fewest) for size in sizes}


def usual_size(sizes: Collection[int]) -> int:
    """The batch size of which one group is decoded for real: the largest up to 16, which is quick."""
    return max((size for size in sizes if size <= 16), default=min(sizes))


def decode_one(
    decode: RealDecode, selector: LynxSelector, cells: dict[str, dict[str, Any]], options: CalibrateOptions
) -> dict[str, Any] | None:
    """What the group loses, simulated and for real, at the threshold of the largest budget; None where nothing skips."""
    skipping = [(budget, cell["threshold"]) for budget, cell in cells.items() if cell["threshold"] > 0]
    if not skipping:
        return None
    budget, tau = skipping[-1]
    simulated, real = decode.compare(options.at(selector, tau), options.metric)
    return {"budget": budget, "simulated": simulated, "real": real}


def shares(counts: Counter[str]) -> dict[str, float]:
    """Each source's share of what was counted, by name."""
    return {name: count / counts.total() for name, count in sorted(counts.items())}


def certify(
    loaded: LoadedModel,
    layers: list[MoeLayer],
    selector: LynxSelector,
    groups: Sequence[Group],
    options: CalibrateOptions,
) -> dict[float, dict[str, Any]]:
    """For each budget the certified threshold of one batch size, with what was measured at it."""
    pilot, rest = groups[:PILOT_GROUPS], list(groups[PILOT_GROUPS:])
    planned = plan(pilot_curve(loaded, layers, selector, pilot, options, max(options.budgets)), options.budgets)
    simulation = Simulation(loaded.model, layers, options.prompt, options.text.ends(loaded), options.together)

    def measure(taus: list[float], tested: list[Group]) -> dict[float, Comparison]:
        return dict(zip(taus, simulation.compare(tested, [options.at(selector, tau) for tau in taus]), strict=True))

    found = {}
    if options.mode == "skipping":
        for budget, taus in planned.items():
            # Text as the largest of them leaves it, which is the furthest from untouched.
            results = measure(taus, options.text.while_skipping(loaded, rest, options.at(selector, taus[-1])))
            found[budget] = taken(results, taus, budget, options)
        return found
    results = {}
    # Every budget's next threshold at a time: what comes after the first failure is not asked for.
    while wanted := {tau for budget, taus in planned.items() for tau in next_tested(results, taus, budget, options)}:
        results |= measure(sorted(wanted), rest)
    return {budget: taken(results, taus, budget, options) for budget, taus in planned.items()}


def next_tested(
    results: dict[float, Comparison], taus: list[float], budget: float, options: CalibrateOptions
) -> list[float]:
    """The first of a budget's thresholds that is not measured; none where one before it fails."""
    for tau in taus:
        if tau not in results:
            return [tau]
        if not all(upper <= budget for upper in bounds(results[tau], options)):
            break
    return []


def taken(
    results: dict[float, Comparison], taus: list[float], budget: float, options: CalibrateOptions
) -> dict[str, Any]:
    """A budget's cell, from what was measured at its thresholds up to the first that fails."""
    tau, uppers = last_within(taus, lambda tau: bounds(results[tau], options), budget)
    groups = len(next(iter(results.values())).stats)
    return describe(results[tau] if tau else None, tau, uppers, groups, options)


def bounds(result: Comparison, options: CalibrateOptions) -> list[float]:
    """Upper bounds of all that shall stay within the budget, see `guarded`."""
    metric, confidence = options.metric, options.confidence_of_each
    found = [upper_bound(values, confidence) for values in guarded(result, options)]
    if metric == "agreement":  # with no token changed a bound by the spread would be 0
        found.append(count_bound(round(result.mean(metric) * result.tokens), result.tokens, confidence))
    return found


def guarded(result: Comparison, options: CalibrateOptions) -> list[Tensor]:
    """Losses whose means shall stay within the budget, each `(groups,)`: of all positions, of the last part of them, and
    of every source where that is guaranteed."""
    found = [result.group_means(options.metric), result.last_part(options.metric)]
    if options.guarantee == "worst-source":
        found += result.source_means(options.metric).values()
    return found


def describe(
    result: Comparison | None, tau: float, uppers: Sequence[float], groups: int, options: CalibrateOptions
) -> dict[str, Any]:
    """One cell of the certificate; without a result nothing was certified."""
    cell: dict[str, Any] = {"threshold": tau, "mean": 0.0, "upper": 0.0, "groups": groups}
    if result is None:
        return cell
    cell |= {
        "mean": result.mean(options.metric),
        "upper": max(uppers),
        "last_part": float(result.last_part(options.metric).mean()),
        "by_part": result.by_part(options.metric),
        "by_source": result.by_source(options.metric),
    }
    return cell | result.mean_stats()


def pilot_thresholds(budgets: list[float], size: int) -> list[float]:
    """The thresholds, rising, that the pilot groups of batches of `size` are measured at."""
    top = 2 * max(budgets) * math.sqrt(size)
    return [top * PILOT_STEP**-step for step in reversed(range(PILOT_POINTS))]


def pilot_curve(
    loaded: LoadedModel,
    layers: list[MoeLayer],
    selector: LynxSelector,
    groups: Sequence[Group],
    options: CalibrateOptions,
    most: float = math.inf,
) -> Curve:
    """What the pilot groups lose at thresholds that span the budgets, up to the first at which it is more than `most`."""
    simulation = Simulation(loaded.model, layers, options.prompt, options.text.ends(loaded), options.together)
    taus, losses = pilot_thresholds(options.budgets, len(groups[0][0]) * options.together), []
    for tau in taus:
        losses.append(simulation.compare(groups, [options.at(selector, tau)])[0].mean(options.metric))
        if losses[-1] > most:
            break
    return rising(taus[: len(losses)], losses)
