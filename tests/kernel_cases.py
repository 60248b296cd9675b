"""Layers and decode batches that the compiled decisions are compared with PyTorch on, and the comparison."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from tiny import randomise
from torch import Tensor

from lynx_learn.moe.decision import Decision, Routing, each_tensor
from lynx_learn.selector.config import SelectorConfig, by_active
from lynx_learn.selector.layer import LayerSelector, Ready
from lynx_learn.selector.prices import Price
from lynx_learn.selector.selector import LynxSelector

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ready_for(
    experts: int,
    top_k: int,
    hidden: int,
    scorer: str = "mlp",
    keep_top1: bool = False,
    table: dict[int, float] | None = None,
    seed: int = 0,
    device: str = "cpu",
    rank: int = 1,
) -> Ready:
    """One layer's selector with random parameters, costs of typical assignments around 1."""
    config = SelectorConfig(
        "", "", "", {"routers": [{}]}, ("layer",), experts, top_k, hidden, 1, scorer, rank, keep_top1
    )
    selector = LynxSelector(config)
    randomise(selector, seed)
    own: LayerSelector = selector.layers[0]  # type: ignore[assignment]
    own.scorer.log_residual -= 2 * math.log(1 / top_k)
    own.to(device)
    return Ready(own, own.scorer.fold(own.sensitivity), torch.tensor(by_active(table or {}), device=device))


def routing_of(
    tokens: int,
    experts: int,
    top_k: int,
    hidden: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 3,
    active: float = 0.8,
    seed: int = 0,
    coarse: bool = False,
    unlike: bool = False,
) -> Routing:
    """A random decode batch.

    Args:
        tokens, experts, top_k, hidden: sizes.
        dtypes: of hidden states, logits and weights.
        active: about this share of the tokens.
        seed: of everything.
        coarse: few values of logits and weights, so that there are ties.
        unlike: experts are chosen by something else than the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1, tokens, experts, generator=generator)
    if coarse:
        logits = logits.clamp(-2, 2).round()
        logits[..., 0] += 3  # not all alike: then the spread is the smallest allowed, and rounding is blown up by it
    logits = logits.to(dtypes[1])
    scores = torch.rand(logits.shape, generator=generator) if unlike else logits.float()
    indices = scores.topk(top_k, -1).indices
    weights = logits.float().softmax(-1).gather(-1, indices)
    if coarse:
        weights = (4 * weights).ceil() / 4
    states = torch.randn(1, tokens, hidden, generator=generator)
    live = torch.rand(1, tokens, generator=generator) < active
    return Routing(states.to(dtypes[0]), logits, indices, weights.to(dtypes[2]), live)


def decide_one(compiled: Any, routing: Routing, scale: Tensor | None = None, price: Price | None = None) -> Decision:
    """What a compiled decision gives for G = 1 batches."""
    one = each_tensor(lambda part: part[0], routing)
    assert compiled.takes(one)
    decision: Decision = compiled.decide(one, None if scale is None else scale[0], price)
    return each_tensor(lambda part: part.unsqueeze(0), decision)


def check_rows(rows: Tensor, ready: Ready, routing: Routing) -> None:
    """Costs by expert as the PyTorch form has them."""
    costs = torch.where(routing.active[0].unsqueeze(-1), ready.costs(routing)[0], 0.0)
    wanted = torch.zeros(rows.shape, device=rows.device).scatter(1, routing.indices[0], costs)
    # Where a token's logits are nearly equal, their mean over their spread is large, and so is its rounding.
    logits = routing.logits.float()
    steep = (logits.abs().amax(-1) / logits.std(-1).clamp_min(1e-6)).nan_to_num(0.0, 0.0, 0.0).amax()
    torch.testing.assert_close(rows.abs(), wanted, rtol=1e-4 + 1e-6 * float(steep), atol=0.0, equal_nan=True)
    weights = routing.weights[0]
    first = (weights == weights.amax(-1, keepdim=True)) & ready.selector.keep_top1 & (costs > 0)
    assert torch.equal((rows < 0).gather(1, routing.indices[0]), first)


def check_rewritten(done: Decision, wanted: Decision) -> None:
    assert done.loads is not None
    assert wanted.loads is not None
    parts = ((d.indices, d.weights, d.answered, *d.loads) for d in (done, wanted))
    for got, other in zip(*parts, strict=True):
        assert got.dtype == other.dtype
        torch.testing.assert_close(got, other, rtol=0, atol=0, equal_nan=True)


def check_loads_are_consistent(done: Decision, routing: Routing) -> None:
    before, after = done.loads
    live = routing.active[0]
    assert before[0].nonzero().flatten().tolist() == routing.indices[0, live].unique().tolist()
    assert after[0].nonzero().flatten().tolist() == done.indices[0, live].unique().tolist()


def is_close_call(total: Tensor, threshold: float) -> bool:
    """Whether rounding may decide which experts stay, or which one stays in any case."""
    real = total[(total > 0) & total.isfinite()]
    near = ((real - threshold).abs() <= 1e-3 * real).any()
    top = total.topk(2).values
    return bool(near or (top[0] > 0 and (top[0] - top[1]).abs() <= 1e-3 * top[0]))


class Case(NamedTuple):
    """One layer before a decode batch."""

    ready: Ready
    routing: Routing
    total: Tensor
    """Cost of each expert, in PyTorch."""
    close: bool
    """Whether rounding may decide."""


def drawn(draw: Callable[[Any], Any], rank: int = 1) -> Case:
    """Small layers and batches of all sorts: types, ties, NaN, tokens that do not vote, tables of thresholds."""
    experts = draw(st.sampled_from([2, 3, 4, 8, 12]))
    top_k = draw(st.integers(1, min(experts, 5)))
    tokens, hidden = draw(st.integers(1, 6)), draw(st.sampled_from([1, 8, 21]))
    dtypes = draw(st.tuples(*[st.sampled_from(DTYPES)] * 3))
    seed, coarse, unlike = draw(st.integers(0, 99)), draw(st.booleans()), draw(st.booleans())
    active = draw(st.sampled_from([0.0, 0.7, 0.7, 1.0]))
    routing = routing_of(tokens, experts, top_k, hidden, dtypes, active, seed, coarse, unlike)
    spoilt = draw(st.sampled_from([None, None, routing.hidden, routing.logits]))
    if spoilt is not None:
        spoilt[0, draw(st.integers(0, tokens - 1)), 0] = math.nan
    scorer, keep_top1 = draw(st.sampled_from(["formula", "linear", "mlp"])), draw(st.booleans())
    ready = ready_for(experts, top_k, hidden, scorer, keep_top1, seed=seed, rank=rank)
    total = ready.selector.totals(routing, ready.costs(routing))[0]
    # A middle threshold lies between the totals of two experts; those of other numbers of tokens decide otherwise.
    middle = float(total[total > 0].nanmedian()) * 1.01 if (total > 0).any() else 1.0
    threshold = draw(st.sampled_from([0.0, middle, middle, math.inf]))
    table = draw(st.lists(st.sampled_from([0.0, math.inf]), min_size=1, max_size=tokens + 2))
    table[min(int(routing.active.sum()), len(table) - 1)] = threshold
    ready = replace(ready, thresholds=torch.tensor(table))
    return Case(ready, routing, total, not total.isnan().any() and is_close_call(total, threshold))


LARGE = {
    "common": (40, 128, 8, 300, "mlp", torch.bfloat16, False),
    "most experts": (3, 512, 16, 1500, "mlp", torch.float32, True),
    "one more than a power of two": (5, 65, 5, 257, "linear", torch.float16, True),
    "one expert each": (9, 60, 1, 64, "formula", torch.bfloat16, False),
}


def put_between(ready: Ready, routing: Routing) -> None:
    """Make the threshold one that lies well between what two experts cost."""
    total = ready.selector.totals(routing, ready.costs(routing))[0]
    ordered = total[total > 0].sort().values
    gaps = ordered[1:] / ordered[:-1]
    cut = len(gaps) // 4 + int(gaps[len(gaps) // 4 : -1].argmax())
    assert gaps[cut] > 1.001, "no threshold that rounding does not touch"
    ready.thresholds[:] = ordered[cut : cut + 2].mean()


NAN, INF = math.nan, math.inf

BY_HAND: dict[str, tuple[float, dict[tuple[int, int], float], bool]] = {
    "some": (0.75, {}, False),
    "a cost equal to the threshold": (0.5, {}, False),
    "everything": (INF, {}, False),
    "each first expert": (INF, {}, True),
    "the first of two that cost most": (INF, {(0, 0): 1.0}, False),
    "no number": (2.0, {(0, 1): NAN, (2, 1): NAN}, False),
    "no number, the later expert": (INF, {(2, 0): NAN}, False),
    "infinite": (INF, {(1, 1): INF, (2, 0): INF}, False),
    "no number beside infinite": (INF, {(0, 0): INF, (2, 1): NAN}, False),
}
