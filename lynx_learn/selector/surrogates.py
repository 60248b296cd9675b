"""Low-rank stand-ins for experts: `f(x) = B A x + c`, fitted in closed form by weighted reduced-rank ridge regression.

Reduced-rank regression after Izenman (1975), "Reduced-rank regression for the multivariate linear model"; with a ridge
penalty after Mukherjee and Zhu (2011), "Reduced rank ridge regression and its kernel extensions".
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

# Ridge penalties tried, as multiples of the mean diagonal of the Gram matrix; the last leaves little but the mean.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Up to this share of the experts' bytes, all surrogates are read in one product.
SMALL_SHARE = 0.02


class Surrogates(nn.Module):
    """The surrogates of one layer's experts.

    `down` `(experts, rank, hidden)`, `up` `(experts, rank, hidden)` and `constant` `(experts, hidden)`; rank 0 means no
    surrogate: what is left out then adds nothing.
    """

    def __init__(self, experts: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.form = "dense"
        self.down = nn.Parameter(torch.zeros(experts, rank, hidden), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(experts, rank, hidden), requires_grad=False)
        self.constant = nn.Parameter(torch.zeros(experts, hidden), requires_grad=False)

    @property
    def bytes_each(self) -> int:
        """Bytes of one expert's surrogate."""
        if not self.rank:
            return 0
        return sum(t[0].numel() * t.element_size() for t in self.parameters())

    @torch.no_grad()
    def put(self, expert: int, down: Tensor, up: Tensor, constant: Tensor) -> None:
        """Put one expert's map in place; down and up `(at most rank, hidden)`, the rest stays 0."""
        self.down[expert, self.rank - len(down) :] = down
        self.up[expert, self.rank - len(up) :] = up
        self.constant[expert] = constant

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Round to the precision that the experts, and so the surrogates at decode, are in."""
        for tensor in self.parameters():
            tensor.copy_(tensor.to(dtype))

    def choose(self, expert_bytes: int) -> None:
        """Choose the form in which assignments are answered, on this device and beside experts of so many bytes.

        On a CPU those that answer are picked out first: their number is known there without waiting. Elsewhere the form
        must not depend on values. Where all surrogates together are a small share of the experts, one product with all
        of them costs least time; where they are not, `grouped_mm` reads only those that answer, if it can: it wants
        bfloat16 and rows of multiples of 16 bytes.
        """
        able = self.down.dtype == torch.bfloat16 and not self.rank % 8 and not self.down.shape[-1] % 8
        small = self.bytes_each <= SMALL_SHARE * expert_bytes
        on_cpu = self.down.device.type == "cpu"
        self.form = "picked" if on_cpu else "grouped" if able and not small else "dense"

    def bytes_read(self, skipped: float, batches: int) -> float:
        """Bytes that decode batches read which left out `skipped` experts in all."""
        return self.bytes_each * (float(self.down.shape[0] * batches) if self.form == "dense" else skipped)

    def output(self, expert: int, hidden: Tensor) -> Tensor:
        """One surrogate's output `(tokens, hidden)` in float32, from `hidden` `(tokens, hidden)`, on its device."""
        down, up, constant = (part[expert].to(hidden.device).float() for part in (self.down, self.up, self.constant))
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
        by_expert = torch.zeros(*weights.shape[:-1], self.down.shape[0], dtype=weights.dtype, device=weights.device)
        by_expert = by_expert.scatter_add(-1, indices, weights)
        if self.form == "picked" and not torch.compiler.is_compiling():
            picked = by_expert.flatten(0, -2).any(0).nonzero().squeeze(-1)
            if not len(picked):
                return torch.zeros_like(hidden)
            parts = (part.index_select(0, picked) for part in (self.down, self.up, self.constant))
            return weighted_sum(hidden, by_expert.index_select(-1, picked), *parts)
        return self(hidden, by_expert)

    def _answer_grouped(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Assignments are sorted by expert, so that each surrogate that answers is read once and no other at all."""
        experts, top_k = self.down.shape[0], indices.shape[-1]
        x, weights = hidden.to(self.down.dtype).flatten(0, -2), weights.to(self.down.dtype)
        silent = weights.flatten() == 0
        expert, order = indices.flatten().masked_fill(silent, experts).sort(stable=True)
        counts = torch.zeros(experts + 1, dtype=torch.int32, device=x.device)
        ends = counts.scatter_add(0, expert, torch.ones_like(expert, dtype=torch.int32))[:-1].cumsum(0).int()
        live = (expert < experts).unsqueeze(-1)
        nothing = torch.zeros((), dtype=x.dtype, device=x.device)
        # Rows behind the last expert are left as they were in memory.
        codes = functional.grouped_mm(x[order // top_k], self.down.transpose(-2, -1), offs=ends)
        output = functional.grouped_mm(torch.where(live, codes, nothing), self.up, offs=ends)
        output = torch.where(live, output + self.constant[expert.clamp_max(experts - 1)], nothing)
        back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        return (output[back].unflatten(0, (-1, top_k)) * weights.reshape(-1, top_k, 1)).sum(1).view(hidden.shape)

    def forward(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the surrogates' outputs `(..., hidden)`.

        Args:
            hidden: what enters the block `(..., hidden)`.
            weights: weight of each expert's surrogate for each token `(..., experts)`, 0 where it does not answer.
        """
        return weighted_sum(hidden, weights, self.down, self.up, self.constant)


def weighted_sum(hidden: Tensor, weights: Tensor, down: Tensor, up: Tensor, constant: Tensor) -> Tensor:
    """Weighted sum of the surrogates' outputs `(..., hidden)`.

    Args:
        hidden: what enters the block `(..., hidden)`.
        weights: of each surrogate `(..., experts)`.
        down, up, constant: `(experts, rank, hidden)` twice, and `(experts, hidden)`.
    """
    x, weights = hidden.to(down.dtype), weights.to(down.dtype)
    codes = (x @ down.flatten(0, 1).T).unflatten(-1, down.shape[:2])
    codes = (codes * weights.unsqueeze(-1)).flatten(-2).flatten(0, -2)
    return torch.addmm(weights.flatten(0, -2) @ constant, codes, up.flatten(0, 1)).view(hidden.shape)


@dataclass
class Moments:
    """Weighted sums of one expert's inputs x and outputs y, which are all that fitting and scoring a map needs.

    Accumulated in float64 over chunks, so any number of tokens fits.
    """

    weight: float
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: float

    @classmethod
    def empty(cls, hidden: int) -> "Moments":
        vector, matrix = torch.zeros(hidden, dtype=torch.float64), torch.zeros(hidden, hidden, dtype=torch.float64)
        return cls(0.0, vector, vector.clone(), matrix, matrix.clone(), 0.0)

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add tokens: x and y `(tokens, hidden)`, weights `(tokens,)`."""
        x, y, weights = x.double().cpu(), y.double().cpu(), weights.double().cpu()
        weighted = x * weights.unsqueeze(1)
        self.weight += float(weights.sum())
        self.x += weighted.sum(0)
        self.y += weights @ y
        self.xx += weighted.T @ x
        self.xy += weighted.T @ y
        self.yy += float(weights @ y.square().sum(1))

    def error(self, matrix: Tensor, constant: Tensor) -> float:
        """Weighted sum of squared errors of `x @ matrix + constant`."""
        squares = (matrix * (self.xx @ matrix)).sum() + self.weight * constant @ constant
        cross = (matrix * self.xy).sum() + self.y @ constant - (self.x @ matrix) @ constant
        return float(self.yy + squares - 2 * cross)


def fit_surrogate(fit: Moments, check: Moments, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The surrogate of one expert: down and up, both `(rank, hidden)`, and the constant `(hidden,)`, in float32.

    `fit` holds the tokens to fit on, `check` others by which the ridge penalty is chosen. An expert that saw no token
    gets the zero map.
    """
    hidden = fit.x.shape[0]
    zero = torch.zeros(rank, hidden)
    if fit.weight <= 0.0:
        return zero, zero.clone(), torch.zeros(hidden)
    mean_x, mean_y = fit.x / fit.weight, fit.y / fit.weight
    xx = fit.xx - fit.weight * torch.outer(mean_x, mean_x)
    xy = fit.xy - fit.weight * torch.outer(mean_x, mean_y)
    best = (check.error(torch.zeros_like(xx), mean_y), zero, zero.clone(), mean_y)
    scale = float(xx.diagonal().mean())
    for penalty in PENALTIES if scale > 0 else ():
        ridged = xx + penalty * scale * torch.eye(hidden, dtype=torch.float64)
        full = torch.linalg.solve(ridged, xy)
        # Directions of the output along which the ridge fit carries the most energy.
        up = torch.linalg.eigh(full.T @ ridged @ full).eigenvectors[:, hidden - rank :].T
        down = (full @ up.T).T
        matrix = down.T @ up
        constant = mean_y - mean_x @ matrix
        error = check.error(matrix, constant)
        if error < best[0]:
            best = (error, down, up, constant)
    return best[1].float(), best[2].float(), best[3].float()
