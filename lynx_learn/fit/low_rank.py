"""The best low-rank affine stand-in for an expert: weighted reduced-rank ridge regression of its outputs on its inputs.

Reduced-rank regression after Izenman (1975), "Reduced-rank regression for the multivariate linear model"; with a ridge
penalty after Mukherjee and Zhu (2011), "Reduced rank ridge regression and its kernel extensions". With X and Y centred
and weighted, the directions are the leading eigenvectors of Y'PY, where P = X (X'X + penalty)⁻¹ X'. Neither that matrix
nor a full decomposition is made: P is applied through a Cholesky factor of the smaller one of X'X and XX' (of tokens and
width), and the leading directions come from subspace iteration (Halko, Martinsson and Tropp 2011).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..selector.surrogates import Fit

# Ridge penalties tried, as multiples of the mean diagonal of X'X; the last leaves little but the mean.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Directions iterated with beyond those that are wanted.
MORE = 8
# The iteration ends when a step adds less than this share of what is explained, or after so many steps.
CONVERGED, MOST_STEPS = 1e-6, 50


class Rows(NamedTuple):
    """Tokens of one expert: inputs x and outputs y `(tokens, hidden)`, and weights `(tokens,)`."""

    x: Tensor
    y: Tensor
    weights: Tensor

    def error(self, down: Tensor, up: Tensor, constant: Tensor) -> float:
        """Weighted sum of squared errors of the map with down and up `(rank, hidden)` and a constant `(hidden,)`."""
        answers = self.x @ down.to(self.x).T @ up.to(self.x) + constant.to(self.x)
        return float(self.weights.double() @ (answers - self.y).double().square().sum(1))


class _Ridge:
    """P of weighted, centred inputs x `(tokens, hidden)`, by their Gram matrix of the smaller side."""

    def __init__(self, x: Tensor, gram: Tensor, penalty: float) -> None:
        self.x, self.penalty, self.by_tokens = x, penalty, len(x) < x.shape[1]
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self.factor = torch.linalg.cholesky(gram + penalty * identity)

    def _solve(self, values: Tensor) -> Tensor:
        return torch.cholesky_solve(values.double(), self.factor).to(values)

    def project(self, values: Tensor) -> Tensor:
        """P `values` `(tokens, n)`."""
        if self.by_tokens:
            return values - self.penalty * self._solve(values)
        return self.x @ self._solve(self.x.T @ values)

    def coefficients(self, values: Tensor) -> Tensor:
        """The ridge solution for targets `(tokens, n)`: `(hidden, n)`."""
        return self.x.T @ self._solve(values) if self.by_tokens else self._solve(self.x.T @ values)


def fit_surrogate(fit: Rows, check: Rows, rank: int, directions: int | None = None) -> Fit:
    """The surrogate of one expert, in float32.

    Args:
        fit: the tokens to fit on. An expert that saw none gets the zero map.
        check: others, by which the ridge penalty is chosen, at this `rank`.
        directions: how many to give, at least `rank`; by default as many.
    """
    hidden, count = fit.x.shape[1], directions or rank
    zero, none = torch.zeros(count, hidden), torch.zeros(count)
    total = float(fit.weights.double().sum())
    if total <= 0.0:
        return Fit(zero, zero, none, torch.zeros(hidden), torch.zeros(hidden))
    share = (fit.weights.double() / total).to(fit.x)
    mean_x, mean_y = share @ fit.x, share @ fit.y
    root = fit.weights.to(fit.x).sqrt().unsqueeze(1)
    x, y = (fit.x - mean_x) * root, (fit.y - mean_y) * root
    best, chosen = Fit(zero, zero, none, mean_x.float().cpu(), mean_y.float().cpu()), 0.0
    scale = float(x.double().square().sum()) / hidden
    lowest = check.error(zero, zero, mean_y)
    if not rank or not scale > 0:
        return best
    wide = x.double()
    gram = wide @ wide.T if len(x) < hidden else wide.T @ wide
    del wide
    start = None
    for penalty in PENALTIES:
        ridge = _Ridge(x, gram, penalty * scale)
        up, _, start = _leading(ridge, y, rank, start)
        down = ridge.coefficients(y @ up.T).T
        error = check.error(down, up, mean_y - (mean_x @ down.T) @ up)
        if error < lowest:
            lowest, chosen = error, penalty
    if not chosen:
        return best
    ridge = _Ridge(x, gram, chosen * scale)
    up, gains, _ = _leading(ridge, y, count, None)
    down = ridge.coefficients(y @ up.T).T
    found = Fit(zero, zero.clone(), none, best.mean_x, best.mean_y)
    for whole, part in ((found.down, down), (found.up, up), (found.gains, gains)):
        whole[: len(part)] = part.float().cpu()
    return found


def _leading(ridge: _Ridge, y: Tensor, count: int, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The leading directions of Y'PY, as rows, what each explains, falling, and where to start for a like penalty.

    There are fewer than `count` where there are fewer tokens. Equal input gives equal output.
    """
    most = min(y.shape)
    width = min(count + MORE, most)
    if start is None or start.shape[1] != width:
        noise = torch.randn(y.shape[1], width, generator=torch.Generator().manual_seed(0))
        start = torch.linalg.qr(noise.to(y)).Q
    explained = -1.0
    for _ in range(MOST_STEPS):
        image = y.T @ ridge.project(y @ start)
        energy, rotation = torch.linalg.eigh(start.T @ image)
        reached = float(energy[-count:].clamp_min(0).sum())
        if reached <= explained * (1 + CONVERGED):
            break
        explained, start = reached, torch.linalg.qr(image).Q
    up = (start @ rotation).T.flip(0)[:count]
    return up, energy.flip(0)[:count].clamp_min(0), start
