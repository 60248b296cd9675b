"""Low-rank stand-ins for experts: `f(x) = B A x + c`.

Ranks are uneven: each further direction goes to the expert where it explains most of what leaving the expert out costs.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

# An expert may get this many times the mean rank of its layer.
MOST_RANKS = 4
# Up to this share of the experts' bytes, all surrogates are read in one product.
SMALL_SHARE = 0.02


class Surrogates(nn.Module):
    """The surrogates of one layer's experts, of uneven rank.

    The maps lie one below the other: `down` and `up` `(rows, hidden)` with `owner` `(rows,)`, the expert of each row in
    rising order, and `constant` `(experts, hidden)`. There are `rank` rows for each expert on the mean; rank 0 means no
    surrogate: what is left out then adds nothing.
    """

    owner: Tensor

    def __init__(self, experts: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.form = "dense"
        self.down = nn.Parameter(torch.zeros(experts * rank, hidden), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(experts * rank, hidden), requires_grad=False)
        self.constant = nn.Parameter(torch.zeros(experts, hidden), requires_grad=False)
        self.register_buffer("owner", torch.arange(experts).repeat_interleave(rank))
        self.padded: tuple[Tensor, Tensor] | None = None
        """What the grouped form reads instead of `down` and `up`: `(experts, largest rank, hidden)`."""

    @property
    def experts(self) -> int:
        return len(self.constant)

    @property
    def ranks(self) -> Tensor:
        """Rows of each expert `(experts,)`."""
        return torch.bincount(self.owner, minlength=self.experts)

    @property
    def largest(self) -> int:
        """The largest rank, as a multiple of 8, which the grouped product wants."""
        return -(-int(self.ranks.max()) // 8) * 8

    @property
    def starts(self) -> Tensor:
        """Where each expert's rows begin, and where the last one's end `(experts + 1,)`."""
        return functional.pad(self.ranks.cumsum(0), (1, 0))

    def check(self) -> None:
        """Refuse an `owner` that no fit gives, which would be read past the ends.

        Raises:
            ValueError: it is not in order, or names experts that are not there.
        """
        owner = self.owner
        if (owner.diff() < 0).any() or (owner < 0).any() or (owner >= self.experts).any():
            raise ValueError("owner does not name experts in rising order")

    @property
    def bytes_each(self) -> Tensor:
        """Bytes of each expert's surrogate `(experts,)`."""
        hidden = self.constant.shape[-1]
        numbers = self.ranks * 2 * hidden + hidden if self.rank else torch.zeros_like(self.ranks)
        return numbers * self.constant.element_size()

    @property
    def bytes(self) -> int:
        """Bytes of all of them together."""
        return sum(t.numel() * t.element_size() for t in self.parameters()) if self.rank else 0

    def of(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """One expert's map: down and up `(its rank, hidden)`, and the constant `(hidden,)`."""
        own = slice(*self.starts[expert : expert + 2].tolist())
        return self.down[own], self.up[own], self.constant[expert]

    @torch.no_grad()
    def put(self, fits: "list[Fit]") -> None:
        """Put all experts' maps in place, with the ranks that explain most together."""
        ranks = choose_ranks([fit.gains for fit in fits], len(self.owner))
        self.owner.copy_(torch.arange(self.experts).repeat_interleave(torch.tensor(ranks)))
        for expert, (fit, rank) in enumerate(zip(fits, ranks, strict=True)):
            down, up, constant = self.of(expert)
            for whole, part in ((down, fit.down[:rank]), (up, fit.up[:rank])):
                whole.zero_()[: len(part)] = part
            constant.copy_(fit.constant(rank))

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Round to the precision that the experts, and so the surrogates at decode, are in."""
        for tensor in self.parameters():
            tensor.copy_(tensor.to(dtype))

    def choose(self, expert_bytes: int) -> None:
        """Take the form that fits best; see `fitting`."""
        self.use(self.fitting(expert_bytes))

    def fitting(self, expert_bytes: int) -> str:
        """The form in which assignments are answered fastest, on this device and beside experts of so many bytes.

        On a CPU those that answer are picked out first: their number is known there without waiting. Elsewhere the form
        must not depend on values. Where all surrogates together are a small share of the experts, one product with all
        of them costs least time; where they are not, `grouped_mm` reads only those that answer, if it can: it wants
        bfloat16 and rows of multiples of 16 bytes.
        """
        able = self.down.dtype == torch.bfloat16 and not self.down.shape[-1] % 8
        small = self.bytes <= SMALL_SHARE * expert_bytes * self.experts
        on_cpu = self.down.device.type == "cpu"
        return "picked" if on_cpu else "grouped" if able and not small else "dense"

    def use(self, form: str) -> None:
        """Take a form; for the grouped one the rows are padded now, so that a step's shapes depend on no values."""
        self.form = form
        self.padded = (self._pad(self.down), self._pad(self.up)) if form == "grouped" else None

    def bytes_read(self, skipped: Tensor, batches: int, form: str | None = None) -> float:
        """Bytes that decode batches read which left out each expert so many times, `skipped` `(experts,)`.

        In this form, or in another one, of which "picked" reads what answers and nothing else.
        """
        form = form or self.form
        if form == "dense":
            return float(self.bytes * batches)
        each = self.bytes_each
        if form == "grouped" and self.rank:  # what is read is padded
            hidden = self.constant.shape[-1]
            each = torch.full_like(each, (self.largest * 2 * hidden + hidden) * self.constant.element_size())
        return float(each.double().cpu() @ skipped.double().cpu())

    def output(self, expert: int, hidden: Tensor) -> Tensor:
        """One surrogate's output `(tokens, hidden)` in float32, from `hidden` `(tokens, hidden)`, on its device."""
        down, up, constant = (part.to(hidden.device).float() for part in self.of(expert))
        return hidden.float() @ down.T @ up + constant

    def answer(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the surrogates' outputs `(..., hidden)`, from assignments.

        Args:
            hidden: what enters the block `(..., hidden)`.
            indices: experts `(..., top_k)`.
            weights: their weights `(..., top_k)`, 0 where the surrogate does not answer.
        """
        if self.form == "grouped":
            return self._answer_grouped(hidden, indices, weights)
        by_expert = torch.zeros(*weights.shape[:-1], self.experts, dtype=weights.dtype, device=weights.device)
        by_expert = by_expert.scatter_add(-1, indices, weights)
        if self.form == "picked" and not torch.compiler.is_compiling():
            picked = by_expert.flatten(0, -2).any(0)
            if not picked.any():
                return torch.zeros_like(hidden)
            rows, chosen = picked[self.owner].nonzero().squeeze(-1), picked.nonzero().squeeze(-1)
            owner = (picked.cumsum(0) - 1)[self.owner[rows]]
            parts = (self.down.index_select(0, rows), self.up.index_select(0, rows))
            constant = self.constant.index_select(0, chosen)
            return weighted_sum(hidden, by_expert.index_select(-1, chosen), *parts, constant, owner)
        return self(hidden, by_expert)

    def _answer_grouped(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Assignments are sorted by expert, so that each surrogate that answers is read once and no other at all."""
        assert self.padded is not None
        down, up = self.padded
        experts, top_k = self.experts, indices.shape[-1]
        x, weights = hidden.to(down.dtype).flatten(0, -2), weights.to(down.dtype)
        silent = weights.flatten() == 0
        expert, order = indices.flatten().masked_fill(silent, experts).sort(stable=True)
        counts = torch.zeros(experts + 1, dtype=torch.int32, device=x.device)
        ends = counts.scatter_add(0, expert, torch.ones_like(expert, dtype=torch.int32))[:-1].cumsum(0).int()
        live = (expert < experts).unsqueeze(-1)
        nothing = torch.zeros((), dtype=x.dtype, device=x.device)
        # Rows behind the last expert are left as they were in memory.
        codes = functional.grouped_mm(x[order // top_k], down.transpose(-2, -1), offs=ends)
        output = functional.grouped_mm(torch.where(live, codes, nothing), up, offs=ends)
        output = torch.where(live, output + self.constant[expert.clamp_max(experts - 1)], nothing)
        back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        return (output[back].unflatten(0, (-1, top_k)) * weights.reshape(-1, top_k, 1)).sum(1).view(hidden.shape)

    def _pad(self, rows: Tensor) -> Tensor:
        """`(experts, largest rank, hidden)`."""
        padded = rows.new_zeros(self.experts, self.largest, rows.shape[-1])
        place = torch.arange(len(rows), device=rows.device) - self.starts[self.owner]
        padded[self.owner, place] = rows
        return padded

    def forward(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the surrogates' outputs `(..., hidden)`.

        Args:
            hidden: what enters the block `(..., hidden)`.
            weights: weight of each expert's surrogate for each token `(..., experts)`, 0 where it does not answer.
        """
        return weighted_sum(hidden, weights, self.down, self.up, self.constant, self.owner)


def weighted_sum(hidden: Tensor, weights: Tensor, down: Tensor, up: Tensor, constant: Tensor, owner: Tensor) -> Tensor:
    """Weighted sum of the surrogates' outputs `(..., hidden)`.

    Args:
        hidden: what enters the block `(..., hidden)`.
        weights: of each surrogate `(..., experts)`.
        down, up, constant, owner: as in `Surrogates`.
    """
    x, weights = hidden.to(down.dtype), weights.to(down.dtype)
    codes = (x @ down.T * weights.index_select(-1, owner)).flatten(0, -2)
    return torch.addmm(weights.flatten(0, -2) @ constant, codes, up).view(hidden.shape)


def rank_for(share: float, expert_numbers: float, hidden: int) -> int:
    """The mean rank at which surrogates hold this share of their experts' numbers; at least 1, 0 for none."""
    return min(max(round((share * expert_numbers - hidden) / (2 * hidden)), 1), hidden) if share else 0


def choose_ranks(gains: list[Tensor], rows: int) -> list[int]:
    """How many directions each expert gets so that `rows` of them explain most together.

    Args:
        gains: what each direction of each expert explains, falling; all of one length.
        rows: of all experts together.
    """
    each = len(gains[0]) if gains else 0
    best = torch.cat(gains).argsort(descending=True, stable=True)[:rows] if gains else torch.zeros(0)
    return torch.bincount(best // max(each, 1), minlength=len(gains)).tolist()


class Fit(NamedTuple):
    """One expert's surrogate at any rank: directions in the order of what they explain.

    Those that explain nothing need not be there but for their gains.
    """

    down: Tensor
    """(directions, hidden)."""
    up: Tensor
    """(directions, hidden)."""
    gains: Tensor
    """(directions,), the weighted sum of squares that each explains; falling."""
    mean_x: Tensor
    """(hidden,)."""
    mean_y: Tensor

    def constant(self, rank: int) -> Tensor:
        """The constant `(hidden,)` that goes with so many directions."""
        return self.mean_y - self.mean_x @ self.down[:rank].T @ self.up[:rank]

    def output(self, hidden: Tensor, rank: int) -> Tensor:
        """What it answers `(tokens, hidden)` in float32 with so many directions, from `hidden` `(tokens, hidden)`."""
        down, up, constant = (
            part.to(hidden.device).float() for part in (self.down[:rank], self.up[:rank], self.constant(rank))
        )
        return hidden.float() @ down.T @ up + constant
