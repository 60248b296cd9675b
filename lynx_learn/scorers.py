"""The tiny nets that predict the log-cost of leaving out an assignment.

Every scorer starts from the two-factor formula, weight² × the expert's mean squared residual, and learns what to add to
its logarithm. `formula` adds nothing: it is the floor the others must beat.
"""

import torch
from torch import Tensor, nn

from .features import LOG_WEIGHT, NAMES


class Scorer(nn.Module):
    """The two-factor formula, and the base of the learned scorers.

    Buffers: `mean` and `spread` of each feature `(features,)`, `hidden_mean` and `hidden_spread` of each component of
    the hidden state `(hidden,)`, and `log_residual` `(experts,)`, the logarithm of the expert's mean squared residual.
    """

    mean: Tensor
    spread: Tensor
    hidden_mean: Tensor
    hidden_spread: Tensor
    log_residual: Tensor

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(NAMES)))
        self.register_buffer("spread", torch.ones(len(NAMES)))
        self.register_buffer("hidden_mean", torch.zeros(hidden))
        self.register_buffer("hidden_spread", torch.ones(hidden))
        self.register_buffer("log_residual", torch.zeros(experts))

    def forward(self, features: Tensor, indices: Tensor, hidden: Tensor) -> Tensor:
        """Log-cost `(..., top_k)`.

        Args:
            features: `(..., top_k, features)`.
            indices: experts `(..., top_k)`.
            hidden: what enters the block `(..., hidden)`.
        """
        base = 2 * features[..., LOG_WEIGHT] + self.log_residual[indices]
        standardised = (hidden.float() - self.hidden_mean) / self.hidden_spread
        return base + self.learned((features - self.mean) / self.spread, indices, standardised)

    def learned(self, features: Tensor, indices: Tensor, hidden: Tensor) -> Tensor:
        """What the scorer adds to the formula's logarithm, from standardised inputs; nothing here."""
        return torch.zeros_like(features[..., 0])


class LinearScorer(Scorer):
    """A linear map of the features plus a constant per expert; does not look at the hidden state."""

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__(experts, hidden)
        self.weight = nn.Parameter(torch.zeros(len(NAMES)))
        self.bias = nn.Parameter(torch.zeros(experts))

    def learned(self, features: Tensor, indices: Tensor, hidden: Tensor) -> Tensor:
        return features @ self.weight + self.bias[indices]


class MlpScorer(Scorer):
    """One hidden layer over the features, an embedding of the expert, and a small projection of the hidden state.

    The router's output says how much an expert counts, not how far its surrogate is off for this token; the
    projection, shared by all experts, can tell the tokens on which surrogates fail.
    """

    def __init__(self, experts: int, hidden: int, embedding: int = 8, projection: int = 16, width: int = 48) -> None:
        super().__init__(experts, hidden)
        self.embedding = nn.Embedding(experts, embedding)
        self.projection = nn.Linear(hidden, projection, bias=False)
        self.inner = nn.Linear(len(NAMES) + embedding + projection, width)
        self.outer = nn.Linear(width, 1)
        self.bias = nn.Parameter(torch.zeros(experts))
        nn.init.zeros_(self.outer.weight)  # starts as the formula
        nn.init.zeros_(self.outer.bias)

    def learned(self, features: Tensor, indices: Tensor, hidden: Tensor) -> Tensor:
        token = self.projection(hidden).unsqueeze(-2).expand(*indices.shape, -1)
        inner = self.inner(torch.cat([features, self.embedding(indices), token], dim=-1))
        return self.outer(nn.functional.silu(inner)).squeeze(-1) + self.bias[indices]


SCORERS: dict[str, type[Scorer]] = {"formula": Scorer, "linear": LinearScorer, "mlp": MlpScorer}
