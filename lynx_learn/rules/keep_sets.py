"""Rules that keep some experts per batch."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import OptionError
from ..moe.decision import Decision, Routing
from ..moe.families import MoeLayer
from .expert_stats import ExpertStats
from .rule import (
    Rule,
    Then,
    at_assignments,
    check_factors,
    first_experts,
    gate_squares,
    gate_sum,
    largest_weights,
    leave_out,
    sum_by_expert,
)


class Keeping(Rule):
    """A rule that keeps some experts per batch and lets every token choose its top-k again among them.

    With `then="drop"` the assignments to other experts are left out instead, and the remaining weights stay as they are.
    """

    then: Then = "reroute"

    @property
    def setting(self) -> str:
        """Its parameters, for tables."""
        raise NotImplementedError

    def keep(self, layer: MoeLayer, routing: Routing) -> tuple[Tensor, Tensor]:
        """An expert that stays `(G, 1)`, and which do `(G, experts)`."""
        raise NotImplementedError

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        first, kept = self.keep(layer, routing)
        if self.then == "drop":
            return leave_out(routing, at_assignments(routing, kept), first.unsqueeze(-1))
        indices, weights = layer.rule.route(routing.logits, kept.unsqueeze(-2).expand_as(routing.logits))
        return Decision(indices, weights.to(routing.weights.dtype))


class KeepSet(Keeping):
    """A rule that keeps a number of experts per batch."""

    name: str
    experts: int

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

    def keep(self, layer: MoeLayer, routing: Routing) -> tuple[Tensor, Tensor]:
        best = self.scores(layer, routing).topk(self.experts, dim=-1).indices
        nothing = torch.zeros(*best.shape[:-1], layer.num_experts, dtype=torch.bool, device=best.device)
        return best[..., :1], nothing.scatter(-1, best, True)


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
        total = gate_sum(routing, layer.num_experts)
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
        return gate_squares(routing, layer.num_experts)


@dataclass
class GateMax(KeepSet):
    """M experts by the largest gate weight that any token gives them."""

    experts: int
    then: Then = "reroute"
    name = "gate_max"

    def scores(self, layer: MoeLayer, routing: Routing) -> Tensor:
        return largest_weights(routing, layer.num_experts)


@dataclass
class GateNorm(KeepSet):
    """M experts by the sum of gate weight × the expert's mean output norm."""

    experts: int
    stats: ExpertStats = field(repr=False)
    then: Then = "reroute"
    name = "gate_norm"

    def bind(self, layers: list[MoeLayer]) -> None:
        super().bind(layers)
        self.stats.check(layers)
        self.norms = {layer.index: self.stats.norms[layer.index].to(layer.device) for layer in layers}

    def scores(self, layer: MoeLayer, routing: Routing) -> Tensor:
        return gate_sum(routing, layer.num_experts) * self.norms[layer.index]


@dataclass
class Layered(Keeping):
    """Experts whose score × the layer's factor is at least one threshold for all layers; the others are dropped.

    So layers and batches keep different numbers of experts, as with a selector, and nothing is learned: `layered`
    itself keeps an expert if Σ_t weight² × its mean squared output norm × the layer's sensitivity, what dropping it
    costs in nats if errors of different experts are independent, is large enough. The other scores are those of the
    rules that keep a number of experts. The expert with the best score always stays.

    Sensitivities, nats of KL per unit of squared error in a layer's output, are a measured property of the model. They
    are read from a selector of it, which has them from before it was tuned; one factor for all layers moves the
    threshold alone.

    Attributes:
        score: `gate_sum`, `gate_sq` or `gate_max`.
        factors: of each expert's score `(layers, experts)`.
    """

    name: str
    score: str
    threshold: float
    factors: Tensor = field(repr=False)
    then: Then = "drop"

    @property
    def setting(self) -> str:
        return f"tau={self.threshold:.3g}" + (" reroute" if self.then == "reroute" else "")

    def bind(self, layers: list[MoeLayer]) -> None:
        check_factors(self.name, self.factors, layers)
        self.bound = {layer.index: self.factors[layer.index].to(layer.device) for layer in layers}

    def keep(self, layer: MoeLayer, routing: Routing) -> tuple[Tensor, Tensor]:
        scores = SCORES[self.score](routing, layer.num_experts) * self.bound[layer.index]
        best = scores.argmax(-1, keepdim=True)
        return best, (scores >= self.threshold).scatter(-1, best, True)


SCORES: dict[str, Callable[[Routing, int], Tensor]] = {
    "gate_sum": gate_sum,
    "gate_sq": gate_squares,
    "gate_max": largest_weights,
}
