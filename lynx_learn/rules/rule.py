"""What published rules share: sums over a batch, and leaving assignments out.

The rules are re-implemented from their papers' formulas, behind the interface that a selector has. "First" means by weight
throughout.
"""

from typing import Literal

import torch
from torch import Tensor

from ..errors import OptionError
from ..moe.decision import Decision, Groups
from ..moe.families import MoeLayer

Then = Literal["reroute", "drop"]


class Rule:
    """What the rules share: they fit any model, unless they say otherwise, and have no surrogates."""

    def bind(self, layers: list[MoeLayer]) -> None:
        pass

    def surrogate_bytes(self, layer: MoeLayer, skipped: float, batches: int) -> float:
        return 0.0


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


def send(groups: Groups, moved: Tensor, target: Tensor) -> Decision:
    """Give the assignments of moved experts `(G, experts)` to their targets `(G, experts)`, weights unchanged."""
    there = at_assignments(groups, target).to(groups.indices.dtype)
    return Decision(torch.where(at_assignments(groups, moved), there, groups.indices), groups.weights)
