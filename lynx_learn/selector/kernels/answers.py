"""What surrogates answer to a decode batch, in three Triton kernels: as `Surrogates.answer`.

Only the surrogates that answer are read, each once for up to a block of tokens, and every sum has a fixed order. Importing
this module needs triton.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..surrogates import Surrogates

# The interpreter multiplies the bits of bfloat16 as if they were integers.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Rows of `down` that a program takes at once, and columns of the output.
_ROWS, _COLUMNS, SUM_COLUMNS = 16, 128, 256
# Bytes that it reads at once of each row of `down`, and of each column of `up`.
_ROW_BYTES, _COLUMN_BYTES = 256, 128
# A tile of a product has this many tokens at least; beyond the most, further programs take the others.
_FEWEST_TOKENS, _MOST_TOKENS = 16, 32


class Maps(NamedTuple):
    """One layer's surrogates, with what a step must not ask the device for."""

    down: Tensor
    """(rows, hidden); so is `up`."""
    up: Tensor
    constant: Tensor
    """(experts, hidden)."""
    starts: Tensor
    """(experts + 1,), int64: where each expert's rows begin."""
    largest: int
    """Rows of the expert that has most."""

    @classmethod
    def of(cls, surrogates: Surrogates) -> "Maps | None":
        """None where there are no surrogates."""
        if not surrogates.rank:
            return None
        parts = surrogates.down, surrogates.up, surrogates.constant
        down, up, constant = (part.detach().contiguous() for part in parts)
        return cls(down, up, constant, surrogates.starts, int(surrogates.ranks.max()))


@triton.jit
def _asked(indices, weights, expert, token, tokens, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr):
    """Whether any of the tokens has an assignment to this expert that its surrogate answers."""
    slot = tl.arange(0, TOP_K_PADDED)
    inside = (token < tokens)[:, None] & (slot < TOP_K)[None, :]
    own = tl.load(indices + token[:, None] * TOP_K + slot[None, :], mask=inside, other=-1)
    weight = tl.load(weights + token[:, None] * TOP_K + slot[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.max(tl.max(((own == expert) & (weight != 0.0)).to(tl.int32), 1), 0) > 0


@triton.jit
def _times(a, b, to):
    """a · b added to `to`."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, to, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])
def _codes(
    hidden,
    indices,
    weights,
    down,
    starts,
    codes,
    tokens,
    hidden_stride,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    TOKENS_BLOCK: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
):
    """A program for each block of tokens, expert and block of its rows: `hidden` times these rows, into `codes`.

    Nothing is written where no token asks.
    """
    token = tl.program_id(0) * TOKENS_BLOCK + tl.arange(0, TOKENS_BLOCK)
    expert = tl.program_id(1)
    first = tl.load(starts + expert) + tl.program_id(2) * ROWS_BLOCK
    end = tl.load(starts + expert + 1)
    if first >= end:
        return
    if _asked(indices, weights, expert, token, tokens, TOP_K, TOP_K_PADDED):
        row = first + tl.arange(0, ROWS_BLOCK)
        products = tl.zeros((TOKENS_BLOCK, ROWS_BLOCK), tl.float32)
        for start in range(0, HIDDEN, HIDDEN_BLOCK):
            at = start + tl.arange(0, HIDDEN_BLOCK)
            inside = (token < tokens)[:, None] & (at < HIDDEN)[None, :]
            x = tl.load(hidden + token[:, None] * hidden_stride + at[None, :], mask=inside, other=0.0)
            inside = (at < HIDDEN)[:, None] & (row < end)[None, :]
            into = tl.load(down + row[None, :] * HIDDEN + at[:, None], mask=inside, other=0.0)
            products = _times(x.to(into.dtype), into, products)
        inside = (token < tokens)[:, None] & (row < end)[None, :]
        tl.store(codes + token[:, None] * ROWS + row[None, :], products.to(codes.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _outputs(
    codes,
    indices,
    weights,
    up,
    constant,
    starts,
    outputs,
    tokens,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    TOKENS_BLOCK: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    COLUMNS_BLOCK: tl.constexpr,
):
    """A program for each block of tokens, expert and block of columns: its weighted output for each token that asks.

    `outputs` is `(tokens, top_k, hidden)`; nothing is written for assignments that no surrogate answers.
    """
    token = tl.program_id(0) * TOKENS_BLOCK + tl.arange(0, TOKENS_BLOCK)
    expert = tl.program_id(1)
    column = tl.program_id(2) * COLUMNS_BLOCK + tl.arange(0, COLUMNS_BLOCK)
    if _asked(indices, weights, expert, token, tokens, TOP_K, TOP_K_PADDED):
        end = tl.load(starts + expert + 1)
        output = tl.zeros((TOKENS_BLOCK, COLUMNS_BLOCK), tl.float32)
        for first in range(tl.load(starts + expert), end, ROWS_BLOCK):
            row = first + tl.arange(0, ROWS_BLOCK)
            inside = (token < tokens)[:, None] & (row < end)[None, :]
            code = tl.load(codes + token[:, None] * ROWS + row[None, :], mask=inside, other=0.0)
            inside = (row < end)[:, None] & (column < HIDDEN)[None, :]
            out = tl.load(up + row[:, None] * HIDDEN + column[None, :], mask=inside, other=0.0)
            output = _times(code, out, output)
        output += tl.load(constant + expert * HIDDEN + column, mask=column < HIDDEN, other=0.0).to(tl.float32)[None, :]
        for slot in tl.static_range(TOP_K):
            place = token * TOP_K + slot
            own = tl.load(indices + place, mask=token < tokens, other=-1)
            weight = tl.load(weights + place, mask=token < tokens, other=0.0).to(tl.float32)
            inside = ((own == expert) & (weight != 0.0))[:, None] & (column < HIDDEN)[None, :]
            value = (output * weight[:, None]).to(outputs.dtype.element_ty)
            tl.store(outputs + place[:, None] * HIDDEN + column[None, :], value, mask=inside)


@triton.jit
def total(outputs, weights, token, column, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr):
    """The sum of what a token's surrogates put out, in these columns."""
    slot = tl.arange(0, TOP_K_PADDED)
    place = token * TOP_K + slot
    weight = tl.load(weights + place, mask=slot < TOP_K, other=0.0).to(tl.float32)
    inside = (weight != 0.0)[:, None] & (column < HIDDEN)[None, :]
    output = tl.load(outputs + place[:, None] * HIDDEN + column[None, :], mask=inside, other=0.0)
    return tl.sum(output.to(tl.float32), 0)


@triton.jit
def _sum(
    outputs,
    weights,
    addition,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    COLUMNS_BLOCK: tl.constexpr,
):
    """A program for each token and block of columns."""
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS_BLOCK + tl.arange(0, COLUMNS_BLOCK)
    sums = total(outputs, weights, token, column, HIDDEN, TOP_K, TOP_K_PADDED)
    tl.store(addition + token * HIDDEN + column, sums.to(addition.dtype.element_ty), mask=column < HIDDEN)


def rows_apart(hidden: Tensor) -> Tensor:
    """Itself, where the numbers of each row lie side by side; rows may lie anywhere."""
    return hidden if hidden.stride(-1) == 1 else hidden.contiguous()


def outputs_of(maps: Maps, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """What each surrogate puts out that answers, weighted, `(tokens, top_k, hidden)`; undefined where none does.

    Arguments as in `answer`, but that an expert below 0 is none.
    """
    hidden = rows_apart(hidden)
    size, top_k = hidden.shape[-1], indices.shape[-1]
    tokens, experts, rows = indices.numel() // top_k, len(maps.constant), len(maps.down)
    codes = torch.empty(tokens, rows, dtype=maps.down.dtype, device=hidden.device)
    outputs = torch.empty(tokens, top_k, size, dtype=maps.down.dtype, device=hidden.device)
    block = min(max(triton.next_power_of_2(tokens), _FEWEST_TOKENS), _MOST_TOKENS)
    # Programs for other tokens run side by side, so that what they read is read from memory once.
    shape = {
        "HIDDEN": size,
        "ROWS": rows,
        "TOP_K": top_k,
        "TOP_K_PADDED": triton.next_power_of_2(top_k),
        "TOKENS_BLOCK": block,
    }
    blocks = triton.cdiv(tokens, block)
    _codes[(blocks, experts, triton.cdiv(maps.largest, _ROWS))](
        hidden,
        indices,
        weights,
        maps.down,
        maps.starts,
        codes,
        tokens,
        hidden.stride(-2),
        **shape,
        ROWS_BLOCK=_ROWS,
        HIDDEN_BLOCK=_ROW_BYTES // maps.down.element_size(),
        num_warps=4,
        num_stages=4,
    )
    _outputs[(blocks, experts, triton.cdiv(size, _COLUMNS))](
        codes,
        indices,
        weights,
        maps.up,
        maps.constant,
        maps.starts,
        outputs,
        tokens,
        **shape,
        ROWS_BLOCK=_COLUMN_BYTES // maps.up.element_size(),
        COLUMNS_BLOCK=_COLUMNS,
        num_warps=4,
        num_stages=3,
    )
    return outputs


def answer(maps: Maps, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """As `Surrogates.answer`; launched on the current device. Indices and weights lie in memory without gaps."""
    outputs = outputs_of(maps, hidden, indices, weights)
    tokens, top_k, size = outputs.shape
    addition = torch.empty(hidden.shape, dtype=maps.down.dtype, device=hidden.device)
    _sum[(tokens, triton.cdiv(size, SUM_COLUMNS))](
        outputs,
        weights,
        addition,
        HIDDEN=size,
        TOP_K=top_k,
        TOP_K_PADDED=triton.next_power_of_2(top_k),
        COLUMNS_BLOCK=SUM_COLUMNS,
        num_warps=4,
    )
    return addition
