"""What a trace says of fast memory without running the model: hits of eviction rules against the best possible, and how
well the next layer's experts are foreseen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError, TraceError
from ..files import check_target, check_writable, write_json
from ..traces.format import Trace
from .predict import PREDICTORS, Learned, Predictor, Seen, write_predictors
from .slots import Eviction, LeastExpected, LeastRecent, Slots

# Of the sequences, which predictors and rates are fitted on; the others are replayed.
FITTED = 0.5


@dataclass(frozen=True)
class ReplayOptions:
    """Replay a trace through fast memory: hits by eviction rule, and how well experts are foreseen."""

    trace: str
    """trace directory, as collect or import-routes writes it"""
    shares: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """shares of the experts that fast memory holds"""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 16])
    """sequences that decode together"""
    steps: int = 2000
    """decode steps replayed for each batch size, at most"""
    report: str | None = None
    """JSON file for what was found"""
    predictors: str | None = None
    """folder for the predictors, for offload_experts(prefetch=…)"""

    def __post_init__(self) -> None:
        for share in self.shares:
            if not 0 < share <= 1:
                raise OptionError(f"--shares {share:g} is not usable: expected above 0, at most 1")
        for name, values in (("shares", self.shares), ("batch_sizes", self.batch_sizes), ("steps", [self.steps])):
            if not values or min(values) <= 0:
                raise OptionError(f"--{name} {values} is not usable: expected numbers above 0")


@dataclass(frozen=True)
class Steps:
    """Decode steps of a trace.

    Attributes:
        tokens: rows of the trace `(steps, sequences)` that decode together.
        needed: experts that a step needs `(steps, layers, experts)`, bool.
    """

    tokens: Tensor
    needed: Any


class Farthest:
    """The expert that will be needed last goes (Belady 1966): no rule can hit more often, and none can know it.

    Args:
        needed: as in `Steps`.
    """

    name = "best possible"

    def __init__(self, needed: Any) -> None:
        steps, layers, experts = needed.shape
        self.next = np.full((steps + 2, layers, experts), steps + 1)
        for step in reversed(range(steps)):
            self.next[step] = np.where(needed[step], step, self.next[step + 1])
        self.step = 0

    def pick(self, slots: Slots, layer: int) -> int | None:
        where, own = slots.owner[:, 0], slots.owner[:, 1]
        # Of this layer and those before it the next need is in a later step.
        step = self.next[self.step + (where <= layer), where, own]
        value = np.where(where < 0, np.inf, step * len(self.next[0]) + where)
        value[slots.pinned] = -1
        slot = int(value.argmax())
        return None if slots.pinned[slot] else slot


def halves(trace: Trace) -> tuple[Tensor, Tensor]:
    """Tokens of the sequences that rates are fitted on, and of those that are replayed."""
    sequence = trace.index()["sequence"]
    cut = sequence.unique()[int(FITTED * len(sequence.unique()))]
    fitted, rest = (place.nonzero().squeeze(-1) for place in (sequence < cut, sequence >= cut))
    return fitted, rest


def read_steps(trace: Trace, size: int, most: int, rows: Tensor, routed: Sequence[Tensor]) -> Steps:
    """Steps of `size` sequences whose tokens at one position decode together; `rows` are tokens that may be used.

    Raises:
        TraceError: there are too few sequences.
    """
    index = trace.index()
    sequence, position = index["sequence"][rows], index["position"][rows]
    by_sequence = [rows[sequence == number][position[sequence == number].argsort()] for number in sequence.unique()]
    by_sequence = [tokens for tokens in by_sequence if len(tokens) > 1]
    groups = [by_sequence[start : start + size] for start in range(0, len(by_sequence) - size + 1, size)]
    if not groups:
        raise TraceError(
            f"{trace.folder} holds {len(by_sequence)} sequences to replay, batches of {size} need more: collect more tokens, "
            "or give smaller --batch-sizes"
        )
    parts = []
    for group in groups:
        length = min(len(tokens) for tokens in group)
        parts.append(torch.stack([tokens[:length] for tokens in group], dim=1))
    tokens = torch.cat(parts)[:most]
    needed = torch.zeros(len(tokens), len(routed), trace.options.num_experts, dtype=torch.bool)
    for layer, indices in enumerate(routed):
        needed[:, layer].scatter_(1, indices[tokens].flatten(1), True)
    return Steps(tokens, needed.numpy())


def rates(needed: Any) -> Any:
    """Share of the steps that need each expert `(layers, experts)`."""
    return needed.mean(0)


def hits(needed: Any, count: int, rule: Eviction) -> float:
    """Share of the needed experts that lie in `count` slots when they are needed."""
    steps, layers, experts = needed.shape
    slots, found = Slots(count, layers, experts, rule), 0
    for step in range(steps):
        if isinstance(rule, Farthest):
            rule.step = step
        for layer in range(layers):
            wanted = np.flatnonzero(needed[step, layer])
            held = wanted[slots.where[layer, wanted] >= 0]
            found += len(held)
            for e in held:
                slots.release(slots.pin(layer, e))
            for e in np.setdiff1d(wanted, held):
                slot = slots.claim(layer, e)
                assert slot is not None  # nothing else is in use
                slots.release(slot)
    return found / max(int(needed.sum()), 1)


def replay(options: ReplayOptions) -> dict[str, Any]:
    """What was found: `hits` by batch size, share and rule, and `foreseen` by batch size and predictor.

    Rates and predictors are of the first half of the sequences, the figures of the others.

    Raises:
        TraceError: the trace is damaged, or too short.
    """
    if options.report:
        check_target(Path(options.report))
    if options.predictors:
        check_writable(Path(options.predictors))
    trace = Trace.open(options.trace, routes=True)
    if trace.routes_only and options.predictors:
        raise OptionError(
            f"--predictors is not usable: {trace.folder} holds routes alone, and what is learned needs hidden states; leave it out"
        )
    kinds = {name: kind for name, kind in PREDICTORS.items() if kind is not Learned or not trace.routes_only}
    routed = [
        torch.cat([part["indices"] for part in trace.layer_shards(i, ("indices",))])
        for i in range(len(trace.options.layers))
    ]
    fitted, rest = halves(trace)
    experts = trace.options.num_experts * len(routed)
    rows, foreseen = [], []
    steps = {size: read_steps(trace, size, options.steps, rest, routed) for size in options.batch_sizes}
    for size in options.batch_sizes:
        known = rates(read_steps(trace, size, options.steps, fitted, routed).needed)
        needed = steps[size].needed
        for share in options.shares:
            count = max(int(share * experts), 1)
            found: list[Eviction] = [LeastRecent(), LeastExpected(known), Farthest(needed)]
            rows.append(
                {
                    "batch_size": size,
                    "share": share,
                    "needed": float(needed.sum(-1).mean()),
                    **{rule.name: hits(needed, count, rule) for rule in found},
                }
            )
    predictors: dict[tuple[str, int], Predictor] = {}
    for layer in range(1, len(routed)):
        if trace.routes_only:
            hidden = torch.empty(len(routed[layer]), 0)
        else:
            hidden = torch.cat([part["hidden"] for part in trace.layer_shards(layer - 1)]).float()
        seen = Seen(hidden, routed[layer - 1], routed[layer], trace.options.num_experts)
        for name, kind in kinds.items():
            predictor = predictors[name, layer] = kind.fit(seen.of(fitted))
            for size, own in steps.items():
                tokens = own.tokens.flatten()
                each = predictor.scores(seen.hidden[tokens], seen.before[tokens])
                scores = each.unflatten(0, own.tokens.shape).sum(1)
                foreseen.append({"layer": layer, "predictor": name, "batch_size": size, **recall(scores, own, layer)})
    result = {
        "trace": str(options.trace),
        "model": trace.options.model,
        "hits": rows,
        "foreseen": _over_layers(foreseen, kinds),
    }
    if options.predictors:
        about = {"model": trace.options.model, "trace": str(options.trace), "tokens": len(fitted)}
        write_predictors(Path(options.predictors), predictors, trace.options.identity, about)
    if options.report:
        write_json(Path(options.report), result)
    return result


def recall(scores: Tensor, steps: Steps, layer: int) -> dict[str, float]:
    """Share of the experts needed that are among those with the highest scores `(steps, experts)`: as many as a step needs on
    average, and half as many."""
    needed = torch.from_numpy(steps.needed[:, layer].copy())
    whole = max(round(float(needed.sum(-1).float().mean())), 1)
    found = {}
    for name, count in (("foreseen", whole), ("half", max(whole // 2, 1))):
        first = torch.zeros_like(needed).scatter(1, scores.topk(count).indices, True)
        found[name] = float((first & needed).sum() / needed.sum())
    return found


def _over_layers(rows: list[dict[str, Any]], names: Iterable[str]) -> list[dict[str, Any]]:
    found = []
    for size in sorted({row["batch_size"] for row in rows}):
        for name in names:
            own = [row for row in rows if row["batch_size"] == size and row["predictor"] == name]
            means = {key: sum(row[key] for row in own) / len(own) for key in ("foreseen", "half")}
            found.append({"batch_size": size, "predictor": name, **means})
    return found
