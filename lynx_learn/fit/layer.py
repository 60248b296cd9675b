"""One layer of a selector, from its part of a trace and its experts' weights: surrogates, then a scorer."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import TraceError
from ..files import write
from ..moe.decision import Routing
from ..moe.families import MoeLayer
from ..parts import give_back
from ..rules.oracle import Answer, squared_errors
from ..selector.features import LOG_WEIGHT, assignment_features
from ..selector.layer import LayerSelector
from ..selector.surrogates import MOST_RANKS, Fit, Surrogates
from ..traces.format import Trace
from .low_rank import ROWS_AT_A_TIME, Rows, fit_surrogates
from .scorer import Assignments, ScorerOptions, boosted_reference, new_scorer, predicted_costs, quality, train_scorer

# Of every ten sequences of a trace one checks the ridge penalty and one is held out for the reported figures.
CHECK, HELD_OUT = 8, 9
# Sequences up to this tenth are one half of those that surrogates are fitted on.
HALF = CHECK // 2
# Surrogates err less on the tokens that they were fitted on. With fewer of an expert's tokens for each input dimension than
# this, a scorer learns from what the surrogates of one half of the sequences leave on the other: `train/cross_fit.py`.
FEW_TOKENS = 30
# Inputs of experts that are held at a time, in bytes as float32; a layer with more is read several times.
ROWS_BYTES, BYTES_OF_A_NUMBER = 2**31, 4
# Tokens a scorer learns from; more are thinned out, so that memory does not grow with the trace.
MOST_TOKENS = 100_000


def fit_layer(
    layer: MoeLayer,
    own: LayerSelector,
    trace: Trace,
    tenth: Tensor,
    options: ScorerOptions,
    reference: bool,
    logs: Path,
) -> dict[str, Any]:
    """Fit one layer's surrogates and scorer in place; returns its figures on held-out sequences.

    Args:
        tenth: the sequence number modulo 10 of every token of the trace.
        reference: whether to fit the scorer that others are compared with, too.
    """
    torch.manual_seed(options.seed * 1009 + layer.index)
    answers: list[Answer] = [own.surrogates.output]
    if own.surrogates.rank:
        own.surrogates.to(layer.dtype)  # what they are rounded to
        halves = _fit_surrogates(layer, own.surrogates, trace, tenth, logs)
        ranks = own.surrogates.ranks.tolist()
        answers += [lambda expert, x, half=half: half[expert].output(x, ranks[expert]) for half in halves]  # type: ignore[misc]
    fit, held_out, energy = _assignments(layer, answers, trace, tenth)
    squared = (fit.costs / (2 * fit.features[..., LOG_WEIGHT]).exp()).flatten()
    sums = torch.zeros(layer.num_experts).index_add(0, fit.experts.flatten(), squared)
    counts = torch.bincount(fit.experts.flatten(), minlength=layer.num_experts)
    seen = sums / counts.clamp_min(1)
    residuals = torch.where(counts > 0, seen, seen.sum() / (counts > 0).sum())
    scorer = new_scorer(options.kind, fit, residuals)
    train_scorer(scorer, fit, held_out, options, logs, f"layer-{layer.index:02d}")
    own.scorer.load_state_dict(scorer.state_dict())
    floor = new_scorer("formula", fit, residuals)
    figures: dict[str, Any] = {
        "name": layer.name,
        "ranks": [int(own.surrogates.ranks.min()), int(own.surrogates.ranks.max())],
        "cross_fitted": len(answers) > 1,
        "assignments": fit.costs.numel(),
        "unexplained": float(held_out.costs.sum() / energy),
        "formula": quality(predicted_costs(floor, held_out), held_out.costs),
        options.kind: quality(predicted_costs(own.scorer, held_out), held_out.costs),
    }
    if reference:
        figures["gradient_boosting"] = boosted_reference(fit, held_out, options.seed)
    return figures


def _fit_surrogates(
    layer: MoeLayer, surrogates: Surrogates, trace: Trace, tenth: Tensor, scratch: Path
) -> list[list[Fit]]:
    """Fit and put in place all experts' surrogates; where tokens are few, also those of the first half and of the second.

    Directions are kept in files, since more are worked out than are taken.
    """
    hidden, rank = layer.hidden_size, surrogates.rank
    most = max(1, ROWS_BYTES // (hidden * BYTES_OF_A_NUMBER))
    counts, fitted = (torch.zeros(layer.num_experts, dtype=torch.int64) for _ in range(2))
    start = 0
    for shard in trace.layer_shards(layer.index, ("indices",)):
        learned = tenth[start : start + len(shard["indices"])] <= CHECK
        start += len(learned)
        for sums, indices in ((counts, shard["indices"]), (fitted, shard["indices"][learned])):
            sums += torch.bincount(indices.flatten(), minlength=layer.num_experts)
    few = float(counts.sum()) < FEW_TOKENS * layer.num_experts * hidden
    spans = [(0, CHECK), *([(0, HALF), (HALF, CHECK)] if few else [])]
    fits: list[list[Fit]] = [[] for _ in spans]
    for block in blocks_within(fitted.tolist(), most):
        for x, weights, part in gathered(trace, layer.index, tenth, block, fitted, most):
            expert = len(fits[0])
            x = x.to(layer.device, layer.dtype)
            y = torch.empty_like(x)
            for some, into in zip(x.split(ROWS_AT_A_TIME), y.split(ROWS_AT_A_TIME), strict=True):
                if len(some):
                    into.copy_(layer.expert_output(expert, some))
            check_finite(layer, y)
            rows, part = Rows(x, y, weights.to(layer.device)), part.to(layer.device)
            parts = [(part >= start) & (part < end) for start, end in spans]
            found = fit_surrogates(rows, parts, part == CHECK, rank, min(MOST_RANKS * rank, hidden))
            for which, fit in enumerate(found):
                fits[which].append(_aside(fit, scratch / f"{which}-{expert}.safetensors"))
            give_back()  # experts have different numbers of tokens
    surrogates.put(fits[0])
    return fits[1:]


def _aside(fit: Fit, file: Path) -> Fit:
    """The same with its directions in a file, from which they are mapped; those that explain nothing are left out.

    Raises:
        OptionError: it cannot be written.
    """
    some = int(fit.gains.count_nonzero())
    write(file, save({"down": fit.down[:some].contiguous(), "up": fit.up[:some].contiguous()}))
    return fit._replace(**load_file(file))


def blocks_within(counts: list[int], most: int) -> Iterator[range]:
    """Consecutive experts whose assignments together are at most `most`, or single ones."""
    start, total = 0, 0
    for expert, count in enumerate(counts):
        if expert > start and total + count > most:
            yield range(start, expert)
            start, total = expert, 0
        total += count
    yield range(start, len(counts))


def gathered(
    trace: Trace, layer: int, tenth: Tensor, block: range, counts: Tensor, most: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each expert of `block` its assignments' inputs, squared weights and tenths, without held-out ones.

    Every shard is read once, whatever the number of experts. An expert with more than `most` assignments has every n-th.

    Args:
        counts: assignments of each expert `(experts,)`, without held-out ones.
    """
    steps = [max(-(-int(counts[expert]) // most), 1) for expert in block]
    starts = [0]
    for expert, step in zip(block, steps, strict=True):
        starts.append(starts[-1] + -(-int(counts[expert]) // step))
    # In full at once: in parts that are joined, and given back one by one, memory would be torn.
    columns: list[Tensor] = []
    seen, filled = [0] * len(block), starts[:-1]
    start = 0
    for shard in trace.layer_shards(layer, ("hidden", "indices", "weights")):
        tokens, top_k = shard["indices"].shape
        own, flat = tenth[start : start + tokens], shard["indices"].flatten()
        start += tokens
        order = flat.argsort(stable=True)
        ends = [0, *torch.bincount(flat, minlength=len(counts)).cumsum(0).tolist()]
        squares = shard["weights"].flatten().square()
        if not columns:
            kinds = (shard["hidden"], squares, own)
            columns = [part.new_empty(starts[-1], *part.shape[1:]) for part in kinds]
        for place, expert in enumerate(block):
            rows = order[ends[expert] : ends[expert + 1]]
            rows = rows[own[rows // top_k] <= CHECK]
            kept = rows[-seen[place] % steps[place] :: steps[place]]
            seen[place] += len(rows)
            token, into = kept // top_k, slice(filled[place], filled[place] + len(kept))
            filled[place] = into.stop
            for whole, part in zip(columns, (shard["hidden"][token], squares[kept], own[token]), strict=True):
                whole[into] = part
    for first, last in pairwise(starts):
        x, weights, part = (column[first:last] for column in columns)
        yield x, weights, part


def _assignments(
    layer: MoeLayer, answers: list[Answer], trace: Trace, tenth: Tensor
) -> tuple[Assignments, Assignments, Tensor]:
    """Features and true costs for fitting and held out, and the energy of the latter without any surrogate.

    Args:
        answers: of all surrogates; and, for costs that are cross-fitted, of those of the first half and of the second.
    """
    keep = min(1.0, MOST_TOKENS / trace.collected_tokens)
    thinning = torch.Generator().manual_seed(layer.index)
    sizes = [len(shard["indices"]) for shard in trace.layer_shards(layer.index, ("indices",))]
    chosen = torch.cat([torch.rand(size, generator=thinning) < keep for size in sizes])
    sides = [(chosen & side).nonzero().flatten() for side in (tenth != HELD_OUT, tenth == HELD_OUT)]
    if not len(sides[1]):
        raise TraceError(
            f"{trace.folder} has too few sequences to hold some out: collect at least 10 of them (--tokens {10 * trace.options.length} or more)"
        )
    # Those to fit on come first; put in place shard by shard, since joined parts would hold the hidden states twice.
    order = torch.cat(sides)
    into = torch.full((len(tenth),), -1)
    into[order] = torch.arange(len(order))
    whole: dict[str, Tensor] = {}
    for shard, places in zip(trace.layer_shards(layer.index), into.split(sizes), strict=True):
        mine = places >= 0
        rows = {name: shard[name][mine] for name in ("hidden", "logits", "indices", "weights")}
        for name, part in rows.items():
            whole.setdefault(name, part.new_empty(len(order), *part.shape[1:]))[places[mine]] = part
    # Over all tokens, so that each expert is read once.
    errors = squared_errors(layer, answers, shard_routing(whole))[:, 0]
    costs, squares, own = errors[0], errors[-1], tenth[order].unsqueeze(-1)
    if len(answers) > 1:
        costs = torch.where(own < HALF, errors[2], torch.where(own < CHECK, errors[1], costs))
    check_finite(layer, costs)
    features = assignment_features(whole["logits"], whole["indices"], whole["weights"])
    columns = [
        part.split([len(side) for side in sides]) for part in (features, whole["indices"], costs, whole["hidden"])
    ]
    fit, held_out = (Assignments(*parts) for parts in zip(*columns, strict=True))
    return fit, held_out, squares[len(sides[0]) :].sum()


def check_finite(layer: MoeLayer, *outputs: Tensor) -> None:
    """Refuse experts that overflow.

    Raises:
        TraceError: with what to do.
    """
    if not all(torch.isfinite(part).all() for part in outputs):
        raise TraceError(
            f"{layer.name}: an expert's output is not finite on the trace's hidden states; the model overflows in {layer.dtype}: train in --dtype float32"
        )


def shard_routing(shard: dict[str, Tensor]) -> Routing:
    """A shard of a trace as one batch in which all tokens are active."""
    active = torch.ones(len(shard["hidden"]), dtype=torch.bool)
    parts = (shard["hidden"], shard["logits"], shard["indices"], shard["weights"], active)
    return Routing(*(part.unsqueeze(0) for part in parts))
