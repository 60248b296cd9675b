"""What published rules share: sums over a batch, and leaving assignments out.

The rules are re-implemented from their papers' formulas, behind the interface that a selector has. "First" means by weight
throughout.
"""

from typing import Literal

import torch
from torch import Tensor

from ..errors import OptionError
from ..moe.decision import Decision, Routing
from ..moe.families import MoeLayer

Then = Literal["reroute", "drop"]


class Rule:
    """What the rules share: they fit any model, unless they say otherwise, and read nothing that counts beside experts."""

    def bind(self, layers: list[MoeLayer]) -> None:
        pass

    def own_bytes(self, layer: MoeLayer, skipped: Tensor, batches: int) -> float:
        return 0.0


def sum_by_expert(routing: Routing, values: Tensor, experts: int) -> Tensor:
    """Sum of one value per assignment `(G, T, top_k)` over the active tokens, by expert `(G, experts)`."""
    values = torch.where(routing.active.unsqueeze(-1), values.float(), torch.zeros_like(values, dtype=torch.float32))
    zeros = torch.zeros(*values.shape[:-2], experts, device=values.device)
    return zeros.scatter_add(-1, routing.indices.flatten(-2).long(), values.flatten(-2))


def gate_sum(routing: Routing, experts: int) -> Tensor:
    """Sum of the weights that active tokens give to each expert `(G, experts)`."""
    return sum_by_expert(routing, routing.weights, experts)


def gate_squares(routing: Routing, experts: int) -> Tensor:
    """Sum of their squares `(G, experts)`."""
    return sum_by_expert(routing, routing.weights.float().square(), experts)


def largest_weights(routing: Routing, experts: int) -> Tensor:
    """Largest weight that an active token gives to each expert `(G, experts)`; 0 for experts without assignment."""
    values = routing.weights.float() * routing.active.unsqueeze(-1)
    zeros = torch.zeros(*values.shape[:-2], experts, device=values.device)
    return zeros.scatter_reduce(-1, routing.indices.flatten(-2).long(), values.flatten(-2), "amax")


def ranks(values: Tensor) -> Tensor:
    """Place of each value in its row, 0 for the largest."""
    return values.argsort(dim=-1, descending=True, stable=True).argsort(-1)


def first_experts(routing: Routing, count: int, experts: int) -> Tensor:
    """The union of every active token's first `count` experts: `(G, experts)`, bool."""
    return sum_by_expert(routing, (ranks(routing.weights) < count).float(), experts) > 0


def at_assignments(routing: Routing, by_expert: Tensor) -> Tensor:
    """What each assignment's expert has `(G, experts)` -> `(G, T, top_k)`."""
    return by_expert.gather(-1, routing.indices.flatten(-2).long()).view_as(routing.indices)


def leave_out(routing: Routing, kept: Tensor, instead: Tensor) -> Decision:
    """Point assignments that are not kept `(G, T, top_k)` at a loaded expert (broadcasts to that) with weight 0."""
    weights = torch.where(kept, routing.weights, torch.zeros_like(routing.weights))
    return Decision(torch.where(kept, routing.indices, instead.to(routing.indices.dtype)), weights)


def leave_out_of_token(routing: Routing, kept: Tensor) -> Decision:
    """The same where every token keeps some: its own kept expert takes the places of the others."""
    return leave_out(routing, kept, routing.indices.gather(-1, kept.to(torch.int8).argmax(-1, keepdim=True)))


def restore_sum(layer: MoeLayer, routing: Routing, decision: Decision) -> Decision:
    """Scale a token's remaining weights to their sum before, if the model's rule fixes that; as routed with fewer."""
    if not layer.rule.normalises or layer.rule.expert_scale is not None:
        return decision
    before, after = (part.float().sum(-1, keepdim=True) for part in (routing.weights, decision.weights))
    weights = decision.weights.float() * (before / after.clamp_min(1e-20))
    return decision._replace(weights=weights.to(routing.weights.dtype))


def check_count(name: str, count: int, layers: list[MoeLayer]) -> None:
    """Refuse a number of experts per token that the model does not have."""
    for layer in layers:
        if not 1 <= count <= layer.top_k:
            raise OptionError(
                f"{name} takes the first {count} experts of each token, layer {layer.name} allows 1 to {layer.top_k}"
            )


def check_factors(name: str, factors: Tensor, layers: list[MoeLayer]) -> None:
    """Refuse factors by layer and expert that are of a model of another shape."""
    wanted = (len(layers), layers[0].num_experts)
    if tuple(factors.shape) != wanted:
        raise OptionError(
            f"{name} has factors for {factors.shape[0]} layers of {factors.shape[1]} experts, the model has {wanted[0]} of "
            f"{wanted[1]}: give a selector and a trace of this model"
        )


def send(routing: Routing, moved: Tensor, target: Tensor) -> Decision:
    """Give the assignments of moved experts `(G, experts)` to their targets `(G, experts)`, weights unchanged."""
    there = at_assignments(routing, target).to(routing.indices.dtype)
    return Decision(torch.where(at_assignments(routing, moved), there, routing.indices), routing.weights)
