"""Rules that keep what some token needs and send the rest there."""

from dataclasses import dataclass, field

import torch

from ..moe.decision import Decision, Routing
from ..moe.families import MoeLayer
from .expert_stats import ExpertStats
from .rule import (
    Rule,
    check_count,
    first_experts,
    largest_weights,
    ranks,
    send,
)

# SiftMoE's keep set is found in so many rounds; an even number errs towards keeping.
SIFT_ROUNDS = 8


@dataclass
class OEA(Rule):
    """Opportunistic expert activation (arXiv 2511.02237): load every token's first `count`, use them for all.

    Each token then takes the best experts by its own scores among those loaded, up to the model's top-k. The weights
    are the original scores, normalised over what was taken where the model's rule normalises.
    """

    count: int
    name = "oea"

    @property
    def setting(self) -> str:
        return f"k0={self.count}"

    def bind(self, layers: list[MoeLayer]) -> None:
        check_count(self.name, self.count, layers)

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        loaded = first_experts(routing, self.count, layer.num_experts).unsqueeze(-2)
        indices, routed = layer.rule.route(routing.logits, loaded.expand_as(routing.logits))
        weights = layer.rule.chosen(routing.logits, indices) * (routed > 0)
        if layer.rule.normalises:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Decision(indices, layer.rule.scaled(indices, weights).to(routing.weights.dtype))


@dataclass
class SERE(Rule):
    """Similarity-based re-routing (arXiv 2602.07616): every token's first `count` stay, others go to the most similar.

    An expert whose largest similarity to those that stay is below `rho` is loaded after all. Weights do not change; two
    assignments of a token may meet at one expert, which then counts with both.
    """

    count: int
    rho: float
    stats: ExpertStats = field(repr=False)
    name = "sere"

    @property
    def setting(self) -> str:
        return f"s={self.count} rho={self.rho:.4g}"

    def bind(self, layers: list[MoeLayer]) -> None:
        check_count(self.name, self.count, layers)
        self.stats.check(layers)
        self.similarities = {layer.index: self.stats.similarities[layer.index].to(layer.device) for layer in layers}

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        kept = first_experts(routing, self.count, layer.num_experts)
        best, nearest = self.similarities[layer.index].masked_fill(~kept.unsqueeze(-2), float("-inf")).max(-1)
        return send(routing, ~kept & (best >= self.rho), nearest)


@dataclass
class SiftMoE(Rule):
    """Similarity-aware skipping (SiftMoE, arXiv 2603.23888), read from a summary of the paper.

    Leaving expert e to expert j costs token t at most weight × d(e, j) × s: d is the mean distance of their outputs, s
    the layer's sensitivity, taken here as 1 / the mean output norm of its experts, so that the bound is a share of what
    an expert adds. An expert is skipped when this is below `threshold` for every token that is routed to it, and its
    assignments go to the nearest expert that is kept, with unchanged weights.

    The paper decides token by token; for a batch, experts are taken in the order of their largest weight, and each is
    kept unless one kept before it can stand in. All experts are decided at once in rounds, in each of which those kept
    in the round before can stand in. After an even number no expert is skipped without a stand-in that is kept; after
    enough rounds the order is followed exactly.
    """

    threshold: float
    stats: ExpertStats = field(repr=False)
    name = "siftmoe"

    @property
    def setting(self) -> str:
        return f"threshold={self.threshold:.3g}"

    def bind(self, layers: list[MoeLayer]) -> None:
        self.stats.check(layers)
        bounds = self.stats.distances / self.stats.norms.mean(-1)[:, None, None].clamp_min(1e-20)
        self.bounds = {layer.index: bounds[layer.index].to(layer.device) for layer in layers}

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        bounds = self.bounds[layer.index]
        largest = largest_weights(routing, layer.num_experts)
        place = ranks(largest)
        earlier = place.unsqueeze(-2) < place.unsqueeze(-1)
        stands_in = earlier & (largest.unsqueeze(-1) * bounds < self.threshold)  # (G, e, j): j for e
        kept = torch.ones_like(largest, dtype=torch.bool)
        for _ in range(SIFT_ROUNDS):
            kept = ~(stands_in & kept.unsqueeze(-2)).any(-1)
        nearest = bounds.masked_fill(~kept.unsqueeze(-2), float("inf")).argmin(-1)
        return send(routing, ~kept, nearest)
