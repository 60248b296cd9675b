"""What every published rule keeps to."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rule_cases import (
    CHOSEN,
    LAYER,
    PLAIN,
    RULE,
    layer_of,
    random_routing,
    refusal,
    some_stats,
)
from tiny import EXPERTS, FAMILIES, decode, tiny_model, words
from torch._subclasses import FakeTensorMode

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.moe.decision import Decision, Policy, Routing, used_experts
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.routing_rules import ScoringRule
from lynx_learn.rules.expert_stats import ExpertStats
from lynx_learn.rules.keep_sets import GateMax, GateNorm, GateSquared, Layered, Lynx, Popularity, Random, Vote, XShare
from lynx_learn.rules.per_token import ACE, NAEE, Alloc, Contribution, MoDES, TopK
from lynx_learn.rules.substitutes import OEA, SERE, ExFold, SiftMoE


def side_by_side(*batches: Routing) -> Routing:
    return Routing(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


# What every rule keeps to.
ROUTERS = {
    "softmax": RULE,
    "not_normalised": PLAIN,
    "topk_softmax": CHOSEN,
    "grouped": ScoringRule(
        "sigmoid", 2, normalise=True, scale=2.5, bias=torch.linspace(-0.1, 0.1, EXPERTS), expert_groups=2, open_groups=1
    ),
}
RULES: dict[str, Callable[[ExpertStats], Policy]] = {
    "random": lambda stats: Random(4),
    "popularity": lambda stats: Popularity(4),
    "lynx": lambda stats: Lynx(4),
    "xshare": lambda stats: XShare(4),
    "gate_sum": lambda stats: XShare(4, warm_up=False),
    "vote": lambda stats: Vote(4, 3),
    "gate_sq": lambda stats: GateSquared(4),
    "gate_sq drop": lambda stats: GateSquared(4, "drop"),
    "gate_max": lambda stats: GateMax(4),
    "gate_max drop": lambda stats: GateMax(4, "drop"),
    "layered drop": lambda stats: Layered("layered", "gate_sq", 1.5, stats.squares),
    "layered reroute": lambda stats: Layered("layered", "gate_sum", 1.8, stats.norms, "reroute"),
    "top_k": lambda stats: TopK(1),
    "top_k unscaled": lambda stats: TopK(1, scaled=False),
    "naee": lambda stats: NAEE(0.95, stats),
    "contribution": lambda stats: Contribution(stats, 0.45),
    "contribution kept": lambda stats: Contribution(stats, kept=1.15),
    "ace": lambda stats: ACE(0.8, stats.norms, stats),
    "modes": lambda stats: MoDES(0.6, torch.tensor([0.5])),
    "alloc drop": lambda stats: Alloc((1,)),
    "oea": lambda stats: OEA(1),
    "sere": lambda stats: SERE(1, 0.3, stats),
    "siftmoe drop": lambda stats: SiftMoE(0.4, stats),
    "siftmoe drop by layer": lambda stats: SiftMoE(0.4, stats, torch.tensor([1.1])),
    "exfold": lambda stats: ExFold(GateNorm(4, stats), stats),
    "exfold layered": lambda stats: ExFold(Layered("layered", "gate_sq", 1.5, stats.squares), stats),
}


def same(left: Decision, right: Decision) -> bool:
    return torch.equal(left.indices, right.indices) and torch.allclose(left.weights, right.weights, atol=1e-6)


@pytest.fixture(params=RULES)
def rule_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("router", ROUTERS)
def test_decisions_are_usable_and_load_no_more(rule_name: str, router: str) -> None:
    layer, before, after = layer_of(ROUTERS[router], EXPERTS), 0, 0
    policy = RULES[rule_name](some_stats())
    policy.bind([layer])
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        routing = random_routing(layer, 20, 6, seed, dtype)
        decision = policy.decide(layer, routing)
        assert decision.indices.shape == decision.weights.shape == routing.indices.shape
        assert decision.indices.dtype == routing.indices.dtype
        assert decision.weights.dtype == dtype
        assert int(decision.indices.min()) >= 0
        assert int(decision.indices.max()) < EXPERTS
        assert torch.isfinite(decision.weights).all()
        folded = rule_name.startswith("exfold")  # whose scalars may be negative, and are here
        assert folded or (decision.weights >= 0).all()
        every = decision.weights.sum(-1)
        assert folded or (every > 0).all() or "drop" in rule_name
        before += int(used_experts(routing.indices, routing.active, EXPERTS).sum())
        after += int(used_experts(decision.indices, routing.active, EXPERTS).sum())
    assert after < 0.95 * before


@pytest.mark.parametrize("router", ROUTERS)
def test_tokens_that_are_not_active_do_not_vote(rule_name: str, router: str) -> None:
    layer = layer_of(ROUTERS[router], EXPERTS)
    alone = random_routing(layer, 30, 3, seed=1)
    others = random_routing(layer, 30, 6, seed=2)
    crowd = Routing(*(torch.cat(parts, 1) for parts in zip(alone, others, strict=True)))
    crowd = crowd._replace(active=torch.arange(9).expand(30, 9) < 3)
    policy = RULES[rule_name](some_stats())
    policy.bind([layer])
    wanted = policy.decide(layer, alone)
    policy.bind([layer])  # the random rule starts anew
    found = policy.decide(layer, crowd)
    assert same(Decision(found.indices[:, :3], found.weights[:, :3]), wanted)


def test_a_batch_without_active_tokens_is_decided_without_harm(rule_name: str) -> None:
    for router in ROUTERS.values():
        layer = layer_of(router, EXPERTS)
        routing = random_routing(layer, 2, 3, seed=3)
        policy = RULES[rule_name](some_stats())
        policy.bind([layer])
        decision = policy.decide(layer, routing._replace(active=torch.zeros(2, 3, dtype=torch.bool)))
        assert int(decision.indices.min()) >= 0
        assert int(decision.indices.max()) < EXPERTS
        assert torch.isfinite(decision.weights).all()


def test_batches_side_by_side_are_decided_apart(rule_name: str) -> None:
    layer = layer_of(RULE, EXPERTS)
    batches = [random_routing(layer, 1, 5, seed) for seed in range(8)]
    policy = RULES[rule_name](some_stats())
    policy.bind([layer])
    together = policy.decide(layer, side_by_side(*batches))
    if rule_name == "random":
        assert len({tuple(row.unique().tolist()) for row in together.indices}) > 1
        return
    for i, own in enumerate(batches):
        part = Decision(together.indices[i : i + 1], together.weights[i : i + 1])
        assert same(part, policy.decide(layer, own))


def test_nothing_waits_for_values(rule_name: str) -> None:
    """Tensors without values: reading one, or a shape that depends on one, raises."""
    layer = layer_of(RULE, EXPERTS)
    real = random_routing(layer, 1, 5, seed=0)
    policy = RULES[rule_name](some_stats())
    policy.bind([layer])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        decision = policy.decide(layer, Routing(*(mode.from_tensor(part) for part in real)))
    assert decision.indices.shape == real.indices.shape


def test_names_and_settings_tell_rules_apart() -> None:
    policies = [make(some_stats()) for make in RULES.values()]
    assert len({(p.name, p.setting) for p in policies}) == len(policies)
    assert {p.name for p in policies} == {key.split()[0] for key in RULES}
    assert all(p.own_bytes(LAYER, torch.ones(LAYER.num_experts), 2) == 0 for p in policies)


@pytest.mark.parametrize("name", FAMILIES)
def test_gentlest_settings_change_nothing(name: str) -> None:
    model = tiny_model(name)
    stats = some_stats(layers=len(find_moe_layers(model)))
    gentle = (
        XShare(EXPERTS),
        Lynx(EXPERTS),
        GateSquared(EXPERTS, "drop"),
        Layered("layered", "gate_sq", 0.0, stats.squares),
        TopK(2),
        NAEE(0.0, replace(stats, ratios=torch.zeros_like(stats.ratios))),
        Contribution(stats, 0.0),
        ACE(0.0, stats.norms, replace(stats, weights=torch.tensor([1.0, 0.0]).expand_as(stats.weights))),
        MoDES(0.0, torch.ones(stats.norms.shape[0])),
        Alloc((2,) * stats.norms.shape[0]),
        OEA(2),
        SERE(1, 1.1, stats),
        SiftMoE(0.0, stats),
        ExFold(GateNorm(EXPERTS, stats), stats),
    )
    untouched = decode(model, words(6, 10), prompt=4)[1]
    for policy in gentle:
        with skip_experts(model, policy):
            torch.testing.assert_close(decode(model, words(6, 10), prompt=4)[1], untouched, rtol=1e-4, atol=1e-4)


def test_statistics_of_another_model_are_refused() -> None:
    stats = some_stats(experts=6)
    for policy in (
        NAEE(0.5, stats),
        Contribution(stats, 0.5),
        SERE(1, 0.5, stats),
        SiftMoE(0.5, stats),
        ExFold(XShare(2), stats),
    ):
        assert "of 1 layers of 6 experts" in refusal(policy, LAYER)
