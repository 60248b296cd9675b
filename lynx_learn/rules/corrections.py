"""Corrections of what a layer puts out when assignments are left out; each goes around another policy."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import OptionError
from ..moe.decision import Decision, Policy, Routing, confine
from ..moe.families import MoeLayer
from .expert_stats import ExpertStats

# What keeps LDA's denominator from 0, relative to the full output's spread.
DAMPING = 1e-3


@dataclass
class K1K2:
    """Weights divided by the mass of a number of experts of its own choice (k1/k2, arXiv 2609.04575).

    A token that runs k1 experts has their weights divided by the router's mass of its top-`k2`: k2 = k1 scales what is left
    to the whole, k2 above the model's top-k makes it smaller than it was. Around any policy that drops assignments in
    their places; tokens that lose none stay as they are.
    """

    inner: Policy
    k2: int
    name = "k1k2"

    @property
    def setting(self) -> str:
        return f"{self.inner.name} {self.inner.setting} k2={self.k2}"

    def bind(self, layers: list[MoeLayer]) -> None:
        """Bind the inner policy.

        Raises:
            OptionError: the model does not divide weights by their sum, or has fewer than k2 experts.
        """
        for layer in layers:
            if layer.rule.expert_scale is not None or not (layer.rule.normalises):
                raise OptionError(
                    f"k1k2 changes what weights are divided by, layer {layer.name} does not divide them: leave it out for this model"
                )
            if not 1 <= self.k2 <= layer.num_experts:
                raise OptionError(
                    f"k1k2 divides by the mass of {self.k2} experts, layer {layer.name} allows 1 to {layer.num_experts}"
                )
        self.inner.bind(layers)

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        decision = self.inner.decide(layer, routing)
        scores = layer.rule.scores(routing.logits)
        routed = scores.gather(-1, routing.indices.long()).sum(-1, keepdim=True)
        factor = routed / scores.topk(self.k2, dim=-1).values.sum(-1, keepdim=True).clamp_min(1e-20)
        lost = ((decision.weights == 0) & (routing.weights != 0)).any(-1, keepdim=True)
        weights = torch.where(lost, decision.weights * factor, decision.weights)
        return decision._replace(weights=weights.to(routing.weights.dtype))

    def own_bytes(self, layer: MoeLayer, skipped: Tensor, batches: int) -> float:
        return self.inner.own_bytes(layer, skipped, batches)


@dataclass
class LDA:
    """The routed output's mean and spread restored, by output dimension (LDA, arXiv 2609.09241).

    Leaving assignments out shifts a layer's output y and changes its variance. With mean μ and standard deviation σ of y
    over the tokens of the statistics, as the policy leaves it (k) and untouched (k0), earlier layers being untouched:
    ŷ = σ(k0) · (y − μ(k)) / (σ(k) + ε) + μ(k0). Around any policy; what surrogates answer is part of y.

    Attributes:
        size: tokens of a decode batch, in which the policy decides for the tokens of the statistics.
    """

    inner: Policy
    stats: ExpertStats = field(repr=False)
    size: int
    name: str = "lda"

    def __post_init__(self) -> None:
        self.bound_to: list[MoeLayer] | None = None

    @property
    def setting(self) -> str:
        return f"{self.inner.name} {self.inner.setting}"

    def bind(self, layers: list[MoeLayer]) -> None:
        """Bind the inner policy, and measure the moments, once for the same layers."""
        self.inner.bind(layers)
        self.stats.check(layers)
        if self.bound_to is not layers:
            self.maps = {layer.index: self._map(layer) for layer in layers}
            self.bound_to = layers

    @torch.no_grad()
    def _map(self, layer: MoeLayer) -> tuple[Tensor, Tensor]:
        """Factor and constant of the output, both `(hidden,)`."""
        routing = self.stats.batches(layer, self.size)
        decision = confine(self.inner.decide(layer, routing), routing.active, layer.num_experts)
        full = routed_output(layer, routing, Decision(routing.indices, routing.weights))
        (mean, spread), (mean0, spread0) = (
            (y.mean(0), y.std(0)) for y in (routed_output(layer, routing, decision), full)
        )
        factor = spread0 / (spread + DAMPING * spread0).clamp_min(1e-20)
        return factor, mean0 - factor * mean

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        decision = self.inner.decide(layer, routing)
        factor, constant = self.maps[layer.index]
        addition = constant.expand_as(routing.hidden)
        if decision.addition is not None:
            addition = addition + factor * decision.addition.float()
        return decision._replace(factor=factor.expand_as(routing.hidden), addition=addition.to(routing.hidden.dtype))

    def own_bytes(self, layer: MoeLayer, skipped: Tensor, batches: int) -> float:
        return self.inner.own_bytes(layer, skipped, batches) + 2 * 4 * layer.hidden_size * batches


def routed_output(layer: MoeLayer, routing: Routing, decision: Decision) -> Tensor:
    """What a layer's routed experts and surrogates put out `(tokens, hidden)` in float32, past any hooks."""
    hidden = routing.hidden.flatten(0, 1)
    parts = (decision.indices.flatten(0, 1), decision.weights.flatten(0, 1).to(hidden.dtype))
    output: Tensor = layer.experts.forward(hidden, *parts)
    added = 0.0 if decision.addition is None else decision.addition.flatten(0, 1).float()
    return output.float() + added
