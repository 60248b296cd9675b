"""How routers score experts: a small family of rules, and which of them a router follows, found by trying it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import ModelError

Activation = Literal["softmax", "sigmoid", "topk_softmax"]
# Tokens in the probe that tells a router's scoring rule, and the share of them a rule may miss through ties in
# low-precision logits. A wrong rule misses nearly all.
PROBE_TOKENS, PROBE_MISSES = 128, 0.03


@dataclass(frozen=True)
class ScoringRule:
    """How a router turns logits into `top_k` experts and their weights.

    Attributes:
        activation: `softmax` or `sigmoid` of all logits, or `topk_softmax`, the softmax of the chosen ones.
        normalise: divide the chosen weights by their sum.
        scale: factor on the weights.
        bias: added to the scores for the choice alone (DeepSeek-V3, arXiv 2412.19437), `(experts,)`.
        groups, top_groups: the choice is limited to the `top_groups` groups with the largest sum of two best scores.
    """

    activation: Activation
    top_k: int
    normalise: bool = False
    scale: float = 1.0
    bias: Tensor | None = None
    groups: int = 1
    top_groups: int = 1

    def scores(self, logits: Tensor) -> Tensor:
        """Scores `(..., experts)` in float32 before the choice; comparable between the experts of a token."""
        logits = logits.float()
        return logits.sigmoid() if self.activation == "sigmoid" else logits.softmax(-1)

    def route(self, logits: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts for logits `(..., experts)`: indices and float32 weights, both `(..., top_k)`.

        With `allowed`, a boolean mask that broadcasts to the logits, other experts count as absent. Where fewer
        than `top_k` are allowed, the surplus assignments repeat an allowed expert with weight 0.
        """
        logits = logits.float()
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        scores = self.scores(logits)
        choice = scores if self.activation != "topk_softmax" else logits
        if self.bias is not None:
            choice = choice + self.bias.to(choice)
        if allowed is not None:
            choice = choice.masked_fill(~allowed, float("-inf"))
        if self.groups > 1:
            choice = choice.masked_fill(~self._open_groups(choice), float("-inf"))
        values, indices = choice.topk(self.top_k, dim=-1)
        weights = values.softmax(-1) if self.activation == "topk_softmax" else scores.gather(-1, indices)
        if allowed is not None:
            absent = values == float("-inf")
            indices = torch.where(absent, indices[..., :1], indices)
            weights = weights.masked_fill(absent, 0.0)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return indices, weights * self.scale

    def _open_groups(self, choice: Tensor) -> Tensor:
        grouped = choice.unflatten(-1, (self.groups, -1))
        first, second = grouped.topk(2, dim=-1).values.unbind(-1)
        # An absent second adds nothing, so a group with one expert left can open, and one with none cannot be best.
        strength = first + second.masked_fill(second == float("-inf"), 0.0)
        best = strength.topk(self.top_groups, dim=-1).indices
        open_groups = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=choice.device).scatter(-1, best, True)
        return open_groups.unsqueeze(-1).expand_as(grouped).flatten(-2)

    def describe(self) -> str:
        """One phrase for people, e.g. `sigmoid, choice bias, 2 of 4 groups, normalised, scaled by 2.5`."""
        parts = [{"topk_softmax": "softmax of the top-k"}.get(self.activation, self.activation)]
        parts += ["choice bias"] if self.bias is not None else []
        parts += [f"{self.top_groups} of {self.groups} groups"] if self.groups > 1 else []
        parts += ["normalised"] if self.normalise else []
        parts += [f"scaled by {self.scale:g}"] if self.scale != 1.0 else []
        return ", ".join(parts)


@torch.no_grad()
def read_router(router: nn.Module, experts: int, hidden: int) -> tuple[ScoringRule, int, int]:
    """Run the router on random tokens and find the rule that gives its indices and weights from its logits."""
    weight: Tensor = router.weight  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(PROBE_TOKENS, hidden, generator=generator)
    # Large enough for logits to spread, whatever the scale the weights were initialised with.
    spread = weight.float().norm(dim=1).mean().clamp_min(1e-6).item()
    probe = (probe * (2.0 / spread)).to(weight)
    try:
        out = router(probe)
    except Exception as error:
        raise ModelError(
            f"has a router that cannot be called with hidden states alone ({type(error).__name__})"
        ) from None
    parts = [part for part in out if isinstance(part, Tensor)] if isinstance(out, tuple | list) else []
    indices = next((p for p in parts if not p.is_floating_point() and p.ndim == 2), None)
    floats = {i: p for i, p in enumerate(out) if isinstance(p, Tensor) and p.is_floating_point()} if parts else {}
    bias = getattr(router, "bias", None)
    logits = functional.linear(probe.float(), weight.float(), bias.float() if isinstance(bias, Tensor) else None)
    if indices is None or len(floats) < 2:
        raise ModelError("has a router that does not return logits, weights and indices")
    top_k = indices.shape[1]
    close = [i for i, p in floats.items() if p.shape == logits.shape and _close(p, logits)]
    if not close:
        raise ModelError("has a router that does not return its logits")
    weights = next((p for i, p in floats.items() if i != close[0] and p.shape == indices.shape), None)
    if weights is None:
        raise ModelError("has a router that does not return one weight per assignment")
    wanted = _dense(indices, weights, experts)
    for rule in _candidate_rules(router, top_k):
        given = _dense(*rule.route(floats[close[0]]), experts)
        agree = torch.isclose(given, wanted, rtol=2e-2, atol=1e-3).all(dim=-1).float().mean()
        if agree >= 1.0 - PROBE_MISSES:
            return rule, close[0], top_k
    raise ModelError(f"scores experts in an unknown way ({type(router).__name__}); no known rule gives its output")


def _close(given: Tensor, wanted: Tensor) -> bool:
    return bool(torch.isclose(given.float(), wanted, rtol=2e-2, atol=5e-2).float().mean() > 0.99)


def _dense(indices: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Weights by expert `(tokens, experts)`, so that the order of the assignments does not matter."""
    zeros = torch.zeros(indices.shape[0], experts, device=indices.device)
    return zeros.scatter_add(1, indices.long(), weights.float())


def _candidate_rules(router: nn.Module, top_k: int) -> Iterator[ScoringRule]:
    """The rules this router could follow, by the attributes it has."""
    bias = getattr(router, "e_score_correction_bias", None)
    groups = next((g for a in ("num_group", "n_group") if (g := getattr(router, a, None))), 1)
    scale = float(getattr(router, "routed_scaling_factor", 1.0) or 1.0)
    rest: dict[str, Any] = {
        "bias": bias.detach() if isinstance(bias, Tensor) else None,
        "groups": int(groups),
        "top_groups": int(getattr(router, "topk_group", None) or 1),
    }
    activations: tuple[Activation, ...] = ("softmax", "sigmoid", "topk_softmax")
    for factor in dict.fromkeys((scale, 1.0)):
        for activation, normalise in itertools.product(activations, (True, False)):
            yield ScoringRule(activation, top_k, normalise, factor, **rest)
