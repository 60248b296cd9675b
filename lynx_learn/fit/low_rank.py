"""The best low-rank affine stand-in for an expert: weighted reduced-rank ridge regression of its outputs on its inputs.

Reduced-rank regression after Izenman (1975), "Reduced-rank regression for the multivariate linear model"; with a ridge
penalty after Mukherjee and Zhu (2011), "Reduced rank ridge regression and its kernel extensions". With X and Y centred
and weighted, the directions are the leading eigenvectors of Y'PY, where P = X (X'X + penalty)⁻¹ X'. P goes through the
smaller one of X'X and XX' (of width and tokens), in float64. Where tokens are fewer, so does Y'PY; where they are more and the
model is wide, it is not decomposed: the leading directions come from subspace iteration (Halko, Martinsson and Tropp 2011).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..selector.surrogates import Fit

# Ridge penalties tried, as multiples of the mean diagonal of X'X; the last leaves little but the mean.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Tokens whose inputs and outputs are in float64 at a time.
ROWS_AT_A_TIME = 4096
# Up to this width, or so many tokens, exact work takes no time: a full decomposition in place of an iteration, and float64.
NARROW = 512
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


class _ByWidth:
    """Y'PY and the ridge solutions where there are at least as many tokens as width, from X'X and X'Y alone."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.gram, self.cross = (x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64) for _ in range(2))
        for some_x, some_y in zip(x.split(ROWS_AT_A_TIME), y.split(ROWS_AT_A_TIME), strict=True):
            wide = some_x.double()
            self.gram.addmm_(wide.T, wide)
            self.cross.addmm_(wide.T, some_y.double())

    def penalise(self, penalty: float) -> None:
        self.factor = _factor(self.gram, penalty)
        self.half = torch.linalg.solve_triangular(self.factor, self.cross, upper=False)

    def explained(self, directions: Tensor) -> Tensor:
        """Y'PY `directions` `(hidden, n)`."""
        return self.half.T @ (self.half @ directions)

    def down(self, up: Tensor) -> Tensor:
        """Inputs' directions `(rank, hidden)` that answer with `up` `(rank, hidden)`."""
        return torch.cholesky_solve(self.cross @ up.T, self.factor).T


class _ByTokens:
    """The same where there are fewer tokens than width, from XX' = U diag(k) U' and YY'.

    Y'PY has the eigenvalues of S'YY'S with S = U diag(k / (k + penalty))^½, which has a row and a column for each token. XX' is
    decomposed in float64, since penalties are small beside its largest values; errors of the rest are relative to the largest of
    what is explained, and many tokens are worked with in float32.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        wide = x.double()
        values, basis = torch.linalg.eigh(wide @ wide.T)
        kind = torch.float64 if len(x) <= NARROW else torch.float32
        self.x, self.values, self.basis = x.to(kind), values.clamp_min(0), basis.to(kind)
        self.turned = self.basis.T @ y.to(kind)
        self.outputs = self.turned @ self.turned.T

    def penalise(self, penalty: float) -> None:
        inverse = 1 / (self.values + penalty)
        self.inverse, self.root = inverse.to(self.x).unsqueeze(1), (self.values * inverse).sqrt().to(self.x)

    def leading(self, count: int) -> tuple[Tensor, Tensor]:
        """As `_leading`."""
        energy, vectors = _largest(self.root.unsqueeze(1) * self.outputs * self.root, count)
        vectors = self.root.unsqueeze(1) * vectors
        up = self.turned.T @ vectors
        # What explains no more than rounding does is none: it would point anywhere.
        some = energy > len(self.root) * torch.finfo(energy.dtype).eps * energy[0]
        scale = torch.where(some, 1 / torch.linalg.vector_norm(up, dim=0), 0.0)
        self.vectors = vectors * scale
        return (up * scale).T, torch.where(some, energy, 0.0).double()

    def down(self, up: Tensor) -> Tensor:
        """Of the directions that `leading` gave last."""
        return (self.x.T @ (self.basis @ (self.inverse * (self.outputs @ self.vectors)))).T


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric matrix, falling, and their vectors as columns."""
    size = len(matrix)
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix)
    else:  # of the smaller ones no vectors are worked out, which saves more than half of the time
        from scipy.linalg import eigh

        own: Any = {"subset_by_index": (size - count, size - 1), "driver": "evr", "check_finite": False}
        values, vectors = (torch.from_numpy(part) for part in eigh(matrix.numpy(), overwrite_a=True, **own))
    return values.flip(0)[:count], vectors.flip(1)[:, :count]


def _factor(gram: Tensor, penalty: float) -> Tensor:
    return torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


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
        return Fit(zero, zero.clone(), none, torch.zeros(hidden), torch.zeros(hidden))
    share = (fit.weights.double() / total).to(fit.x)
    mean_x, mean_y = share @ fit.x, share @ fit.y
    root = fit.weights.to(fit.x).sqrt().unsqueeze(1)
    x, y = (fit.x - mean_x).mul_(root), (fit.y - mean_y).mul_(root)
    best = Fit(zero, zero.clone(), none, mean_x.float().cpu(), mean_y.float().cpu())
    scale = float(torch.linalg.vector_norm(x, dim=1).double().square().sum()) / hidden
    lowest = check.error(zero, zero, mean_y)
    if not rank or not scale > 0:
        return best
    ridge = (_ByTokens if len(x) < hidden else _ByWidth)(x, y)
    start: Tensor | None = None

    def error(number: int) -> float:
        nonlocal start
        ridge.penalise(PENALTIES[number] * scale)
        up, _, start = _leading(ridge, y, rank, start)
        down = ridge.down(up)
        return check.error(down, up, mean_y - (mean_x.to(down) @ down.T) @ up)

    chosen, found_error = _least(error, len(PENALTIES))
    if not found_error < lowest:
        return best
    ridge.penalise(PENALTIES[chosen] * scale)
    up, gains, _ = _leading(ridge, y, count, None)
    down = ridge.down(up)
    found = Fit(zero, zero.clone(), none, best.mean_x, best.mean_y)
    for whole, part in ((found.down, down), (found.up, up), (found.gains, gains)):
        whole[: len(part)] = part.float().cpu()
    return found


def _least(error: Callable[[int], float], count: int) -> tuple[int, float]:
    """Number and value of the least of so many values, which fall and then rise; from the middle on, as far as they fall."""
    best = count // 2
    least = error(best)
    for step in (-1, 1):
        start = best
        while 0 <= best + step < count and (value := error(best + step)) < least:
            best, least = best + step, value
        if best != start:
            break
    return best, least


def _leading(
    ridge: _ByWidth | _ByTokens, y: Tensor, count: int, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The leading directions of Y'PY, as rows, what each explains, falling, and where to start for a like penalty.

    There are fewer than `count` where there are fewer tokens. Equal input gives equal output.
    """
    most = min(y.shape)
    if isinstance(ridge, _ByTokens):
        return *ridge.leading(min(count, most)), None
    if y.shape[1] <= NARROW:
        energy, vectors = torch.linalg.eigh(
            ridge.explained(torch.eye(y.shape[1], dtype=torch.float64, device=y.device))
        )
        count = min(count, most)
        return vectors.T.flip(0)[:count], energy.flip(0)[:count].clamp_min(0), None
    width = min(count + MORE, most)
    if start is None or start.shape[1] != width:
        noise = torch.randn(y.shape[1], width, generator=torch.Generator().manual_seed(0))
        start = torch.linalg.qr(noise.to(y.device, torch.float64)).Q
    explained = -1.0
    for _ in range(MOST_STEPS):
        image = ridge.explained(start)
        energy, rotation = torch.linalg.eigh(start.T @ image)
        reached = float(energy[-count:].clamp_min(0).sum())
        if reached <= explained * (1 + CONVERGED):
            break
        explained, start = reached, torch.linalg.qr(image).Q
    up = (start @ rotation).T.flip(0)[:count]
    return up, energy.flip(0)[:count].clamp_min(0), start
