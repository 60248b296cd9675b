"""Rules that keep a number of experts per batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from ..moe.decision import Decision, Routing
from ..moe.families import MoeLayer
from .rule import (
    Rule,
    Then,
    at_assignments,
    first_experts,
    largest_weights,
    leave_out,
    sum_by_expert,
)


class KeepSet(Rule):
    """A rule that keeps a set of experts per batch and lets every token choose its top-k again among them.

    With `then="drop"` the assignments to other experts are left out instead, and the remaining weights stay as they are.
    """

    name: str
    experts: int
    then: Then = "reroute"

    @property
    def setting(self) -> str:
        return f"M={self.experts}" + (" drop" if self.then == "drop" else "")

    def bind(self, layers: list[MoeLayer]) -> None:
        """Check the number of experts.

        Raises:
            OptionError: fewer than a token's top-k, or more than there are.
        """
        for layer in layers:
            if not layer.top_k <= self.experts <= layer.num_experts:
                raise OptionError(
                    f"{self.name} keeps {self.experts} experts, layer {layer.name} allows {layer.top_k} to {layer.num_experts}"
                )

    def scores(self, layer: MoeLayer, routing: Routing) -> Tensor:
        """Scores `(G, experts)`; the best are kept."""
        raise NotImplementedError

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        kept = self.scores(layer, routing).topk(self.experts, dim=-1).indices
        allowed = torch.zeros(*kept.shape[:-1], layer.num_experts, dtype=torch.bool, device=kept.device)
        allowed = allowed.scatter(-1, kept, True)
        if self.then == "drop":
            return leave_out(routing, at_assignments(routing, allowed), kept[..., :1].unsqueeze(-1))
        indices, weights = layer.rule.route(routing.logits, allowed.unsqueeze(-2).expand_as(routing.logits))
        return Decision(indices, weights.to(routing.weights.dtype))


@dataclass
class Random(KeepSet):
    """M experts at random, the others re-routed. What any rule must beat."""

    experts: int
    seed: int = 0
    name = "random"

    def bind(self, layers: list[MoeLayer]) -> None:
        super().bind(layers)
        self.generators = {
            layer.index: torch.Generator(layer.device).manual_seed(self.seed + layer.index) for layer in layers
        }

    def scores(self, layer: MoeLayer, routing: Routing) -> Tensor:
        shape = (routing.logits.shape[0], layer.num_experts)
        return torch.rand(shape, generator=self.generators[layer.index], device=routing.logits.device)


@dataclass
class Popularity(KeepSet):
    """M experts with most assignments in the batch, re-route: the first version of Lynx (arXiv 2411.08982 v1)."""

    experts: int
    name = "popularity"

    def scores(self, layer: MoeLayer, routing: Routing) -> Tensor:
        return sum_by_expert(routing, torch.ones_like(routing.weights), layer.num_experts)


@dataclass
class Lynx(KeepSet):
    """Lynx's AffinityBinning (arXiv 2411.08982 v3): M experts by votes that fall with the distance to a token's best.

    A token's logits below its largest, times `alpha`, are rounded down to bins 0 to -`beta`; its vote for an expert is
    n^bin for a batch of n active tokens. So one token's first expert outweighs what all n tokens can give to an expert
    that is nobody's first. The authors derive alpha and beta from top-k and the number of experts in a way that is not
    published (beta is about 5), nor is their cut-off. Here a bin is 1/`alpha` nats of logit, by default half a nat, a
    factor of 1.6 in probability, so that a token's top-k mostly fall into bins above the last; and M is given. n counts
    as 2 at least: with 1, all votes would be equal.

    Left out: confident tokens, which keep their first expert whatever M is. The votes put every token's first expert
    before any other already, so this matters only below the number of different first experts.
    """

    experts: int
    alpha: float = 2.0
    beta: int = 5
    name = "lynx"

    @property
    def setting(self) -> str:
        return f"M={self.experts} alpha={self.alpha:g} beta={self.beta}"

    def scores(self, layer: MoeLayer, routing: Routing) -> Tensor:
        below = routing.logits.float() - routing.logits.float().amax(-1, keepdim=True)
        bins = (self.alpha * below).floor().clamp(-self.beta, 0)
        count = routing.active.sum(-1).clamp_min(2).float()[:, None, None]
        return (count**bins * routing.active.unsqueeze(-1)).sum(-2)


@dataclass
class XShare(KeepSet):
    """XShare (arXiv 2602.07265): M experts by the sum of gate weights, re-route.

    With `warm_up` every token's first expert comes before the others, as published; without, the sum alone decides.
    """

    experts: int
    warm_up: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return "xshare" if self.warm_up else "gate_sum"

    def scores(self, layer: MoeLayer, routing: Routing) -> Tensor:
        total = sum_by_expert(routing, routing.weights, layer.num_experts)
        if self.warm_up:
            total = total + first_experts(routing, 1, layer.num_experts) * (total.amax(-1, keepdim=True) + 1.0)
        return total


@dataclass
class Vote(KeepSet):
    """M experts by the sum of router scores over each token's best `voted`, re-route (MoE-Spec, arXiv 2602.16052).

    The scores are the router's softmax or sigmoid of all logits, before choice and normalisation. Dynamic expert
    sharing votes with each token's top-k, MoE-Spec with the scores of all experts.
    """

    experts: int
    voted: int
    name = "vote"

    @property
    def setting(self) -> str:
        return f"M={self.experts} K={self.voted}"

    def bind(self, layers: list[MoeLayer]) -> None:
        super().bind(layers)
        for layer in layers:
            if not 1 <= self.voted <= layer.num_experts:
                raise OptionError(
                    f"vote counts {self.voted} experts of each token, layer {layer.name} allows 1 to {layer.num_experts}"
                )

    def scores(self, layer: MoeLayer, routing: Routing) -> Tensor:
        best, experts = layer.rule.scores(routing.logits).topk(self.voted, dim=-1)
        return sum_by_expert(routing._replace(indices=experts), best, layer.num_experts)


@dataclass
class GateSquared(KeepSet):
    """M experts by the sum of squared gate weights: what leaving them out costs if all outputs are alike and independent."""

    experts: int
    then: Then = "reroute"
    name = "gate_sq"

    def scores(self, layer: MoeLayer, routing: Routing) -> Tensor:
        return sum_by_expert(routing, routing.weights.float().square(), layer.num_experts)


@dataclass
class GateMax(KeepSet):
    """M experts by the largest gate weight that any token gives them."""

    experts: int
    then: Then = "reroute"
    name = "gate_max"

    def scores(self, layer: MoeLayer, routing: Routing) -> Tensor:
        return largest_weights(routing, layer.num_experts)
