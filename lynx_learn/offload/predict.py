"""Which experts the next layer will need, foreseen from what is known when a layer begins."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Ridge penalty, as a multiple of the mean diagonal of the Gram matrix.
PENALTY = 1e-2
# Successors that a token votes for, of each of its experts.
VOTES = 2


@dataclass(frozen=True)
class Seen:
    """Tokens at one layer.

    Attributes:
        hidden: what enters the MoE block before `(tokens, hidden)`.
        before: experts of the block before `(tokens, top_k)`.
        routed: experts of the block that is foreseen `(tokens, top_k)`.
        experts: how many a block has.
    """

    hidden: Tensor
    before: Tensor
    routed: Tensor
    experts: int

    def of(self, rows: Tensor) -> "Seen":
        return Seen(self.hidden[rows], self.before[rows], self.routed[rows], self.experts)

    @property
    def used(self) -> Tensor:
        """Experts of the block that is foreseen `(tokens, experts)`, 0 or 1."""
        return torch.zeros(len(self.routed), self.experts).scatter(1, self.routed, 1.0)


class Predictor(Protocol):
    def scores(self, seen: Seen) -> Tensor:
        """How much each token speaks for each expert `(tokens, experts)`; a batch's scores are their sum."""


class Popular:
    """By how many tokens used each expert."""

    def __init__(self, seen: Seen) -> None:
        self.rates = seen.used.mean(0)

    def scores(self, seen: Seen) -> Tensor:
        return self.rates.expand(len(seen.routed), -1)


class Correlated:
    """Klotski's table (arXiv 2502.06888): how often a token that used e' before used e next; each token votes for the best
    successors of each of its experts. Ties go by popularity."""

    def __init__(self, seen: Seen) -> None:
        before = torch.zeros(len(seen.before), seen.experts).scatter(1, seen.before, 1.0)
        table = before.T @ seen.used
        self.votes = torch.zeros_like(table).scatter(1, table.topk(VOTES).indices, 1.0)
        self.ties = 1e-3 * seen.used.mean(0)

    def scores(self, seen: Seen) -> Tensor:
        return self.votes[seen.before].sum(1) + self.ties


class Learned:
    """A ridge regression from the hidden state to which experts are used."""

    def __init__(self, seen: Seen) -> None:
        x = self._inputs(seen.hidden).double()
        gram = x.T @ x
        gram += PENALTY * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        self.map = torch.linalg.solve(gram, x.T @ seen.used.double()).float()

    @staticmethod
    def _inputs(hidden: Tensor) -> Tensor:
        """Directions of the hidden states, and a constant: routers see them normalised."""
        x = torch.nn.functional.normalize(hidden, dim=-1) * hidden.shape[-1] ** 0.5
        return torch.cat([x, torch.ones(len(x), 1)], dim=1)

    def scores(self, seen: Seen) -> Tensor:
        return (self._inputs(seen.hidden) @ self.map).clamp_min(0)


PREDICTORS: dict[str, Callable[[Seen], Predictor]] = {
    "popularity": Popular,
    "correlation table": Correlated,
    "learned": Learned,
}
