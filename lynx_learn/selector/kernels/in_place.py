"""A decode batch's decision written over what the router has chosen, for an engine whose experts read it from there.

Two kernels decide and count, and three answer for surrogates, of which the last adds to what the experts return. Nothing of
it waits for the host, and no shape depends on values. Importing this module needs triton.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...moe.decision import Routing, Sums
from ...moe.kernels.grouping import current
from .answers import SUM_COLUMNS, outputs_of, total
from .triton import Fused, choose, costs_by_expert, is_faster, supported, tiles, usable

Finish = Callable[[Tensor, Tensor], None]
"""Called with what the experts have returned `(T, hidden)` and the indices that they ran, and adds what surrogates answer."""
Form = Callable[[Routing, Tensor], Finish]
"""Decides, and counts in the vector."""

_ROUTED, _LOADED, _ASSIGNMENTS = (tl.constexpr(int(at)) for at in (Sums.ROUTED, Sums.LOADED, Sums.ASSIGNMENTS))
_ANSWERED, _CHECK = tl.constexpr(int(Sums.ANSWERED)), tl.constexpr(int(Sums.CHECK))


@triton.jit(do_not_specialize=["tokens", "last"])
def _act(
    rows,
    routed_indices,
    routed_weights,
    scale,
    thresholds,
    indices,
    weights,
    left_out,
    sums,
    tokens,
    last,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    KEEP_TOP1: tl.constexpr,
    ANSWERED: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOKENS_PADDED: tl.constexpr,
    TOKENS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: which experts stay, `indices` and `weights` written anew, and what of it is counted.

    What was routed is read from where the kernel before has put it: a program's threads may hold the same assignment, and
    must not read what one of them has written.
    """
    used, leave, anchor, stands, votes = choose(
        rows,
        scale,
        scale,
        thresholds,
        thresholds,
        tokens,
        last,
        EXPERTS,
        KEEP_TOP1,
        False,
        True,
        False,
        EXPERTS_PADDED,
        TOKENS_PADDED,
        TOKENS_BLOCK,
    )
    can = usable(used, leave)
    answered, check = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    for start in range(0, TOKENS_PADDED * TOP_K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < tokens * TOP_K
        own = tl.load(routed_indices + at, mask=inside, other=0)
        weight = tl.load(routed_weights + at, mask=inside, other=0.0)
        stays = tl.gather(can, tl.maximum(own, 0), 0) != 0
        # Rows of padding may name no expert, and go on naming none.
        new = tl.where(stays | (own < 0), own, anchor)
        tl.store(indices + at, new.to(indices.dtype.element_ty), mask=inside)
        tl.store(weights + at, tl.where(stays, weight, 0.0).to(weights.dtype.element_ty), mask=inside)
        check += tl.where(inside, new, 0).to(tl.int64)
        if ANSWERED:
            # Rows of padding ask for no surrogate.
            goes = (stays == 0) & (tl.load(scale + at // TOP_K, mask=inside, other=0.0) > 0.0)
            tl.store(left_out + at, tl.where(goes, weight, 0.0), mask=inside)
            answered += goes.to(tl.int64)
    # What a graph runs while nothing may be skipped is not counted.
    acts = (votes > 0).to(tl.int64)
    active = tl.sum((stands > 0.0).to(tl.int64), 0)
    _add(sums + _ROUTED, acts * tl.sum(used.to(tl.int64), 0))
    _add(sums + _LOADED, acts * tl.sum((used & (leave == 0)).to(tl.int64), 0))
    _add(sums + _ASSIGNMENTS, acts * active * TOP_K)
    _add(sums + _ANSWERED, acts * tl.sum(answered, 0))
    _add(sums + _CHECK, tl.sum(check, 0))


@triton.jit
def _add(place, value):
    tl.store(place, tl.load(place) + value)


@triton.jit
def _finish(
    outputs,
    left_out,
    output,
    indices,
    sums,
    row_stride,
    column_stride,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    ANSWERS: tl.constexpr,
    COLUMNS_BLOCK: tl.constexpr,
):
    """A program for each token and block of columns: adds what its surrogates put out, and takes off what was run."""
    token = tl.program_id(0)
    if tl.program_id(1) == 0:
        slot = tl.arange(0, TOP_K_PADDED)
        ran = tl.load(indices + token * TOP_K + slot, mask=slot < TOP_K, other=0).to(tl.int64)
        tl.atomic_add(sums + _CHECK, -tl.sum(ran, 0))  # of integers: in any order the same
    if ANSWERS:
        column = tl.program_id(1) * COLUMNS_BLOCK + tl.arange(0, COLUMNS_BLOCK)
        place = output + token * row_stride + column * column_stride
        own = tl.load(place, mask=column < HIDDEN, other=0.0).to(tl.float32)
        own += total(outputs, left_out, token, column, HIDDEN, TOP_K, TOP_K_PADDED)
        tl.store(place, own.to(output.dtype.element_ty), mask=column < HIDDEN)


class InPlace:
    """One layer's decision in kernels, for an engine."""

    def __init__(self, fused: Fused, factor: float, adds: bool) -> None:
        """`factor` is what the engine multiplies the experts' output with; `adds`: whether surrogates answer here."""
        self.fused, self.factor = fused, factor
        self.maps = fused.maps if adds else None

    def takes(self, routing: Routing) -> bool:
        """Whether the kernels can decide for this batch."""
        return (
            supported(self.fused.folded, routing, (torch.int32, torch.int64))
            and routing.indices.is_contiguous()
            and routing.weights.is_contiguous()
        )

    def decide(self, routing: Routing, sums: Tensor) -> Finish:
        """Rewrite a routing's `indices`, int32 or int64, and `weights`, both `(T, top_k)` without gaps.

        Args:
            routing: of one decode batch, without a leading dimension. `active` holds scales, as in `ThresholdPolicy.decide`,
                but 0 for tokens that are not active; these may have experts below 0.
            sums: what is added to, as in `Sums`.
        """
        hidden, _, indices, weights, scale = routing
        scale, fused, (tokens, top_k) = scale.contiguous(), self.fused, indices.shape
        own = torch.empty(tokens, top_k, dtype=torch.int32, device=indices.device)
        full, left_out = torch.empty(2, tokens, top_k, dtype=torch.float32, device=indices.device).unbind(0)
        with current(indices.device):
            rows = costs_by_expert(fused.folded, routing, fused.keep_top1, scale, False, self.factor, (own, full))
            _act[(1,)](
                rows,
                own,
                full,
                scale,
                fused.thresholds,
                indices,
                weights,
                left_out,
                sums,
                tokens,
                len(fused.thresholds) - 1,
                KEEP_TOP1=fused.keep_top1,
                ANSWERED=fused.maps is not None,
                **tiles(tokens, routing.logits.shape[-1], top_k),
            )
            # Before the experts: their kernels may write over the hidden states.
            outputs = None if self.maps is None else outputs_of(self.maps, hidden, own, left_out)
        return partial(_finish_with, sums, left_out, outputs)

    def is_faster(self, routing: Routing, sums: Tensor, plain: Form) -> bool:
        """Whether it takes less time than `plain`, as in `triton.is_faster`; both are tried on copies."""
        if not routing.logits.is_cuda:
            return False

        def tried(form: Form) -> Callable[[Routing], object]:
            return lambda own: form(
                own._replace(indices=own.indices.clone(), weights=own.weights.clone()), sums.clone()
            )

        return is_faster(self.fused.parts, routing, tried(self.decide), tried(plain))


def _finish_with(sums: Tensor, left_out: Tensor, outputs: Tensor | None, output: Tensor, indices: Tensor) -> None:
    tokens, top_k = left_out.shape
    size = 1 if outputs is None else outputs.shape[-1]
    with current(output.device):
        _finish[(tokens, triton.cdiv(size, SUM_COLUMNS))](
            left_out if outputs is None else outputs,
            left_out,
            output,
            indices.contiguous(),
            sums,
            output.stride(0),
            output.stride(1),
            HIDDEN=size,
            TOP_K=top_k,
            TOP_K_PADDED=triton.next_power_of_2(top_k),
            ANSWERS=outputs is not None,
            COLUMNS_BLOCK=SUM_COLUMNS,
            num_warps=4,
        )
