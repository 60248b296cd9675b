"""Published rules, re-implemented from their papers' formulas, behind the interface that a selector has."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .families import MoeLayer
from .policies import Decision, Groups


class KeepSet:
    """A rule that keeps a set of experts per batch and lets every token choose its top-k again among them."""

    name: str
    experts: int

    @property
    def setting(self) -> str:
        return f"M={self.experts}"

    def bind(self, layers: list[MoeLayer]) -> None:
        for layer in layers:
            if not layer.top_k <= self.experts <= layer.num_experts:
                raise ValueError(
                    f"{self.name} keeps {self.experts} experts, layer {layer.name} allows {layer.top_k} to {layer.num_experts}"
                )

    def scores(self, layer: MoeLayer, groups: Groups) -> Tensor:
        """Scores `(G, experts)`; the best are kept."""
        raise NotImplementedError

    def decide(self, layer: MoeLayer, groups: Groups) -> Decision:
        kept = self.scores(layer, groups).topk(self.experts, dim=-1).indices
        allowed = torch.zeros(*kept.shape[:-1], layer.num_experts, dtype=torch.bool, device=kept.device)
        allowed = allowed.scatter(-1, kept, True).unsqueeze(-2)
        indices, weights = layer.rule.route(groups.logits, allowed.expand_as(groups.logits))
        return Decision(indices, weights.to(groups.weights.dtype))

    def surrogate_bytes(self, layer: MoeLayer) -> int:
        return 0


def sum_by_expert(groups: Groups, values: Tensor, experts: int) -> Tensor:
    """Sum of one value per assignment `(G, T, top_k)` over the active tokens, by expert `(G, experts)`."""
    values = torch.where(groups.active.unsqueeze(-1), values.float(), torch.zeros_like(values, dtype=torch.float32))
    zeros = torch.zeros(*values.shape[:-2], experts, device=values.device)
    return zeros.scatter_add(-1, groups.indices.flatten(-2).long(), values.flatten(-2))


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
            best = (groups.weights == groups.weights.amax(-1, keepdim=True)).float()
            total = total + (sum_by_expert(groups, best, layer.num_experts) > 0) * (total.amax(-1, keepdim=True) + 1.0)
        return total
