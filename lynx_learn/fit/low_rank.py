"""The best low-rank affine stand-in for an expert: weighted reduced-rank ridge regression of its outputs on its inputs.

Reduced-rank regression after Izenman (1975), "Reduced-rank regression for the multivariate linear model"; with a ridge
penalty after Mukherjee and Zhu (2011), "Reduced rank ridge regression and its kernel extensions". With X and Y centred
and weighted, the directions are the leading eigenvectors of Y'PY, where P = X (X'X + penalty)⁻¹ X'. P goes through the
smaller one of X'X and XX' (of width and tokens), in float64. Where tokens are fewer, so does Y'PY; where they are more and the
model is wide, it is not decomposed: the leading directions come from subspace iteration (Halko, Martinsson and Tropp 2011).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..selector.surrogates import Fit

# Ridge penalties tried, as multiples of the mean diagonal of X'X; the last leaves little but the mean.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Tokens whose inputs and outputs are in float64 at a time, and columns of all of them.
ROWS_AT_A_TIME, COLUMNS_AT_A_TIME = 4096, 1024
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
    """Solutions where there are at least as many tokens as width, from X'X and X'Y alone."""

    def __init__(self, rows: Rows, own: Tensor, check: Tensor, mean_x: Tensor, mean_y: Tensor) -> None:
        self.check = Rows(*(_single(whole[check]) for whole in rows))
        root = rows.weights[own].to(mean_x).sqrt().unsqueeze(1)
        x, y = ((_single(whole[own]) - mean).mul_(root) for whole, mean in ((rows.x, mean_x), (rows.y, mean_y)))
        self.mean_x, self.mean_y, hidden = mean_x, mean_y, x.shape[1]
        self.gram, self.cross = (x.new_zeros(hidden, hidden, dtype=torch.float64) for _ in range(2))
        for some_x, some_y in zip(x.split(ROWS_AT_A_TIME), y.split(ROWS_AT_A_TIME), strict=True):
            wide = some_x.double()
            self.gram.addmm_(wide.T, wide)
            self.cross.addmm_(wide.T, some_y.double())
        self.scale = float(self.gram.diagonal().mean())
        none = x.new_zeros(0, hidden)
        self.lowest = self.check.error(none, none, mean_y)
        self.start: Tensor | None = None

    def error(self, penalty: float, rank: int) -> float:
        """Of the tokens to check on."""
        down, up, _ = self.solve(penalty, rank)
        return self.check.error(down, up, self.mean_y - (self.mean_x.to(down) @ down.T) @ up)

    def solve(self, penalty: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """`down` and `up` `(count, hidden)` and what each direction explains, falling; the next penalty starts from them."""
        factor = _factor(self.gram, penalty)
        up, gains = self._leading(torch.linalg.solve_triangular(factor, self.cross, upper=False), count)
        return torch.cholesky_solve(self.cross @ up.T, factor).T, up, gains

    def _leading(self, half: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The leading directions of Y'PY = `half`'`half`, as rows, and what each explains. Equal input gives equal output."""
        hidden, device = len(half), half.device
        if hidden <= NARROW:
            energy, vectors = torch.linalg.eigh(half.T @ half)
            return vectors.T.flip(0)[:count], energy.flip(0)[:count].clamp_min(0)
        width = min(count + MORE, hidden)
        if self.start is None or self.start.shape[1] != width:
            noise = torch.randn(hidden, width, generator=torch.Generator().manual_seed(0))
            self.start = torch.linalg.qr(noise.to(device, torch.float64)).Q
        start, explained = self.start, -1.0
        for _ in range(MOST_STEPS):
            image = half.T @ (half @ start)
            energy, rotation = torch.linalg.eigh(start.T @ image)
            reached = float(energy[-count:].clamp_min(0).sum())
            if reached <= explained * (1 + CONVERGED):
                break
            explained, start = reached, torch.linalg.qr(image).Q
        self.start = start
        return (start @ rotation).T.flip(0)[:count], energy.flip(0)[:count].clamp_min(0)


class Inner(NamedTuple):
    """Inner products of some tokens, which are off the mean first: of inputs in float64, and of outputs, `(n, n)` each.

    Those of fewer tokens are their part, and so are those with other weights and means: tokens that are fitted on more than
    once are multiplied once.
    """

    tokens: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, rows: Rows, tokens: Tensor) -> "Inner":
        """Of the tokens with these numbers, rising; penalties are small beside the largest values of X'X, hence float64."""
        exact = len(tokens) <= NARROW or rows.y.dtype == torch.float64
        kinds = (torch.float64, torch.float64 if exact else torch.float32)
        return cls(tokens, *(cls._products(part, tokens, kind) for part, kind in zip(rows[:2], kinds, strict=True)))

    @staticmethod
    def _products(part: Tensor, tokens: Tensor, kind: torch.dtype) -> Tensor:
        from scipy.linalg import blas

        whole, on_cpu = torch.zeros(len(tokens), len(tokens), dtype=kind, device=part.device), part.device.type == "cpu"
        add = blas.dsyrk if kind == torch.float64 else blas.ssyrk
        for columns in part.split(COLUMNS_AT_A_TIME, dim=1):
            some = columns[tokens].to(kind)
            some -= some.mean(0)
            if on_cpu:  # of one triangle, in half of the time
                add(1.0, some.numpy().T, trans=1, beta=1.0, c=whole.numpy().T, overwrite_c=True)
            else:
                whole.addmm_(some, some.T)
        return whole.tril() + whole.tril(-1).T if on_cpu else whole

    def places(self, tokens: Tensor) -> Tensor:
        """Where these tokens are."""
        return torch.searchsorted(self.tokens, tokens)


def _centred(products: Tensor, own: Tensor, share: Tensor, check: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Products of tokens `own` and of `check` with `own`, and squares of `check`, off the mean of `own` by their `share`."""
    share, some = share.to(products), products[:, own]
    with_mean = some @ share
    mean = share @ with_mean[own]
    squares = products.diagonal()[check] - 2 * with_mean[check] + mean
    some -= with_mean.unsqueeze(1)
    some -= with_mean[own] - mean
    return some[own], some[check], squares


class _ByTokens:
    """Solutions where there are fewer tokens than width, from XX' = U diag(k) U' and YY'.

    Y'PY has the eigenvalues of S'YY'S with S = U diag(k / (k + penalty))^½, which has a row and a column for each token. XX' is
    decomposed in float64; errors of the rest are relative to the largest of what is explained. The tokens to check on are
    answered from their inner products with the others, so nothing that is as wide as the model is multiplied for a penalty.
    """

    def __init__(
        self, rows: Rows, own: Tensor, check: Tensor, mean_x: Tensor, mean_y: Tensor, inner: Inner, share: Tensor
    ) -> None:
        self.rows, self.own, self.means = rows, own, (mean_x, mean_y)
        self.check_weights = rows.weights[check].double()
        here, there = inner.places(own), inner.places(check)
        root = rows.weights[own].to(inner.x).sqrt().unsqueeze(1)
        gram, check_x, _ = _centred(inner.x, here, share, there)
        gram.mul_(root).mul_(root.T)
        self.scale = float(gram.diagonal().sum()) / rows.x.shape[1]
        values, basis = torch.linalg.eigh(gram)
        self.values, self.turn = values.clamp_min(0), root.to(inner.y) * basis.to(inner.y)
        outputs, check_y, squares = _centred(inner.y, here, share, there)
        self.outputs = self.turn.T @ outputs @ self.turn
        self.check_x, self.check_y = check_x.to(self.turn) @ self.turn, check_y @ self.turn
        self.off = squares.double()
        self.lowest = float(self.check_weights @ self.off)

    def error(self, penalty: float, rank: int) -> float:
        """Of the tokens to check on; directions are orthonormal, so it is a sum over them."""
        down, up, _ = self._leading(penalty, rank)
        answers, wanted = self.check_x @ down, self.check_y @ up
        return float(self.check_weights @ (self.off + (answers * (answers - 2 * wanted)).double().sum(1)))

    def solve(self, penalty: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """`down` and `up` `(count, hidden)` and what each direction explains, falling."""
        *parts, gains = self._leading(penalty, count)
        wide = zip(parts, self.rows[:2], self.means, strict=True)
        down, up = ((self.turn @ part).T.to(mean) @ (_single(whole[self.own]) - mean) for part, whole, mean in wide)
        return down, up, gains

    def _leading(self, penalty: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `down` and `up` are in terms of U `(tokens, count)`, and what each direction explains."""
        inverse = 1 / (self.values + penalty)
        root = (self.values * inverse).sqrt().to(self.outputs).unsqueeze(1)
        energy, vectors = _largest(root * self.outputs * root.T, min(count, len(root)))
        # What explains no more than rounding does is none: it would point anywhere.
        some = energy > len(root) * torch.finfo(energy.dtype).eps * energy[0]
        up = root * vectors * torch.where(some, energy.rsqrt(), 0.0)
        return inverse.to(up).unsqueeze(1) * (self.outputs @ up), up, torch.where(some, energy, 0.0).double()


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric matrix, falling, and their vectors as columns."""
    size = len(matrix)
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix)
    else:  # of the smaller ones no vectors are worked out, which saves more than half of the time
        from scipy.linalg import eigh

        own: Any = {"subset_by_index": (size - count, size - 1), "driver": "evr", "check_finite": False}
        values, vectors = (torch.from_numpy(part) for part in eigh(matrix.numpy().T, overwrite_a=True, **own))
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
    both = Rows(*(torch.cat(pair) for pair in zip(fit, check, strict=True)))
    chosen = torch.arange(len(both.x), device=both.x.device) < len(fit.x)
    return fit_surrogates(both, [chosen], ~chosen, rank, directions)[0]


def fit_surrogates(
    rows: Rows, parts: Sequence[Tensor], check: Tensor, rank: int, directions: int | None = None
) -> list[Fit]:
    """Surrogates of one expert, as `fit_surrogate`, each fitted on a part of its tokens; what they share is worked out once.

    Args:
        parts: which tokens to fit on `(tokens,)`, bool, for each surrogate; one that lies in another shares its products if
            it comes later.
        check: which to choose the penalty by.
    """
    hidden, count = rows.x.shape[1], directions or rank
    found, inner = [], None
    for part in parts:
        zero, none = torch.zeros(count, hidden), torch.zeros(count)
        weights = rows.weights[part]
        total = float(weights.double().sum())
        if total <= 0.0:
            found.append(Fit(zero, zero.clone(), none, torch.zeros(hidden), torch.zeros(hidden)))
            continue
        share = weights.double() / total
        mean_x, mean_y = (share.to(whole) @ whole for whole in (_single(whole[part]) for whole in rows[:2]))
        best = Fit(zero, zero.clone(), none, mean_x.float().cpu(), mean_y.float().cpu())
        found.append(best)
        if not rank:
            continue
        own, others = (mask.nonzero().flatten() for mask in (part, check))
        ridge: _ByWidth | _ByTokens
        if len(own) < hidden:
            if inner is None or not torch.isin(own, inner.tokens).all():
                inner = Inner.of(rows, (part | check).nonzero().flatten())
            ridge = _ByTokens(rows, own, others, mean_x, mean_y, inner, share)
        else:
            ridge = _ByWidth(rows, own, others, mean_x, mean_y)
        if not ridge.scale > 0:
            continue
        chosen, error = _least(lambda number: ridge.error(PENALTIES[number] * ridge.scale, rank), len(PENALTIES))  # noqa: B023
        if not error < ridge.lowest:
            continue
        for whole, some in zip(best[:3], ridge.solve(PENALTIES[chosen] * ridge.scale, count), strict=True):
            whole[: len(some)] = some.float().cpu()
    return found


def _single(part: Tensor) -> Tensor:
    """In float32 at least."""
    return part.to(torch.promote_types(part.dtype, torch.float32))


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
