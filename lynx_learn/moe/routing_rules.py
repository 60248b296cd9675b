"""How routers score experts: a small family of rules, and which of them gives what a router gave."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = Literal["softmax", "sigmoid", "sqrt_softplus", "topk_softmax", "sparsemixer"]
# Share of tokens a rule may miss through ties in low-precision logits. A wrong rule misses nearly all.
PROBE_MISSES = 0.03


@dataclass(frozen=True)
class ScoringRule:
    """How a router turns logits into `top_k` experts and their weights.

    Attributes:
        activation: `softmax`, `sigmoid` or `sqrt_softplus` (the root of the softplus) of all logits; `topk_softmax`,
            the softmax of the chosen ones; or `sparsemixer` (arXiv 2409.12136, as it is without training), which
            chooses one expert after the other and weighs each by the softmax over those close to it.
        normalise: divide the chosen weights by their sum.
        scale: factor on the weights.
        bias: added to the scores for the choice alone (DeepSeek-V3, arXiv 2412.19437), `(experts,)`.
        expert_groups, open_groups: the experts are split into groups, and the choice is limited to the
            `open_groups` strongest of them.
        strength_of: how many best scores of an expert group add up to its strength: 2 (DeepSeek-V3), 1 (DeepSeek-V2).
        expert_scale: factor on the weights by expert, after normalising, `(experts,)`.
        nearness: of `sparsemixer`: how far below the best, relatively, a logit still counts as close.
    """

    activation: Activation
    top_k: int
    normalise: bool = False
    scale: float = 1.0
    bias: Tensor | None = None
    expert_groups: int = 1
    open_groups: int = 1
    strength_of: int = 2
    expert_scale: Tensor | None = None
    nearness: float = 0.0

    def scores(self, logits: Tensor) -> Tensor:
        """Scores `(..., experts)` in float32 before the choice; comparable between the experts of a token."""
        logits = logits.float()
        if self.activation == "sigmoid":
            return logits.sigmoid()
        return functional.softplus(logits).sqrt() if self.activation == "sqrt_softplus" else logits.softmax(-1)

    def route(self, logits: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts for logits `(..., experts)`: indices and float32 weights, both `(..., top_k)`.

        With `allowed`, a boolean mask that broadcasts to the logits, other experts count as absent. Where fewer
        than `top_k` are allowed, the surplus assignments repeat an allowed expert with weight 0.
        """
        logits = logits.float()
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        scores = self.scores(logits)
        choice = logits if self.activation in ("topk_softmax", "sparsemixer") else scores
        if self.bias is not None:
            choice = choice + self.bias.to(choice)
        if allowed is not None:
            choice = choice.masked_fill(~allowed, float("-inf"))
        if self.expert_groups > 1:
            choice = choice.masked_fill(~self._in_open_groups(choice), float("-inf"))
        values, indices = choice.topk(self.top_k, dim=-1)
        weights = values.softmax(-1) if self.activation == "topk_softmax" else self.chosen(logits, indices)
        if allowed is not None:
            absent = values == float("-inf")
            indices = torch.where(absent, indices[..., :1], indices)
            weights = weights.masked_fill(absent, 0.0)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return indices, self.scaled(indices, weights)

    def chosen(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Weights, before normalising and factors, of experts `(..., assignments)` chosen in that order."""
        logits = logits.float()
        if self.activation == "sparsemixer":
            return self._mixed(logits, indices)
        return self.scores(logits).gather(-1, indices)

    def scaled(self, indices: Tensor, weights: Tensor) -> Tensor:
        """Weights of the experts `indices`, both `(..., assignments)`, with the rule's factors."""
        if self.expert_scale is not None:
            weights = weights * self.expert_scale.to(weights)[indices]
        return weights * self.scale

    @property
    def normalises(self) -> bool:
        """Whether the weights of each token have a fixed sum, before any factor by expert."""
        return self.normalise or self.activation == "topk_softmax"

    def _in_open_groups(self, choice: Tensor) -> Tensor:
        grouped = choice.unflatten(-1, (self.expert_groups, -1))
        best = grouped.topk(min(self.strength_of, grouped.shape[-1]), dim=-1).values
        # An absent second adds nothing, so an expert group with one left can open, and one with none cannot be best.
        strength = best[..., 0] + best[..., 1:].masked_fill(best[..., 1:] == float("-inf"), 0.0).sum(-1)
        opened = strength.topk(self.open_groups, dim=-1).indices
        is_open = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=choice.device).scatter(-1, opened, True)
        return is_open.unsqueeze(-1).expand_as(grouped).flatten(-2)

    def _mixed(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Weight of each chosen expert among those that are left and close to it; absent experts are never left."""
        left, weights = logits, []
        for index in indices.unbind(-1):
            chosen = index.unsqueeze(-1)
            best = logits.gather(-1, chosen)
            far = (best - logits) / torch.maximum(logits.abs(), best) > 2 * self.nearness
            weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(-1, chosen))
            left = left.scatter(-1, chosen, float("-inf"))
        return torch.cat(weights, dim=-1)

    def describe(self) -> str:
        """One phrase for people, e.g. `sigmoid, choice bias, 2 of 4 expert groups, normalised, scaled by 2.5`."""
        named = {"topk_softmax": "softmax of the top-k", "sqrt_softplus": "root of softplus"}
        parts = [named.get(self.activation, self.activation)]
        parts += ["choice bias"] if self.bias is not None else []
        by = " by their best" if self.strength_of == 1 else ""
        parts += [f"{self.open_groups} of {self.expert_groups} expert groups{by}"] if self.expert_groups > 1 else []
        parts += ["normalised"] if self.normalise else []
        parts += ["scaled by expert"] if self.expert_scale is not None else []
        parts += [f"scaled by {self.scale:g}"] if self.scale != 1.0 else []
        return ", ".join(parts)


def matching_rule(
    block: nn.Module, router: nn.Module, logits: Tensor, indices: Tensor, weights: Tensor
) -> ScoringRule | None:
    """The rule by which the logits `(tokens, experts)` give these indices and weights `(tokens, top_k)`, if any does.

    Biases, factors and limits to expert groups are taken from attributes of the router or its block; whether and how
    they are used is found by trying.
    """
    wanted = _dense(indices, weights, logits.shape[1])
    for rule in _candidate_rules(block, router, logits.shape[1], indices.shape[1]):
        given = _dense(*rule.route(logits), logits.shape[1])
        agree = torch.isclose(given, wanted, rtol=2e-2, atol=1e-3).all(dim=-1).float().mean()
        if agree >= 1.0 - PROBE_MISSES:
            return rule
    return None


def _dense(indices: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Weights by expert `(tokens, experts)`, so that the order of the assignments does not matter."""
    zeros = torch.zeros(indices.shape[0], experts, device=indices.device)
    return zeros.scatter_add(1, indices.long(), weights.float())


def _candidate_rules(block: nn.Module, router: nn.Module, experts: int, top_k: int) -> Iterator[ScoringRule]:
    """The rules this router could follow, by the attributes it and its block have; what is there is tried first."""
    biases: list[Tensor | None] = [*_vectors(block, router, experts, "bias"), None]
    by_expert: list[Tensor | None] = [*_vectors(block, router, experts, "scale"), None]
    numbers = {name: value for name, value in vars(router).items() if isinstance(value, int | float)}
    scales = [float(value) for name, value in numbers.items() if "scal" in name and value]
    jitter = next((float(value) for name, value in numbers.items() if "router_jitter" in name), None)
    split = int(next((numbers[name] for name in ("num_group", "n_group") if numbers.get(name)), 1))
    limits: list[dict[str, Any]] = [{}]
    if split > 1 and experts % split == 0:
        opened = min(int(numbers.get("topk_group") or 1), split)
        limits = [{"expert_groups": split, "open_groups": opened, "strength_of": best} for best in (2, 1)] + limits
    activations: tuple[Activation, ...] = ("softmax", "sigmoid", "topk_softmax", "sqrt_softplus")
    for bias, limit, scale, own in itertools.product(biases, limits, dict.fromkeys([*scales, 1.0]), by_expert):
        for activation, normalise in itertools.product(activations, (True, False)):
            yield ScoringRule(activation, top_k, normalise, scale, bias, expert_scale=own, **limit)
    if jitter is not None:
        yield ScoringRule("sparsemixer", top_k, nearness=jitter)


def _vectors(block: nn.Module, router: nn.Module, experts: int, kind: str) -> Iterator[Tensor]:
    """Tensors with one value per expert and `kind` in their name: anywhere in the router, or the block's own."""
    own = itertools.chain(block.named_parameters(recurse=False), block.named_buffers(recurse=False))
    for name, value in itertools.chain(router.named_parameters(), router.named_buffers(), own):
        last = name.rsplit(".", 1)[-1]
        # A bias of the linear layer is part of the logits.
        if value.numel() == experts and kind in last and last != "bias":
            yield value.detach().reshape(-1)
