"""Rules that leave assignments out token by token."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import OptionError
from ..moe.decision import Decision, Routing
from ..moe.families import MoeLayer
from .expert_stats import ExpertStats
from .rule import (
    Rule,
    check_count,
    leave_out_of_token,
    ranks,
    restore_sum,
)

# Halvings of the interval in which a layer's tau lies.
BISECTIONS = 30


@dataclass
class TopK(Rule):
    """Each token keeps its first `count` experts, whatever the batch.

    As the model itself would with a smaller top-k: where its weights have a fixed sum, those that remain are scaled to
    it. Not `scaled`, they stay as they are, and what is left out is simply missing.
    """

    count: int
    scaled: bool = True
    name = "top_k"

    @property
    def setting(self) -> str:
        return f"k={self.count}" + ("" if self.scaled else " unscaled")

    def bind(self, layers: list[MoeLayer]) -> None:
        check_count(self.name, self.count, layers)

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        decision = leave_out_of_token(routing, ranks(routing.weights) < self.count)
        return restore_sum(layer, routing, decision) if self.scaled else decision


@dataclass
class NAEE(Rule):
    """Dynamic skipping for top-2 models (arXiv 2402.14800): drop a token's second expert if g2 < beta × g1.

    beta is a quantile of g2 / g1 in the layer, the median in the paper. The first expert's weight is scaled to the sum
    of both where the model's weights have a fixed sum.
    """

    quantile: float
    stats: ExpertStats = field(repr=False)
    name = "naee"

    @property
    def setting(self) -> str:
        return f"quantile={self.quantile:g}"

    def bind(self, layers: list[MoeLayer]) -> None:
        """Read each layer's beta.

        Raises:
            OptionError: the model does not give each token two experts, or the statistics are of another one.
        """
        for layer in layers:
            if layer.top_k != 2:
                raise OptionError(
                    f"naee skips the second of two experts, layer {layer.name} gives each token {layer.top_k}: leave it out for this model"
                )
        self.stats.check(layers)
        betas = torch.quantile(self.stats.ratios, self.quantile, dim=1)
        self.betas = {layer.index: betas[layer.index].to(layer.device) for layer in layers}

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        weights = routing.weights.float()
        enough = weights >= self.betas[layer.index] * weights.amax(-1, keepdim=True)  # the first is: beta is 1 at most
        return restore_sum(layer, routing, leave_out_of_token(routing, enough))


@dataclass
class Contribution(Rule):
    """Each token keeps the experts that bring 1 - tau of its sum of weight × the expert's mean output norm.

    The fewest, largest first. The others are dropped, and the remaining weights stay as they are. `tau` is one for all
    layers; or each layer has its own, with which its tokens keep `kept` experts on average (over the tokens of the
    statistics), found by bisection.
    """

    stats: ExpertStats = field(repr=False)
    tau: float | None = None
    kept: float | None = None
    name = "contribution"

    @property
    def setting(self) -> str:
        return f"tau={self.tau:g}" if self.kept is None else f"kept={self.kept:.3g}"

    def bind(self, layers: list[MoeLayer]) -> None:
        self.stats.check(layers)
        self.norms = {layer.index: self.stats.norms[layer.index].to(layer.device) for layer in layers}
        self.taus = {layer.index: self._tau(layer.index) for layer in layers}

    def _tau(self, layer: int) -> float:
        if self.kept is None:
            assert self.tau is not None
            return self.tau
        norms = self.stats.norms[layer]
        ordered = (self.stats.weights[layer] * norms[self.stats.indices[layer]]).sort(dim=-1, descending=True).values
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            fewer = float(_needed(ordered, middle).sum(-1).float().mean()) <= self.kept
            low, high = (low, middle) if fewer else (middle, high)
        return high

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        parts = routing.weights.float() * self.norms[layer.index][routing.indices.long()]
        ordered, order = parts.sort(dim=-1, descending=True, stable=True)
        needed = _needed(ordered, self.taus[layer.index])
        return leave_out_of_token(routing, needed.gather(-1, order.argsort(-1)))


def _needed(ordered: Tensor, tau: float) -> Tensor:
    """Which of each token's contributions `(..., top_k)`, largest first, it needs to have 1 - tau of their sum."""
    before = ordered.cumsum(-1) - ordered
    needed = before < (1.0 - tau) * ordered.sum(-1, keepdim=True)
    return needed | (torch.arange(ordered.shape[-1], device=ordered.device) == 0)  # also of a token without any weight
