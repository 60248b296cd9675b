"""Published rules, re-implemented from their papers' formulas, behind the interface that a selector has.

`KeepSet` rules keep a number of experts per batch and route again among them. `TopK`, `NAEE` and `Contribution` leave
assignments out token by token. `OEA`, `SERE` and `SiftMoE` keep the experts that some token needs and send what is left
to those. "First" means by weight throughout.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..errors import OptionError
from ..moe.decision import Decision, Groups
from ..moe.families import MoeLayer
from .expert_stats import ExpertStats

Then = Literal["reroute", "drop"]
# SiftMoE's keep set is found in so many rounds; an even number errs towards keeping.
SIFT_ROUNDS = 8


class Rule:
    """What the rules share: they fit any model, unless they say otherwise, and have no surrogates."""

    def bind(self, layers: list[MoeLayer]) -> None:
        pass

    def surrogate_bytes(self, layer: MoeLayer, skipped: float, batches: int) -> float:
        return 0.0


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

    def scores(self, layer: MoeLayer, groups: Groups) -> Tensor:
        """Scores `(G, experts)`; the best are kept."""
        raise NotImplementedError

    def decide(self, layer: MoeLayer, groups: Groups) -> Decision:
        kept = self.scores(layer, groups).topk(self.experts, dim=-1).indices
        allowed = torch.zeros(*kept.shape[:-1], layer.num_experts, dtype=torch.bool, device=kept.device)
        allowed = allowed.scatter(-1, kept, True)
        if self.then == "drop":
            return leave_out(groups, at_assignments(groups, allowed), kept[..., :1].unsqueeze(-1))
        indices, weights = layer.rule.route(groups.logits, allowed.unsqueeze(-2).expand_as(groups.logits))
        return Decision(indices, weights.to(groups.weights.dtype))


def sum_by_expert(groups: Groups, values: Tensor, experts: int) -> Tensor:
    """Sum of one value per assignment `(G, T, top_k)` over the active tokens, by expert `(G, experts)`."""
    values = torch.where(groups.active.unsqueeze(-1), values.float(), torch.zeros_like(values, dtype=torch.float32))
    zeros = torch.zeros(*values.shape[:-2], experts, device=values.device)
    return zeros.scatter_add(-1, groups.indices.flatten(-2).long(), values.flatten(-2))


def largest_weights(groups: Groups, experts: int) -> Tensor:
    """Largest weight that an active token gives to each expert `(G, experts)`; 0 for experts without assignment."""
    values = groups.weights.float() * groups.active.unsqueeze(-1)
    zeros = torch.zeros(*values.shape[:-2], experts, device=values.device)
    return zeros.scatter_reduce(-1, groups.indices.flatten(-2).long(), values.flatten(-2), "amax")


def ranks(values: Tensor) -> Tensor:
    """Place of each value in its row, 0 for the largest."""
    return values.argsort(dim=-1, descending=True, stable=True).argsort(-1)


def first_experts(groups: Groups, count: int, experts: int) -> Tensor:
    """The union of every active token's first `count` experts: `(G, experts)`, bool."""
    return sum_by_expert(groups, (ranks(groups.weights) < count).float(), experts) > 0


def at_assignments(groups: Groups, by_expert: Tensor) -> Tensor:
    """What each assignment's expert has `(G, experts)` -> `(G, T, top_k)`."""
    return by_expert.gather(-1, groups.indices.flatten(-2).long()).view_as(groups.indices)


def leave_out(groups: Groups, kept: Tensor, instead: Tensor) -> Decision:
    """Point assignments that are not kept `(G, T, top_k)` at a loaded expert (broadcasts to that) with weight 0."""
    weights = torch.where(kept, groups.weights, torch.zeros_like(groups.weights))
    return Decision(torch.where(kept, groups.indices, instead.to(groups.indices.dtype)), weights)


def leave_out_of_token(groups: Groups, kept: Tensor) -> Decision:
    """The same where every token keeps some: its own kept expert takes the places of the others."""
    return leave_out(groups, kept, groups.indices.gather(-1, kept.to(torch.int8).argmax(-1, keepdim=True)))


def restore_sum(layer: MoeLayer, groups: Groups, decision: Decision) -> Decision:
    """Scale a token's remaining weights to their sum before, if the model's rule fixes that; as routed with fewer."""
    if not layer.rule.normalises or layer.rule.expert_scale is not None:
        return decision
    before, after = (part.float().sum(-1, keepdim=True) for part in (groups.weights, decision.weights))
    weights = decision.weights.float() * (before / after.clamp_min(1e-20))
    return decision._replace(weights=weights.to(groups.weights.dtype))


def check_count(name: str, count: int, layers: list[MoeLayer]) -> None:
    """Refuse a number of experts per token that the model does not have."""
    for layer in layers:
        if not 1 <= count <= layer.top_k:
            raise OptionError(
                f"{name} takes the first {count} experts of each token, layer {layer.name} allows 1 to {layer.top_k}"
            )


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

    def scores(self, layer: MoeLayer, groups: Groups) -> Tensor:
        shape = (groups.logits.shape[0], layer.num_experts)
        return torch.rand(shape, generator=self.generators[layer.index], device=groups.logits.device)


@dataclass
class Popularity(KeepSet):
    """M experts with most assignments in the batch, re-route: the first version of Lynx (arXiv 2411.08982 v1)."""

    experts: int
    name = "popularity"

    def scores(self, layer: MoeLayer, groups: Groups) -> Tensor:
        return sum_by_expert(groups, torch.ones_like(groups.weights), layer.num_experts)


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

    def scores(self, layer: MoeLayer, groups: Groups) -> Tensor:
        below = groups.logits.float() - groups.logits.float().amax(-1, keepdim=True)
        bins = (self.alpha * below).floor().clamp(-self.beta, 0)
        count = groups.active.sum(-1).clamp_min(2).float()[:, None, None]
        return (count**bins * groups.active.unsqueeze(-1)).sum(-2)


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

    def scores(self, layer: MoeLayer, groups: Groups) -> Tensor:
        total = sum_by_expert(groups, groups.weights, layer.num_experts)
        if self.warm_up:
            total = total + first_experts(groups, 1, layer.num_experts) * (total.amax(-1, keepdim=True) + 1.0)
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

    def scores(self, layer: MoeLayer, groups: Groups) -> Tensor:
        best, experts = layer.rule.scores(groups.logits).topk(self.voted, dim=-1)
        return sum_by_expert(groups._replace(indices=experts), best, layer.num_experts)


@dataclass
class GateSquared(KeepSet):
    """M experts by the sum of squared gate weights: what leaving them out costs if all outputs are alike and independent."""

    experts: int
    then: Then = "reroute"
    name = "gate_sq"

    def scores(self, layer: MoeLayer, groups: Groups) -> Tensor:
        return sum_by_expert(groups, groups.weights.float().square(), layer.num_experts)


@dataclass
class GateMax(KeepSet):
    """M experts by the largest gate weight that any token gives them."""

    experts: int
    then: Then = "reroute"
    name = "gate_max"

    def scores(self, layer: MoeLayer, groups: Groups) -> Tensor:
        return largest_weights(groups, layer.num_experts)


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

    def decide(self, layer: MoeLayer, groups: Groups) -> Decision:
        decision = leave_out_of_token(groups, ranks(groups.weights) < self.count)
        return restore_sum(layer, groups, decision) if self.scaled else decision


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

    def decide(self, layer: MoeLayer, groups: Groups) -> Decision:
        weights = groups.weights.float()
        enough = weights >= self.betas[layer.index] * weights.amax(-1, keepdim=True)  # the first is: beta is 1 at most
        return restore_sum(layer, groups, leave_out_of_token(groups, enough))


@dataclass
class Contribution(Rule):
    """Each token keeps the experts that bring 1 - `tau` of its sum of weight × the expert's mean output norm.

    The fewest, largest first. The others are dropped, and the remaining weights stay as they are.
    """

    tau: float
    stats: ExpertStats = field(repr=False)
    name = "contribution"

    @property
    def setting(self) -> str:
        return f"tau={self.tau:g}"

    def bind(self, layers: list[MoeLayer]) -> None:
        self.stats.check(layers)
        self.norms = {layer.index: self.stats.norms[layer.index].to(layer.device) for layer in layers}

    def decide(self, layer: MoeLayer, groups: Groups) -> Decision:
        parts = groups.weights.float() * self.norms[layer.index][groups.indices.long()]
        ordered, order = parts.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        needed = before < (1.0 - self.tau) * ordered.sum(-1, keepdim=True)
        needed = needed | (torch.arange(layer.top_k, device=parts.device) == 0)  # also of a token without any weight
        return leave_out_of_token(groups, needed.gather(-1, order.argsort(-1)))


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

    def decide(self, layer: MoeLayer, groups: Groups) -> Decision:
        loaded = first_experts(groups, self.count, layer.num_experts).unsqueeze(-2)
        indices, routed = layer.rule.route(groups.logits, loaded.expand_as(groups.logits))
        weights = layer.rule.chosen(groups.logits, indices) * (routed > 0)
        if layer.rule.normalises:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Decision(indices, layer.rule.scaled(indices, weights).to(groups.weights.dtype))


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

    def decide(self, layer: MoeLayer, groups: Groups) -> Decision:
        kept = first_experts(groups, self.count, layer.num_experts)
        best, nearest = self.similarities[layer.index].masked_fill(~kept.unsqueeze(-2), float("-inf")).max(-1)
        return send(groups, ~kept & (best >= self.rho), nearest)


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

    def decide(self, layer: MoeLayer, groups: Groups) -> Decision:
        bounds = self.bounds[layer.index]
        largest = largest_weights(groups, layer.num_experts)
        place = ranks(largest)
        earlier = place.unsqueeze(-2) < place.unsqueeze(-1)
        stands_in = earlier & (largest.unsqueeze(-1) * bounds < self.threshold)  # (G, e, j): j for e
        kept = torch.ones_like(largest, dtype=torch.bool)
        for _ in range(SIFT_ROUNDS):
            kept = ~(stands_in & kept.unsqueeze(-2)).any(-1)
        nearest = bounds.masked_fill(~kept.unsqueeze(-2), float("inf")).argmin(-1)
        return send(groups, ~kept, nearest)


def send(groups: Groups, moved: Tensor, target: Tensor) -> Decision:
    """Give the assignments of moved experts `(G, experts)` to their targets `(G, experts)`, weights unchanged."""
    there = at_assignments(groups, target).to(groups.indices.dtype)
    return Decision(torch.where(at_assignments(groups, moved), there, groups.indices), groups.weights)
