"""The tiny nets that predict the log-cost of leaving out an assignment.

Every scorer starts from the two-factor formula, weight² × the expert's mean squared residual, and learns what to add to
its logarithm. `formula` adds nothing: it is the floor the others must beat.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .features import LOG_WEIGHT, NAMES, Parts, part_maps

# Log-costs are kept above this, so that every cost is a positive float32: an expert in use has a total above 0.
LOWEST_LOG_COST = -80.0


class Folded(NamedTuple):
    """A scorer as decode runs it: standardisation, expert embedding and feature sums folded into few matrices.

    Every matrix has one more column than the inner layer is wide: the last one adds straight to the log-cost. P is the
    width of the projection of the hidden state. Scorers of one kind and size have the same shapes.
    """

    assignment: Tensor
    """(assignment parts, width + 1)."""
    token: Tensor
    """(token parts + P, width + 1)."""
    experts: Tensor
    """(experts, width + 1)."""
    projection: Tensor
    """(hidden, P)."""
    outer: Tensor
    """(width,)."""

    @property
    def bytes(self) -> int:
        """Of all matrices, which a decision reads once for its batch."""
        return sum(part.numel() * part.element_size() for part in self)

    def costs(self, parts: Parts, indices: Tensor, hidden: Tensor) -> Tensor:
        """Costs `(..., top_k)` above 0, in the unit of the sensitivity that was folded in.

        Args:
            parts: what features are sums of.
            indices: experts `(..., top_k)`.
            hidden: what enters the block `(..., hidden)`.
        """
        token, width = parts.token, self.outer.shape[0]
        if self.projection.shape[1]:
            token = torch.cat([token, hidden.float() @ self.projection], dim=-1)
        inner = parts.assignment @ self.assignment + (token @ self.token).unsqueeze(-2) + self.experts[indices]
        log_costs = inner[..., width]
        if width:
            # As a matrix of one column: onnxruntime takes several times as long for a product with a vector.
            log_costs = log_costs + (nn.functional.silu(inner[..., :width]) @ self.outer.unsqueeze(-1)).squeeze(-1)
        return log_costs.clamp_min(LOWEST_LOG_COST).exp()


class Net(NamedTuple):
    """What a scorer adds to the formula, as one hidden layer (silu) over standardised inputs, plus a linear map."""

    features: Tensor
    """(features, width), into the hidden layer."""
    experts: Tensor
    """(experts, width), each expert's constant in the hidden layer."""
    projection: Tensor
    """(hidden, P), of the hidden state."""
    projected: Tensor
    """(P, width), the projection into the hidden layer."""
    outer: Tensor
    """(width,), out of the hidden layer."""
    slope: Tensor
    """(features,), straight to the log-cost."""
    bias: Tensor
    """(experts,), straight to the log-cost."""


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

    def net(self) -> Net:
        """The same as `learned`, written as matrices."""
        experts, hidden = self.log_residual.shape[0], self.hidden_mean.shape[0]
        none = self.log_residual.new_zeros
        shapes = ((len(NAMES), 0), (experts, 0), (hidden, 0), (0, 0), (0,), (len(NAMES),), (experts,))
        return Net(*(none(shape) for shape in shapes))

    @torch.no_grad()
    def fold(self, sensitivity: Tensor) -> Folded:
        """Everything that does not depend on the input multiplied out; `sensitivity` scales the costs."""
        net = self.net()
        features = torch.cat([net.features, net.slope.unsqueeze(1)], dim=1) / self.spread.unsqueeze(1)
        projection = net.projection / self.hidden_spread.unsqueeze(1)
        direct = self.log_residual + net.bias + sensitivity.log()
        constant = -self.mean @ features
        constant[:-1] -= (self.hidden_mean @ projection) @ net.projected
        features[LOG_WEIGHT, -1] += 2.0
        of_assignment, of_token = part_maps(features.device)
        projected = torch.cat([net.projected, net.projected.new_zeros(len(net.projected), 1)], dim=1)
        return Folded(
            assignment=of_assignment @ features,
            token=torch.cat([of_token @ features, projected]),
            experts=torch.cat([net.experts, direct.unsqueeze(1)], dim=1) + constant,
            projection=projection.contiguous(),
            outer=net.outer.clone(),
        )


class LinearScorer(Scorer):
    """A linear map of the features plus a constant per expert; does not look at the hidden state."""

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__(experts, hidden)
        self.weight = nn.Parameter(torch.zeros(len(NAMES)))
        self.bias = nn.Parameter(torch.zeros(experts))

    def learned(self, features: Tensor, indices: Tensor, hidden: Tensor) -> Tensor:
        return features @ self.weight + self.bias[indices]

    def net(self) -> Net:
        return super().net()._replace(slope=self.weight, bias=self.bias)


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
        # What an expert and a token add to the hidden layer is multiplied out once for all their assignments.
        net = self.net()
        inner = features @ net.features + nn.functional.embedding(indices, net.experts)
        inner = inner + (hidden @ net.projection @ net.projected).unsqueeze(-2)
        return nn.functional.silu(inner) @ net.outer + net.bias[indices]

    def net(self) -> Net:
        sizes = [len(NAMES), self.embedding.embedding_dim, self.projection.out_features]
        features, embedded, projected = self.inner.weight.split(sizes, dim=1)
        return (
            super()
            .net()
            ._replace(
                features=features.T,
                experts=self.embedding.weight @ embedded.T + self.inner.bias,
                projection=self.projection.weight.T,
                projected=projected.T,
                outer=self.outer.weight[0],
                bias=self.bias + self.outer.bias,
            )
        )


SCORERS: dict[str, type[Scorer]] = {"formula": Scorer, "linear": LinearScorer, "mlp": MlpScorer}
