"""Batches that can be worked by hand, what a rule decides for them, and statistics that rules ask for."""

import pytest
import torch
from tiny import EXPERTS
from torch import nn

from lynx_learn.errors import OptionError
from lynx_learn.moe.decision import Decision, Policy, Routing
from lynx_learn.moe.families import MoeLayer
from lynx_learn.moe.routing_rules import ScoringRule
from lynx_learn.rules.expert_stats import ExpertStats

RULE = ScoringRule("softmax", top_k=2, normalise=True)
# The same without normalisation, and with weights that are a softmax of the chosen logits.
PLAIN, CHOSEN = ScoringRule("softmax", top_k=2), ScoringRule("topk_softmax", top_k=2)
# Router probabilities of three tokens for four experts. Two choose 0 then 1 (0.6 and 0.4), one chooses 2 then 3.
A, C = [0.48, 0.32, 0.15, 0.05], [0.10, 0.20, 0.42, 0.28]


def layer_of(rule: ScoringRule, experts: int = 4) -> MoeLayer:
    router = nn.Linear(2, experts)
    return MoeLayer(0, "mlp", nn.Identity(), router, nn.Identity(), experts, rule.top_k, 2, rule, 0)


LAYER = layer_of(RULE)


def routed(*probabilities: list[float], active: list[bool] | None = None, rule: ScoringRule = RULE) -> Routing:
    logits = torch.tensor(probabilities).log().unsqueeze(0)
    indices, weights = rule.route(logits)
    tokens = len(probabilities)
    running = torch.tensor([active or [True] * tokens])
    return Routing(torch.zeros(1, tokens, 2), logits, indices, weights, running)


def by_token(decision: Decision) -> list[dict[int, float]]:
    """Weight of each expert, token by token, without those of weight 0."""
    found = []
    for experts, weights in zip(decision.indices[0].tolist(), decision.weights[0].tolist(), strict=True):
        token: dict[int, float] = {}
        for e, w in zip(experts, weights, strict=True):
            token[e] = token.get(e, 0.0) + w
        found.append({e: w for e, w in token.items() if w > 0})
    return found


def approximately(*tokens: dict[int, float]) -> list[object]:
    return [pytest.approx(token, abs=1e-6) for token in tokens]


def experts_of(decision: Decision) -> list[int]:
    return sorted(decision.indices.unique().tolist())


def stats_of(
    norms: list[float] | None = None,
    squares: list[float] | None = None,
    lengths: list[float] | None = None,
    distances: list[list[float]] | None = None,
    similarities: list[list[float]] | None = None,
    scalars: list[list[float]] | None = None,
    losses: list[list[float]] | None = None,
    ratios: list[float] | None = None,
    sample: Routing | None = None,
) -> ExpertStats:
    """Statistics of one layer of four experts, as far as a rule asks for them."""
    nothing = [[0.0] * 4] * 4
    return ExpertStats(
        torch.tensor([norms or [1.0] * 4]),
        torch.tensor([squares or [1.0] * 4]),
        torch.tensor([lengths or [1.0] * 4]),
        torch.tensor([distances or nothing]),
        torch.tensor([similarities or nothing]),
        torch.tensor([ratios or [0.5]]),
        torch.zeros(1, 1, 2, dtype=torch.int64) if sample is None else sample.indices,
        torch.ones(1, 1, 2) if sample is None else sample.weights,
        torch.zeros(1, 1, 2),
        torch.zeros(1, 1, 4),
        torch.tensor([scalars or nothing]),
        torch.tensor([losses or nothing]),
    )


def decided(policy: Policy, routing: Routing, rule: ScoringRule = RULE) -> Decision:
    layer = layer_of(rule)
    policy.bind([layer])
    return policy.decide(layer, routing)


def some_stats(experts: int = EXPERTS, layers: int = 1, seed: int = 0, top_k: int = 2) -> ExpertStats:
    """Random statistics of a plausible kind."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(layers, experts, 4, generator=generator)
    distances = torch.cdist(points, points)
    ratios = torch.rand(layers, 101, generator=generator).sort(dim=1).values
    norms = 0.5 + torch.rand(layers, experts, generator=generator)
    squares = norms.square() * (1 + 0.2 * torch.rand(layers, experts, generator=generator))
    similarities = 1 - distances / distances.amax((1, 2), keepdim=True)
    logits = 1.5 * torch.randn(layers, 200, experts, generator=generator)
    weights, indices = logits.softmax(-1).topk(top_k, dim=-1)
    hidden = torch.randn(layers, 200, 2, generator=generator)
    lengths = 0.2 + torch.rand(layers, experts, generator=generator)
    scalars = torch.randn(layers, experts, experts, generator=generator)
    return ExpertStats(
        norms, squares, lengths, distances, similarities, ratios, indices, weights, hidden, logits, scalars, distances
    )


# What is refused.


def refusal(policy: Policy, layer: MoeLayer) -> str:
    with pytest.raises(OptionError) as error:
        policy.bind([layer])
    text = str(error.value)
    assert "\n" not in text
    return text


def random_routing(
    layer: MoeLayer, batches: int, tokens: int, seed: int, dtype: torch.dtype = torch.float32
) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = (1.5 * torch.randn(batches, tokens, layer.num_experts, generator=generator)).to(dtype)
    indices, weights = layer.rule.route(logits)
    active = torch.ones(batches, tokens, dtype=torch.bool)
    return Routing(torch.zeros(batches, tokens, 2), logits, indices, weights.to(dtype), active)
