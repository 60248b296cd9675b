"""The tiny nets that predict the log-cost of leaving out an assignment.

Every scorer starts from the two-factor formula, weight² × the expert's mean squared residual, and learns what to add to
its logarithm. `formula` adds nothing: it is the floor the others must beat.
"""

import torch
from torch import Tensor, nn

from .features import LOG_WEIGHT, NAMES


class Scorer(nn.Module):
    """The two-factor formula, and the base of the learned scorers.

    Buffers: `mean` and `spread` of each feature `(features,)`, `log_residual` `(experts,)`, the logarithm of the
    expert's mean squared residual.
    """

    mean: Tensor
    spread: Tensor
    log_residual: Tensor

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(NAMES)))
        self.register_buffer("spread", torch.ones(len(NAMES)))
        self.register_buffer("log_residual", torch.zeros(experts))

    def forward(self, features: Tensor, indices: Tensor) -> Tensor:
        """Log-cost `(..., top_k)` from features `(..., top_k, features)` and experts `(..., top_k)`."""
        base = 2 * features[..., LOG_WEIGHT] + self.log_residual[indices]
        return base + self.learned((features - self.mean) / self.spread, indices)

    def learned(self, features: Tensor, indices: Tensor) -> Tensor:
        """What the scorer adds to the formula's logarithm; nothing here."""
        return torch.zeros_like(features[..., 0])


class LinearScorer(Scorer):
    """A linear map of the features plus a constant per expert."""

    def __init__(self, experts: int) -> None:
        super().__init__(experts)
        self.weight = nn.Parameter(torch.zeros(len(NAMES)))
        self.bias = nn.Parameter(torch.zeros(experts))

    def learned(self, features: Tensor, indices: Tensor) -> Tensor:
        return features @ self.weight + self.bias[indices]


class MlpScorer(Scorer):
    """One hidden layer over the features and an embedding of the expert, plus a constant per expert."""

    def __init__(self, experts: int, embedding: int = 8, width: int = 32) -> None:
        super().__init__(experts)
        self.embedding = nn.Embedding(experts, embedding)
        self.inner = nn.Linear(len(NAMES) + embedding, width)
        self.outer = nn.Linear(width, 1)
        self.bias = nn.Parameter(torch.zeros(experts))
        nn.init.zeros_(self.outer.weight)  # starts as the formula
        nn.init.zeros_(self.outer.bias)

    def learned(self, features: Tensor, indices: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.inner(torch.cat([features, self.embedding(indices)], dim=-1)))
        return self.outer(hidden).squeeze(-1) + self.bias[indices]


SCORERS: dict[str, type[Scorer]] = {"formula": Scorer, "linear": LinearScorer, "mlp": MlpScorer}
