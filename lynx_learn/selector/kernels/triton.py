"""A decode batch's decision in few Triton kernels: two for what `Ready.rewrite` gives, and `answers` for the surrogates.

The PyTorch form is dozens of small operations, each a launch of its own. Which form takes less time is measured where
they run (`is_faster`). Importing this module needs triton, which comes with torch's CUDA builds; so it is imported only
where a layer is on such a device.

Nothing waits for the host, shapes do not depend on values, and every sum has a fixed order: the same input gives the
same bits, also in a CUDA graph.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...moe.decision import ANSWERED, BATCHES, LOADS, TOKENS, Decision, Routing
from ...moe.kernels.grouping import current
from ..features import SMALLEST_WEIGHT, TOKEN_PARTS
from ..prices import Offer, Price
from ..scorers import LOWEST_LOG_COST, Folded
from ..surrogates import Surrogates
from .answers import Maps, answer, rows_apart

MOST_TOKENS, MOST_EXPERTS, MOST_TOP_K, MOST_WIDTH, MOST_PROJECTED = 512, 512, 16, 127, 64
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Globals that a kernel reads must say that they are constants.
_SMALLEST_WEIGHT, _LOWEST_LOG_COST = tl.constexpr(SMALLEST_WEIGHT), tl.constexpr(LOWEST_LOG_COST)
_TOKEN_PARTS = tl.constexpr(len(TOKEN_PARTS))
_BATCHES, _TOKENS, _ANSWERED, _LOADS = (tl.constexpr(place) for place in (BATCHES, TOKENS, ANSWERED, LOADS))
# Elements of a tile: hidden state × projection, of which a program has to wait for each, and tokens × experts.
_PROJECTION_TILE, _TOTALS_TILE, _REWRITE_TILE = 16384, 8192, 1024


@triton.jit
def _row(matrix, row, column, COLUMNS: tl.constexpr):
    return tl.load(matrix + row * COLUMNS + column, mask=column < COLUMNS, other=0.0)


@triton.jit
def _standing(active, scale, token, inside, MASKED: tl.constexpr, SCALED: tl.constexpr):
    """How many times each token's costs count; 0 for those that are not active. One of both says so at least."""
    if SCALED:
        stands = tl.load(scale + token, mask=inside, other=0.0)
        if MASKED:
            stands = tl.where(tl.load(active + token, mask=inside, other=0) != 0, stands, 0.0)
    else:
        stands = tl.load(active + token, mask=inside, other=0).to(tl.float32)
    return stands


@triton.jit
def _costs_by_expert(
    hidden,
    logits,
    indices,
    weights,
    active,
    scale,
    of_assignment,
    of_token,
    of_expert,
    projection,
    outer,
    rows,
    routed_indices,
    routed_weights,
    hidden_stride,
    factor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    PROJECTED: tl.constexpr,
    KEEP_TOP1: tl.constexpr,
    MASKED: tl.constexpr,
    SCALED: tl.constexpr,
    COPIED: tl.constexpr,
    ROUNDS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr,
    PROJECTED_PADDED: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
):
    """One program per token: its costs, spread over a row `(experts,)` of `rows`; 0 where it is not active.

    Costs are above 0, so the sign is free: with KEEP_TOP1 it is negative at the token's first expert. Weights count `factor`
    times. With COPIED, experts and weights as they are go into `routed_indices` and `routed_weights`. An expert below 0 is
    taken for 0.
    """
    token = tl.program_id(0)
    COLUMNS: tl.constexpr = WIDTH + 1
    expert = tl.arange(0, EXPERTS_PADDED)
    slot = tl.arange(0, TOP_K_PADDED)
    column = tl.arange(0, COLUMNS_PADDED)
    real, taken = expert < EXPERTS, slot < TOP_K

    # Parts of the token, in the order of features.TOKEN_PARTS.
    x = tl.load(logits + token * EXPERTS + expert, mask=real, other=-float("inf")).to(tl.float32)
    best = tl.max(x, 0)
    mean = tl.sum(tl.where(real, x, 0.0), 0) / EXPERTS
    deviation = tl.where(real, x - mean, 0.0)
    spread = tl.maximum(tl.sqrt(tl.sum(deviation * deviation, 0) / (EXPERTS - 1)), 1e-6)
    powers = tl.exp(x - best)
    partition_sum = tl.sum(powers, 0)
    partition = best + tl.log(partition_sum)
    entropy = partition - tl.sum(tl.where(real, powers * x, 0.0), 0) / partition_sum
    # The largest logit but top_k, whichever experts were chosen: a router's choice may go by more than its logits.
    rest = x
    for _ in range(ROUNDS):
        rest = tl.where(expert == tl.argmax(rest, 0), -float("inf"), rest)
    first_unchosen = tl.max(rest, 0)

    # Parts of its assignments, in the order of features.ASSIGNMENT_PARTS.
    place = token * TOP_K + slot
    own = tl.load(indices + place, mask=taken, other=0).to(tl.int32)
    weight = tl.load(weights + place, mask=taken, other=0.0).to(tl.float32)
    if COPIED:
        tl.store(routed_indices + place, own, mask=taken)
        tl.store(routed_weights + place, weight, mask=taken)
    own, weight = tl.maximum(own, 0), weight * factor
    logit = tl.load(logits + token * EXPERTS + own, mask=taken, other=0.0).to(tl.float32)
    log_weight = tl.log(tl.maximum(weight, _SMALLEST_WEIGHT))
    share = weight / tl.maximum(tl.sum(weight, 0), _SMALLEST_WEIGHT)
    rank = tl.sum((weight[None, :] > weight[:, None]).to(tl.float32), 1) / TOP_K

    # The scorer's inner layer; its last column adds straight to the log-cost.
    constant = best * _row(of_token, 0, column, COLUMNS)
    constant += mean / spread * _row(of_token, 1, column, COLUMNS)
    constant += first_unchosen * _row(of_token, 2, column, COLUMNS)
    constant += partition * _row(of_token, 3, column, COLUMNS)
    constant += entropy * _row(of_token, 4, column, COLUMNS)
    constant += spread * _row(of_token, 5, column, COLUMNS)
    constant += tl.min(tl.where(taken, share, float("inf")), 0) * _row(of_token, 6, column, COLUMNS)
    constant += tl.max(share, 0) * _row(of_token, 7, column, COLUMNS)
    constant += tl.min(tl.where(taken, logit, float("inf")), 0) * _row(of_token, 8, column, COLUMNS)
    if PROJECTED > 0:
        part = tl.arange(0, PROJECTED_PADDED)
        products = tl.zeros((HIDDEN_BLOCK, PROJECTED_PADDED), tl.float32)
        for start in range(0, HIDDEN, HIDDEN_BLOCK):
            at = start + tl.arange(0, HIDDEN_BLOCK)
            state = tl.load(hidden + token * hidden_stride + at, mask=at < HIDDEN, other=0.0).to(tl.float32)
            inside = (at < HIDDEN)[:, None] & (part < PROJECTED)[None, :]
            products += state[:, None] * tl.load(
                projection + at[:, None] * PROJECTED + part[None, :], mask=inside, other=0.0
            )
        inside = (part < PROJECTED)[:, None] & (column < COLUMNS)[None, :]
        into = tl.load(of_token + (part + _TOKEN_PARTS)[:, None] * COLUMNS + column[None, :], mask=inside, other=0.0)
        constant += tl.sum(tl.sum(products, 0)[:, None] * into, 0)
    inside = taken[:, None] & (column < COLUMNS)[None, :]
    inner = tl.load(of_expert + own[:, None] * COLUMNS + column[None, :], mask=inside, other=0.0) + constant[None, :]
    inner += log_weight[:, None] * _row(of_assignment, 0, column, COLUMNS)[None, :]
    inner += share[:, None] * _row(of_assignment, 1, column, COLUMNS)[None, :]
    inner += rank[:, None] * _row(of_assignment, 2, column, COLUMNS)[None, :]
    inner += logit[:, None] * _row(of_assignment, 3, column, COLUMNS)[None, :]
    inner += (logit / spread)[:, None] * _row(of_assignment, 4, column, COLUMNS)[None, :]
    log_cost = tl.sum(tl.where((column == WIDTH)[None, :], inner, 0.0), 1)
    if WIDTH > 0:
        out = tl.load(outer + column, mask=column < WIDTH, other=0.0)
        silu = inner / (1.0 + tl.exp(-inner))
        log_cost += tl.sum(tl.where((column < WIDTH)[None, :], silu * out[None, :], 0.0), 1)
    # A cost that is no number must stay one: it keeps its expert.
    stands = _standing(active, scale, token, True, MASKED, SCALED)
    cost = stands * tl.exp(tl.maximum(log_cost, _LOWEST_LOG_COST, propagate_nan=tl.PropagateNan.ALL))

    hit = (own[:, None] == expert[None, :]) & taken[:, None]
    row = tl.sum(tl.where(hit, cost[:, None], 0.0), 0)
    if KEEP_TOP1:
        first = (weight == tl.max(weight, 0))[:, None] & hit
        row = tl.where(tl.max(first.to(tl.int32), 0) > 0, -row, row)
    tl.store(rows + token * EXPERTS + expert, tl.where(stands != 0, row, 0.0), mask=real)


@triton.jit
def choose(
    rows,
    active,
    scale,
    thresholds,
    prices,
    tokens,
    last,
    EXPERTS: tl.constexpr,
    KEEP_TOP1: tl.constexpr,
    MASKED: tl.constexpr,
    SCALED: tl.constexpr,
    PRICED: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOKENS_PADDED: tl.constexpr,
    TOKENS_BLOCK: tl.constexpr,
):
    """Of each expert whether active tokens load it, and whether it is left out; the one that stays in any case; tokens' scales.

    And the number of tokens that count for the threshold.
    """
    expert = tl.arange(0, EXPERTS_PADDED)
    real = expert < EXPERTS
    sums = tl.zeros((TOKENS_BLOCK, EXPERTS_PADDED), tl.float32)
    lowest = tl.zeros((TOKENS_BLOCK, EXPERTS_PADDED), tl.float32)
    for start in range(0, TOKENS_PADDED, TOKENS_BLOCK):
        token = start + tl.arange(0, TOKENS_BLOCK)
        inside = (token < tokens)[:, None] & real[None, :]
        part = tl.load(rows + token[:, None] * EXPERTS + expert[None, :], mask=inside, other=0.0)
        sums += tl.abs(part)
        if KEEP_TOP1:
            lowest = tl.minimum(lowest, part)
    total = tl.sum(sums, 0)

    place = tl.arange(0, TOKENS_PADDED)
    stands = _standing(active, scale, place, place < tokens, MASKED, SCALED)
    count = tl.sum(((stands > 0.0) & (stands < float("inf"))).to(tl.int32), 0)
    threshold = tl.load(thresholds + tl.minimum(count, last))

    # The first of the largest totals, where what is no number is larger than any.
    odd = (total != total).to(tl.int32)
    height = tl.where(tl.max(odd, 0) > 0, odd.to(tl.float32), total)
    anchor = tl.argmax(tl.where(real, height, -1.0), 0)
    limit = threshold
    if PRICED:
        limit = threshold * tl.load(prices + expert, mask=real, other=1.0)
    leave = (total < limit) & (expert != anchor)
    if KEEP_TOP1:
        leave = leave & (tl.min(lowest, 0) >= 0.0)
    return total != 0.0, leave, anchor, stands, count


@triton.jit
def usable(used, leave):
    """Tokens that are not active run on what the others load; where none is active, all run. As numbers, to be gathered from."""
    return ((leave == 0) & (used | (tl.max(used.to(tl.int32), 0) == 0))).to(tl.int32)


@triton.jit(do_not_specialize=["tokens", "last"])
def _rewrite(
    rows,
    indices,
    weights,
    active,
    scale,
    thresholds,
    prices,
    new_indices,
    new_weights,
    answered,
    left_out,
    loads,
    counts,
    tokens,
    last,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    KEEP_TOP1: tl.constexpr,
    SCALED: tl.constexpr,
    PRICED: tl.constexpr,
    ANSWERED: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOKENS_PADDED: tl.constexpr,
    TOKENS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: what each expert costs, which stay, the assignments rewritten, and what of it is counted."""
    expert = tl.arange(0, EXPERTS_PADDED)
    real = expert < EXPERTS
    used, leave, anchor, stands, _ = choose(
        rows,
        active,
        scale,
        thresholds,
        prices,
        tokens,
        last,
        EXPERTS,
        KEEP_TOP1,
        True,
        SCALED,
        PRICED,
        EXPERTS_PADDED,
        TOKENS_PADDED,
        TOKENS_BLOCK,
    )
    tl.store(loads + expert, used, mask=real)
    tl.store(loads + EXPERTS + expert, used & (leave == 0), mask=real)
    tl.store(counts + _LOADS + expert, used.to(tl.int64), mask=real)
    tl.store(counts + _LOADS + EXPERTS + expert, (used & (leave == 0)).to(tl.int64), mask=real)

    can = usable(used, leave)
    answering = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, TOKENS_PADDED * TOP_K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < tokens * TOP_K
        own = tl.load(indices + at, mask=inside, other=0)
        weight = tl.load(weights + at, mask=inside, other=0.0)
        stays = tl.gather(can, own.to(tl.int32), 0) != 0
        tl.store(new_indices + at, tl.where(stays, own, anchor.to(tl.int64)), mask=inside)
        tl.store(new_weights + at, tl.where(stays, weight, 0.0).to(weight.dtype), mask=inside)
        if ANSWERED:
            tl.store(answered + at, stays == 0, mask=inside)
            tl.store(left_out + at, tl.where(stays, 0.0, weight).to(weight.dtype), mask=inside)
            live = tl.load(active + at // TOP_K, mask=inside, other=0) != 0
            answering += (live & (stays == 0)).to(tl.int64)
    tl.store(counts + _BATCHES, 1)
    tl.store(counts + _TOKENS, tl.sum((stands != 0.0).to(tl.int64), 0))
    tl.store(counts + _ANSWERED, tl.sum(answering, 0))


def _padded(size: int) -> int:
    """The next power of two, as tiles have them; 1 for 0."""
    return 1 << max(size - 1, 0).bit_length()


def supported(folded: Folded, routing: Routing, integers: Sequence[torch.dtype] = (torch.int64,)) -> bool:
    """Whether the kernels can decide for this batch: one decode batch, in sizes and types they were written for."""
    tokens, experts = routing.logits.shape[-2:]
    width, projected = folded.outer.shape[0], folded.projection.shape[1]
    return (
        routing.logits.numel() == tokens * experts
        and 1 <= tokens <= MOST_TOKENS
        and 2 <= experts <= MOST_EXPERTS
        and 1 <= routing.indices.shape[-1] <= min(MOST_TOP_K, experts)
        and width <= MOST_WIDTH
        and projected <= MOST_PROJECTED
        and all(part.dtype in FLOATS for part in (routing.hidden, routing.logits, routing.weights))
        and all(part.dtype == torch.float32 for part in folded)
        and routing.indices.dtype in integers
        # A gradient would not find its way back.
        and not (torch.is_grad_enabled() and routing.weights.requires_grad)
    )


def costs_by_expert(
    folded: Folded,
    routing: Routing,
    keep_top1: bool,
    scale: Tensor | None = None,
    masked: bool = True,
    factor: float = 1.0,
    routed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Costs `(T, experts)`, float32, 0 where a token does not vote; negative at its first expert with `keep_top1`.

    Args:
        folded: the layer's scorer.
        routing: one batch, with a leading dimension or without, as everywhere here.
        keep_top1: whether each token's first expert stays.
        scale: what each token's costs are multiplied with.
        masked: whether `routing.active` is read; otherwise all that have a scale above 0 are active.
        factor: what the router's weights are multiplied with.
        routed: where experts, int32, and weights, float32, are copied to as they are, both `(T, top_k)`.
    """
    tokens, experts = routing.logits.shape[-2:]
    top_k, size = routing.indices.shape[-1], routing.hidden.shape[-1]
    width, projected = folded.outer.shape[0], folded.projection.shape[1]
    rows = torch.empty(tokens, experts, dtype=torch.float32, device=routing.logits.device)
    projected_padded = _padded(projected)
    experts_padded, top_k_padded = _padded(experts), _padded(top_k)
    hidden = rows_apart(routing.hidden)
    _costs_by_expert[(tokens,)](
        hidden,
        *(part.contiguous() for part in routing[1:]),
        rows if scale is None else scale.contiguous(),
        *(part.contiguous() for part in folded),
        rows,
        *(routed or (rows, rows)),
        hidden.stride(-2),
        factor,
        EXPERTS=experts,
        TOP_K=top_k,
        HIDDEN=size,
        WIDTH=width,
        PROJECTED=projected,
        KEEP_TOP1=keep_top1,
        MASKED=masked,
        SCALED=scale is not None,
        COPIED=routed is not None,
        ROUNDS=min(top_k, experts - 1),
        EXPERTS_PADDED=experts_padded,
        TOP_K_PADDED=top_k_padded,
        COLUMNS_PADDED=_padded(width + 1),
        PROJECTED_PADDED=projected_padded,
        HIDDEN_BLOCK=min(_padded(size), _PROJECTION_TILE // projected_padded),
        num_warps=8 if experts_padded * top_k_padded > 2048 or projected else 4,
    )
    return rows


def tiles(tokens: int, experts: int, top_k: int) -> dict[str, int]:
    """The sizes that a kernel with one program for the whole batch is compiled for."""
    experts_padded, tokens_padded = _padded(experts), _padded(tokens)
    return {
        "EXPERTS": experts,
        "TOP_K": top_k,
        "EXPERTS_PADDED": experts_padded,
        "TOKENS_PADDED": tokens_padded,
        "TOKENS_BLOCK": min(tokens_padded, _TOTALS_TILE // experts_padded),
        "BLOCK": min(_padded(tokens * top_k), _REWRITE_TILE),
        "num_warps": 8,
    }


def rewrite_by(
    rows: Tensor,
    routing: Routing,
    thresholds: Tensor,
    keep_top1: bool,
    scale: Tensor | None = None,
    price: Price | None = None,
    answers: bool = True,
) -> tuple[Decision, Tensor | None]:
    """What stays and what goes, from `costs_by_expert`; the other arguments and what is returned as in `rewrite`."""
    tokens, experts = routing.logits.shape[-2:]
    top_k, device = routing.indices.shape[-1], rows.device
    indices, weights, active = (part.contiguous() for part in routing[2:])
    new_indices, new_weights = torch.empty_like(indices), torch.empty_like(weights)
    answered = torch.empty_like(indices, dtype=torch.bool) if answers else None
    left_out = torch.empty_like(weights) if answers else None
    loads = torch.empty(2, *routing.logits.shape[:-2], experts, dtype=torch.bool, device=device)
    counts = torch.empty(LOADS + 2 * experts, dtype=torch.int64, device=device)
    prices = None if price is None else _prices(price, rows, thresholds)
    _rewrite[(1,)](
        rows,
        indices,
        weights,
        active,
        rows if scale is None else scale.contiguous(),
        thresholds,
        rows if prices is None else prices,
        new_indices,
        new_weights,
        loads if answered is None else answered,
        rows if left_out is None else left_out,
        loads,
        counts,
        tokens,
        len(thresholds) - 1,
        KEEP_TOP1=keep_top1,
        SCALED=scale is not None,
        PRICED=prices is not None,
        ANSWERED=answers,
        **tiles(tokens, experts, top_k),
    )
    return Decision(new_indices, new_weights, None, answered, (loads[0], loads[1]), counts=counts), left_out


def _prices(price: Price, rows: Tensor, thresholds: Tensor) -> Tensor:
    """Of each expert `(experts,)`; those that depend on totals are no matter of one tile."""
    if price.devices is None and price.each is not None:
        return price.each.contiguous()
    total = rows.abs().sum(0, keepdim=True)
    return price.of(Offer(total, thresholds, total > 0)).expand_as(total).contiguous()


def rewrite(
    folded: Folded,
    routing: Routing,
    thresholds: Tensor,
    keep_top1: bool,
    scale: Tensor | None = None,
    price: Price | None = None,
    answers: bool = True,
) -> tuple[Decision, Tensor | None]:
    """As `Ready.rewrite`, with what is counted, for what is `supported`.

    Args:
        folded: the layer's scorer.
        routing: one decode batch.
        thresholds: by the number of active tokens, the last for any number beyond.
        keep_top1: whether each token's first expert stays.
        scale: as in `ThresholdPolicy.decide`.
        price: of each expert; None: 1.
        answers: whether there are surrogates.

    Returns:
        The decision without what surrogates answer, and the weights with which they do, 0 where the expert stays.
    """
    with current(routing.logits.device):
        rows = costs_by_expert(folded, routing, keep_top1, scale)
        return rewrite_by(rows, routing, thresholds, keep_top1, scale, price, answers)


class Fused:
    """One layer's decision in kernels, with what a step must not ask the device for."""

    def __init__(self, folded: Folded, surrogates: Surrogates, thresholds: Tensor, keep_top1: bool) -> None:
        """Arguments as in `rewrite`."""
        self.folded, self.maps = folded, Maps.of(surrogates)
        self.thresholds, self.keep_top1 = thresholds, keep_top1

    def takes(self, routing: Routing) -> bool:
        """Whether the kernels can decide for this batch."""
        return supported(self.folded, routing)

    def decide(self, routing: Routing, scale: Tensor | None = None, price: Price | None = None) -> Decision:
        """The whole decision, with what surrogates answer and what is counted; one decode batch.

        `scale` is as in `ThresholdPolicy`.
        """
        given = (self.folded, routing, self.thresholds, self.keep_top1, scale, price, self.maps is not None)
        decision, left_out = rewrite(*given)
        if self.maps is None or left_out is None:
            return decision
        with current(routing.logits.device):
            addition = answer(self.maps, routing.hidden, routing.indices.contiguous(), left_out)
            return decision._replace(addition=addition)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Whose shapes the time of a decision depends on."""
        return (*self.folded, *((self.maps.down,) if self.maps else ()))

    def is_faster(self, routing: Routing, plain: "Form") -> bool:
        """Whether it takes less time than `plain`; see `is_faster`."""
        return routing.logits.is_cuda and is_faster(self.parts, routing, self.decide, plain)


_verdicts: dict[tuple[object, ...], bool] = {}


Form = Callable[[Routing], object]


def is_faster(parts: Sequence[Tensor], routing: Routing, fused: Form, plain: Form) -> bool:
    """Whether `fused` takes less time than `plain` for `routing`, on the CUDA device where these are.

    Both are run and timed the first time that a layer whose parts have these shapes meets a batch of this size, up to a power of two;
    that waits for the device. Nothing is timed while a CUDA graph is captured or torch compiles: what was never timed
    counts as faster then. Kernels that cannot be built here, e.g. because there is no C compiler, are never faster.
    """
    if torch.compiler.is_compiling():
        return True
    shapes = (routing.indices.shape[-1], *(part.shape for part in parts), *(part.dtype for part in routing))
    key = (routing.logits.device, _padded(routing.logits.shape[-2]), *shapes)
    if key not in _verdicts:
        if torch.cuda.is_current_stream_capturing():
            return True
        try:
            with torch.cuda.device(routing.logits.device):
                _verdicts[key] = milliseconds(fused, routing) < milliseconds(plain, routing)
        except Exception as error:
            # A model must run on a machine where only the kernels do not.
            reason = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(f"deciding without Triton kernels: {type(error).__name__}: {reason}", stacklevel=2)
            _verdicts[key] = False
    return _verdicts[key]


def milliseconds(form: Form, routing: Routing, repeats: int = 10) -> float:
    """The shortest of some runs on the current CUDA device, launches included, after as many that only warm up."""
    shortest = float("inf")
    for repeat in range(2 * repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        form(routing)
        end.record()
        end.synchronize()
        if repeat >= repeats:
            shortest = min(shortest, start.elapsed_time(end))
    return shortest
