"""Rules that keep what some token needs and send the rest there."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..moe.decision import Decision, Routing, used_experts
from ..moe.families import MoeLayer
from .expert_stats import ExpertStats
from .keep_sets import Keeping
from .rule import (
    Rule,
    at_assignments,
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
class ExFold(Rule):
    """Expert folding (arXiv 2608.24938): a skipped expert's assignments go to the kept one that stands in best, scaled.

    For each ordered pair of experts a scalar and the loss that it leaves are measured before (`ExpertStats.scalars`,
    `losses`). The assignment of a skipped expert i goes to the kept expert j of least loss, with its weight × the scalar
    of i and j; where no token of the statistics was routed to i and any kept expert, it adds nothing.

    Attributes:
        pool: which experts stay; as published those with the largest sums of weight × mean output norm, `GateNorm`.
    """

    pool: Keeping
    stats: ExpertStats = field(repr=False)
    name = "exfold"

    @property
    def setting(self) -> str:
        return self.pool.setting

    def bind(self, layers: list[MoeLayer]) -> None:
        self.pool.bind(layers)
        self.stats.check(layers)
        scalars, losses = self.stats.scalars, self.stats.losses
        if scalars is None or losses is None:
            raise OptionError("exfold needs statistics of pairs of experts: measure them with pairs=True")
        self.pairs = {
            layer.index: [part[layer.index].to(layer.device) for part in (scalars, losses)] for layer in layers
        }

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        scalars, losses = self.pairs[layer.index]
        first, kept = self.pool.keep(layer, routing)
        # An expert without assignment is not there for others.
        used = used_experts(routing.indices, routing.active, layer.num_experts)
        kept = (kept & used).scatter(-1, first, True)
        nearest = losses.masked_fill(~kept.unsqueeze(-2), float("inf")).argmin(-1)
        scalar = scalars.expand(*nearest.shape, -1).gather(-1, nearest.unsqueeze(-1)).squeeze(-1)
        moved = send(routing, ~kept, nearest)
        factor = at_assignments(routing, torch.where(kept, 1.0, scalar))
        return moved._replace(weights=(moved.weights * factor).to(routing.weights.dtype))


@dataclass
class SiftMoE(Rule):
    """Similarity-aware skipping (SiftMoE, arXiv 2603.23888), read from a summary of the paper.

    Leaving expert e to expert j costs token t at most weight × d(e, j) × s: d is the mean distance of their outputs, s
    the layer's sensitivity; leaving it out costs weight × d(e, ∅) × s, d(e, ∅) being e's mean output norm. An expert is
    skipped when one of these is below `threshold` for every token that is routed to it. Its assignments then go to the
    nearest expert that is kept, with unchanged weights, or are dropped where nothing is nearer.

    s is 1 / the mean output norm of the layer's experts, so that the bound is a share of what an expert adds; or given:
    then layers that an error hurts more have smaller limits.

    The paper decides token by token; for a batch, experts are taken in the order of their largest weight, and each is
    kept unless it can be dropped, or one kept before it can stand in. The first always stays. All experts are decided at
    once in rounds, in each of which those kept in the round before can stand in. After an even number no expert is
    skipped without a stand-in that is kept; after enough rounds the order is followed exactly.
    """

    threshold: float
    stats: ExpertStats = field(repr=False)
    sensitivities: Tensor | None = field(default=None, repr=False)
    name = "siftmoe"

    @property
    def setting(self) -> str:
        return f"threshold={self.threshold:.3g}" + ("" if self.sensitivities is None else " by layer")

    def bind(self, layers: list[MoeLayer]) -> None:
        self.stats.check(layers)
        scale = self.sensitivities
        if scale is None:
            scale = 1 / self.stats.norms.mean(-1).clamp_min(1e-20)
        bounds = torch.cat([self.stats.distances, self.stats.lengths.unsqueeze(-1)], dim=-1) * scale[:, None, None]
        self.bounds = {layer.index: bounds[layer.index].to(layer.device) for layer in layers}

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        bounds, nothing = self.bounds[layer.index], layer.num_experts  # the last column is that of leaving out
        largest = largest_weights(routing, layer.num_experts)
        place = ranks(largest)
        earlier = place.unsqueeze(-2) < place.unsqueeze(-1)
        small = largest.unsqueeze(-1) * bounds < self.threshold
        stands_in = earlier & small[..., :nothing]  # (G, e, j): j for e
        droppable = small[..., nothing] & (place > 0)
        kept = torch.ones_like(largest, dtype=torch.bool)
        for _ in range(SIFT_ROUNDS):
            kept = ~((stands_in & kept.unsqueeze(-2)).any(-1) | droppable)
        absent = nn.functional.pad(~kept, (0, 1), value=False).unsqueeze(-2)
        nearest = bounds.masked_fill(absent, float("inf")).argmin(-1)
        dropped = ~kept & (nearest == nothing)
        nearest = torch.where(dropped, place.argmin(-1, keepdim=True), nearest)
        decision = send(routing, ~kept, nearest)
        return decision._replace(weights=decision.weights * ~at_assignments(routing, dropped))
