"""Scoring rules are the routers' own, also among allowed experts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    EXPERTS,
    FAMILIES,
    HIDDEN,
    by_expert,
    routing_of,
    tiny_deepseek,
    tiny_model,
)

from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.routing_rules import Activation, ScoringRule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*FAMILIES, "deepseek_v3 with all expert groups open"])
def test_rule_reproduces_the_router(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name) if name in FAMILIES else tiny_deepseek(open_groups=2)
    if dtype == torch.bfloat16:
        model.bfloat16()
    for layer in find_moe_layers(model):
        hidden = torch.randn(500, HIDDEN, generator=torch.Generator().manual_seed(42 + layer.index)).to(dtype)
        with torch.no_grad():
            output = layer.router(hidden)
        wanted = by_expert(*routing_of(output))
        found = by_expert(*layer.rule.route(layer.logits_of(output)))
        if dtype == torch.float32:
            torch.testing.assert_close(found, wanted)
        else:  # low precision has ties in the logits, which may fall either way
            agree = torch.isclose(found, wanted, rtol=1e-2, atol=1e-2).all(dim=1)
            assert agree.float().mean() > 0.97


def reference_route(rule: ScoringRule, logits: list[float], allowed: list[bool]) -> dict[int, float]:
    """Weight of each chosen expert, written without tensors; experts that are not allowed do not exist."""
    present = [e for e in range(len(logits)) if allowed[e]]
    if rule.activation == "sigmoid":
        score = {e: 1 / (1 + math.exp(-logits[e])) for e in present}
    elif rule.activation == "sqrt_softplus":
        score = {e: math.sqrt(math.log(1 + math.exp(logits[e]))) for e in present}
    else:
        total = sum(math.exp(logits[e]) for e in present)
        score = {e: math.exp(logits[e]) / total for e in present}
    by_logit = rule.activation in ("topk_softmax", "sparsemixer")
    choice = {e: logits[e] for e in present} if by_logit else dict(score)
    if rule.bias is not None:
        choice = {e: choice[e] + float(rule.bias[e]) for e in present}
    size = len(logits) // rule.expert_groups
    members = {g: [e for e in present if e // size == g] for g in range(rule.expert_groups)}
    strength = {
        g: sum(sorted((choice[e] for e in m), reverse=True)[: rule.strength_of]) for g, m in members.items() if m
    }
    opened = (
        sorted(strength, key=lambda g: -strength[g])[: rule.open_groups] if rule.expert_groups > 1 else list(strength)
    )
    chosen = sorted((e for g in opened for e in members[g]), key=lambda e: -choice[e])[: rule.top_k]
    if rule.activation == "topk_softmax":
        total = sum(math.exp(logits[e]) for e in chosen)
        score = {e: math.exp(logits[e]) / total for e in chosen}
    if rule.activation == "sparsemixer":
        for place, best in enumerate(chosen):
            left = [e for e in present if e not in chosen[:place]]
            gap = {e: (logits[best] - logits[e]) / max(abs(logits[e]), logits[best]) for e in left}
            total = sum(math.exp(logits[e]) for e in left if gap[e] <= 2 * rule.nearness)
            score[best] = math.exp(logits[best]) / total
    weights = {e: score[e] for e in chosen}
    if rule.normalise:
        weights = {e: w / sum(weights[f] for f in chosen) for e, w in weights.items()}
    own = [1.0] * len(logits) if rule.expert_scale is None else rule.expert_scale.tolist()
    return {e: w * own[e] * rule.scale for e, w in weights.items()}


@settings(max_examples=300, deadline=None)
@given(
    activation=st.sampled_from(["softmax", "sigmoid", "sqrt_softplus", "topk_softmax", "sparsemixer"]),
    normalise=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    biased=st.booleans(),
    expert_groups=st.sampled_from([(1, 1, 2), (2, 1, 2), (2, 2, 2), (4, 1, 2), (4, 2, 2), (2, 1, 1), (4, 2, 1)]),
    scaled=st.booleans(),
    nearness=st.sampled_from([0.01, 0.3]),
    top_k=st.integers(1, 4),
    allowed=st.lists(st.booleans(), min_size=EXPERTS, max_size=EXPERTS).filter(any),
    seed=st.integers(0, 2**31),
)
def test_route_among_allowed_equals_reference(
    activation: Activation,
    normalise: bool,
    scale: float,
    biased: bool,
    expert_groups: tuple[int, int, int],
    scaled: bool,
    nearness: float,
    top_k: int,
    allowed: list[bool],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(5, EXPERTS, generator=generator)
    bias = torch.randn(EXPERTS, generator=generator) if biased else None
    own = 0.5 + torch.rand(EXPERTS, generator=generator) if scaled else None
    if activation in ("topk_softmax", "sparsemixer"):
        bias = None
    if activation == "sparsemixer":
        expert_groups = (1, 1, 2)
    rule = ScoringRule(activation, top_k, normalise, scale, bias, *expert_groups, own, nearness)
    indices, weights = rule.route(logits, torch.tensor(allowed))
    assert indices.shape == weights.shape == (5, top_k)
    assert all(allowed[e] for e in indices.flatten().tolist()), "a forbidden expert would be loaded"
    for row in range(5):
        wanted = torch.zeros(EXPERTS)
        for expert, weight in reference_route(rule, logits[row].tolist(), allowed).items():
            wanted[expert] = weight
        torch.testing.assert_close(by_expert(indices[row : row + 1], weights[row : row + 1])[0], wanted)


def test_route_with_everything_allowed_changes_nothing() -> None:
    for layer in find_moe_layers(tiny_model("deepseek_v3")):
        logits = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(1))
        free, masked = layer.rule.route(logits), layer.rule.route(logits, torch.ones(EXPERTS, dtype=torch.bool))
        torch.testing.assert_close(by_expert(*masked), by_expert(*free))
