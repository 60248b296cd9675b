"""What a grouped product needs before and after it, in one Triton kernel each. Importing this module needs triton.

In PyTorch it is a dozen small operations, each a launch of its own. Every sum has a fixed order.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Each expert's program reads all assignments: beyond so many a sort takes less time.
MOST_ASSIGNMENTS = 8192
_ASSIGNMENTS, _COLUMNS = 1024, 256


class Groups(NamedTuple):
    """Assignments of a decode batch in the order of their experts; those with weight 0 belong to none and come last."""

    expert: Tensor
    """(assignments,), int64, of each row in that order; of rows that belong to none any."""
    token: Tensor
    """(assignments,), int64, of each row in that order."""
    ends: Tensor
    """(experts,), int32: where each expert's rows end."""
    places: Tensor
    """(assignments,), int64: the row of each assignment in its own order."""


@triton.jit(do_not_specialize=["assignments"])
def _place(
    indices,
    weights,
    expert,
    token,
    ends,
    places,
    assignments,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for each expert, and one more for assignments to none: rows for what is assigned to it."""
    own = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, PADDED, BLOCK):
        at = start + tl.arange(0, BLOCK)
        before += (_expert(indices, weights, at, assignments, EXPERTS) < own).to(tl.int32)
    row = tl.sum(before, 0)
    for start in range(0, PADDED, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mine = _expert(indices, weights, at, assignments, EXPERTS) == own
        ones = mine.to(tl.int32)
        place = row + tl.cumsum(ones, 0) - 1
        tl.store(expert + place, tl.minimum(own, EXPERTS - 1).to(tl.int64), mask=mine)
        tl.store(token + place, (at // TOP_K).to(tl.int64), mask=mine)
        tl.store(places + at, place.to(tl.int64), mask=mine)
        row += tl.sum(ones, 0)
    if own < EXPERTS:
        tl.store(ends + own, row)


@triton.jit
def _expert(indices, weights, at, assignments, EXPERTS: tl.constexpr):
    """Of each assignment: EXPERTS where its weight is 0, and one more where there is none."""
    inside = at < assignments
    own = tl.load(indices + at, mask=inside, other=0).to(tl.int32)
    weight = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, tl.where(weight != 0.0, own, EXPERTS), EXPERTS + 1)


@triton.jit
def _combine(
    rows,
    places,
    weights,
    output,
    ROUNDED: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for each token and block of columns: the weighted sum of its rows."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, TOP_K_PADDED)
    at = token * TOP_K + slot
    weight = tl.load(weights + at, mask=slot < TOP_K, other=0.0).to(tl.float32)
    place = tl.load(places + at, mask=slot < TOP_K, other=0)
    # Rows of weight 0 are left as they were in memory.
    inside = (weight != 0.0)[:, None] & (column < HIDDEN)[None, :]
    row = tl.load(rows + place[:, None] * HIDDEN + column[None, :], mask=inside, other=0.0).to(tl.float32)
    product = row * weight[:, None]
    if ROUNDED:  # as the product of two tensors is
        product = product.to(rows.dtype.element_ty).to(tl.float32)
    tl.store(output + token * HIDDEN + column, tl.sum(product, 0).to(output.dtype.element_ty), mask=column < HIDDEN)


def current(device: torch.device) -> AbstractContextManager[object]:
    """While open, Triton launches on this device, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def takes(hidden: Tensor, indices: Tensor, weights: Tensor) -> bool:
    """Whether the kernels were written for these: a decode batch, in types and a layout that they read."""
    parts = (hidden, weights)
    return (
        0 < indices.numel() <= MOST_ASSIGNMENTS
        and all(part.dtype in FLOATS and part.is_contiguous() for part in parts)
        and indices.dtype == torch.int64
        and indices.is_contiguous()
        and not torch.is_grad_enabled()
    )


def group(indices: Tensor, weights: Tensor, experts: int) -> Groups:
    """Group assignments `(tokens, top_k)` by expert."""
    count = indices.numel()
    expert, token, places = torch.empty(3, count, dtype=torch.int64, device=indices.device).unbind(0)
    ends = torch.empty(experts, dtype=torch.int32, device=indices.device)
    block = min(triton.next_power_of_2(count), _ASSIGNMENTS)
    with current(indices.device):
        _place[(experts + 1,)](
            indices,
            weights,
            expert,
            token,
            ends,
            places,
            count,
            EXPERTS=experts,
            TOP_K=indices.shape[-1],
            PADDED=triton.next_power_of_2(count),
            BLOCK=block,
            num_warps=4,
        )
    return Groups(expert, token, ends, places)


def combine(rows: Tensor, groups: Groups, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The weighted sum `(tokens, hidden)` of each token's rows, out of `rows` `(assignments, hidden)` in their groups."""
    (tokens, top_k), size = weights.shape, rows.shape[-1]
    output = torch.empty(tokens, size, dtype=dtype, device=rows.device)
    with current(rows.device):
        _combine[(tokens, triton.cdiv(size, _COLUMNS))](
            rows,
            groups.places,
            weights,
            output,
            ROUNDED=torch.promote_types(rows.dtype, weights.dtype) == rows.dtype,
            HIDDEN=size,
            TOP_K=top_k,
            TOP_K_PADDED=triton.next_power_of_2(top_k),
            BLOCK=_COLUMNS,
            num_warps=4,
        )
    return output
