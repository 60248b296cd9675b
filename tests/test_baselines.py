"""The published rules against examples worked by hand, and what all of them must keep to."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EXPERTS, FAMILIES, decode, tiny_model, watching, words
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.errors import OptionError
from lynx_learn.moe.decision import Decision, Policy, Routing, silence, used_experts
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.moe.routing_rules import ScoringRule
from lynx_learn.rules.expert_stats import ExpertStats
from lynx_learn.rules.keep_sets import GateMax, GateSquared, KeepSet, Lynx, Popularity, Random, Vote, XShare
from lynx_learn.rules.per_token import NAEE, Contribution, TopK
from lynx_learn.rules.substitutes import OEA, SERE, SiftMoE

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


def side_by_side(*batches: Routing) -> Routing:
    return Routing(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


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
    distances: list[list[float]] | None = None,
    similarities: list[list[float]] | None = None,
    ratios: list[float] | None = None,
) -> ExpertStats:
    """Statistics of one layer of four experts, as far as a rule asks for them."""
    nothing = [[0.0] * 4] * 4
    return ExpertStats(
        torch.tensor([norms or [1.0] * 4]),
        torch.tensor([distances or nothing]),
        torch.tensor([similarities or nothing]),
        torch.tensor([ratios or [0.5]]),
    )


def decided(policy: Policy, routing: Routing, rule: ScoringRule = RULE) -> Decision:
    layer = layer_of(rule)
    policy.bind([layer])
    return policy.decide(layer, routing)


# Rules that keep a set.


def test_gate_sum_keeps_the_largest_sums_and_routes_again() -> None:
    # sums: 0.6+0.6, 0.4+0.4, 0.6, 0.4 -> experts 0 and 1
    decision = XShare(2, warm_up=False).decide(LAYER, routed(A, A, C))
    assert by_token(decision) == approximately({0: 0.6, 1: 0.4}, {0: 0.6, 1: 0.4}, {1: 2 / 3, 0: 1 / 3})


def test_xshare_keeps_every_first_expert_before_larger_sums() -> None:
    # experts 0 and 2 are somebody's first, so 2 comes before 1 in spite of 0.6 < 0.8
    decision = XShare(2).decide(LAYER, routed(A, A, C))
    first = {0: 0.48 / 0.63, 2: 0.15 / 0.63}
    assert by_token(decision) == approximately(first, first, {2: 0.42 / 0.52, 0: 0.10 / 0.52})
    # with three: 0 and 2, then 1 by its sum
    assert by_token(XShare(3).decide(LAYER, routed(A, A, C)))[2] == pytest.approx({2: 0.42 / 0.62, 1: 0.20 / 0.62})


def test_popularity_counts_assignments_whatever_their_weight() -> None:
    # expert 0 is the second of all three tokens, with hardly any weight; 2 the first of two of them, 1 of one
    routing = routed([0.08, 0.01, 0.90, 0.01], [0.08, 0.01, 0.90, 0.01], [0.08, 0.90, 0.01, 0.01])
    assert Popularity(2).scores(LAYER, routing).tolist() == [[3, 1, 2, 0]]
    assert experts_of(Popularity(2).decide(LAYER, routing)) == [0, 2]
    assert experts_of(XShare(2, warm_up=False).decide(LAYER, routing)) == [1, 2]


def test_lynx_votes_fall_with_the_distance_to_the_first_expert() -> None:
    # 2 × (logit - best): A 0, -0.8, -2.3, -4.5; C -2.9, -1.5, 0, -0.8; rounded down, and votes are 2^bin
    routing = routed(A, C)
    assert Lynx(2, alpha=2, beta=5).scores(LAYER, routing).tolist() == [
        [1 + 1 / 8, 1 / 2 + 1 / 4, 1 / 8 + 1, 1 / 32 + 1 / 2]
    ]
    assert Lynx(2, alpha=2, beta=2).scores(LAYER, routing).tolist() == [
        [1 + 1 / 4, 1 / 2 + 1 / 4, 1 / 4 + 1, 1 / 4 + 1 / 2]
    ]
    # a batch of three divides by three for each bin
    three = Lynx(2, alpha=2, beta=5).scores(LAYER, routed(A, A, C))
    assert three[0].tolist() == pytest.approx([2 + 1 / 27, 2 / 3 + 1 / 9, 2 / 27 + 1, 2 / 243 + 1 / 3])


def test_in_lynx_one_first_expert_outweighs_all_other_votes() -> None:
    # 15 tokens have expert 1 a hair below their first, one token has expert 2 as its first
    routing = routed(*[[0.34, 0.33, 0.01, 0.32]] * 15, [0.05, 0.05, 0.85, 0.05])
    scores = Lynx(2).scores(LAYER, routing)[0]
    assert scores[2] > scores[1] > scores[2] * 0.9
    assert experts_of(Lynx(2).decide(LAYER, routing)) == [0, 2]


def test_lynx_ranks_the_experts_of_a_batch_of_one() -> None:
    for token in (A, C):
        assert by_token(Lynx(2).decide(LAYER, routed(token))) == by_token(XShare(2).decide(LAYER, routed(token)))


def test_vote_adds_router_scores_of_each_tokens_best() -> None:
    assert Vote(2, 2).scores(LAYER, routed(A, C))[0].tolist() == pytest.approx([0.48, 0.32, 0.42, 0.28])
    assert Vote(2, 4).scores(LAYER, routed(A, C))[0].tolist() == pytest.approx([0.58, 0.52, 0.57, 0.33])
    assert Vote(2, 1).scores(LAYER, routed(A, C))[0].tolist() == pytest.approx([0.48, 0, 0.42, 0])
    assert experts_of(Vote(2, 2).decide(LAYER, routed(A, C))) == [0, 2]
    sigmoid = layer_of(ScoringRule("sigmoid", top_k=2, normalise=True))
    # the sigmoid of log p is p / (1 + p)
    assert Vote(2, 1).scores(sigmoid, routed(A, C))[0].tolist() == pytest.approx([0.48 / 1.48, 0, 0.42 / 1.42, 0])


def test_gate_squared_prefers_one_large_weight_to_two_small_ones() -> None:
    # sums 1.2, 0.8, 0.6, 0.4; of squares 0.72, 0.32, 0.36, 0.16
    assert GateSquared(2).scores(LAYER, routed(A, A, C))[0].tolist() == pytest.approx([0.72, 0.32, 0.36, 0.16])
    first = {0: 0.48 / 0.63, 2: 0.15 / 0.63}
    assert by_token(GateSquared(2).decide(LAYER, routed(A, A, C))) == approximately(
        first, first, {2: 0.42 / 0.52, 0: 0.10 / 0.52}
    )
    # with a third A: 1.08, 0.48, 0.36, 0.16
    assert experts_of(GateSquared(2).decide(LAYER, routed(A, A, A, C))) == [0, 1]


def test_gate_max_takes_the_largest_weight_of_any_token() -> None:
    assert GateMax(2).scores(LAYER, routed(A, A, A, C))[0].tolist() == pytest.approx([0.6, 0.4, 0.6, 0.4])
    assert experts_of(GateMax(2).decide(LAYER, routed(A, A, A, C))) == [0, 2]


def test_dropping_leaves_the_other_weights_as_they_are() -> None:
    decision = GateSquared(2, "drop").decide(LAYER, routed(A, A, C))
    assert by_token(decision) == approximately({0: 0.6}, {0: 0.6}, {2: 0.6})
    assert experts_of(decision) == [0, 2]
    # 0 and 1 stay: the last token loses both of its experts, and points at the best of those that stay
    alone = GateSquared(2, "drop").decide(LAYER, routed(A, A, A, C))
    assert by_token(alone) == approximately(*[{0: 0.6, 1: 0.4}] * 3, {})
    assert alone.indices[0, 3].tolist() == [0, 0]
    assert by_token(GateMax(2, "drop").decide(LAYER, routed(A, A, A, C))) == approximately(*[{0: 0.6}] * 3, {2: 0.6})


def test_random_is_seeded_keeps_m_and_reaches_every_expert() -> None:
    def draws(seed: int) -> list[tuple[int, ...]]:
        policy = Random(2, seed)
        policy.bind([LAYER])
        decisions = [policy.decide(LAYER, routed(A, A, C)) for _ in range(40)]
        assert all(d.weights.sum(-1) == pytest.approx(1.0) for d in decisions)
        return [tuple(sorted(d.indices.unique().tolist())) for d in decisions]

    first = draws(0)
    assert first == draws(0) != draws(1)
    assert {len(kept) for kept in first} == {2}
    assert len(set(first)) == 6, "not every pair of experts was drawn"


# Rules that leave out token by token.


def test_top_k_keeps_the_first_by_weight_as_the_model_would() -> None:
    assert by_token(decided(TopK(1), routed(A, C))) == approximately({0: 1.0}, {2: 1.0})
    assert by_token(decided(TopK(1), routed(A, rule=CHOSEN), CHOSEN)) == approximately({0: 1.0})
    assert by_token(decided(TopK(1), routed(A, rule=PLAIN), PLAIN)) == approximately({0: 0.48})
    assert by_token(decided(TopK(1, scaled=False), routed(A, C))) == approximately({0: 0.6}, {2: 0.6})
    assert by_token(decided(TopK(2), routed(A, C))) == approximately({0: 0.6, 1: 0.4}, {2: 0.6, 3: 0.4})


def test_first_is_by_weight_not_by_place() -> None:
    a = routed(A)
    turned = a._replace(indices=a.indices.flip(-1), weights=a.weights.flip(-1))
    assert turned.indices.tolist() == [[[1, 0]]]
    for policy in (TopK(1), OEA(1), NAEE(1.0, stats_of(ratios=[0.9])), Contribution(0.5, stats_of())):
        assert experts_of(decided(policy, turned)) == [0]


def test_what_a_token_leaves_out_points_at_its_own_expert() -> None:
    # so the batch loads nothing for it
    assert experts_of(decided(TopK(1), routed(A, C))) == [0, 2]
    assert decided(TopK(1), routed(A, C)).indices[0, 1].tolist() == [2, 2]


def test_naee_drops_the_second_expert_below_the_layers_quantile() -> None:
    unlike = [0.60, 0.30, 0.05, 0.05]  # ratio 0.5; that of A is 0.667
    stats = stats_of(ratios=[0.2, 0.4, 0.6, 0.8, 1.0])
    median = decided(NAEE(0.5, stats), routed(A, unlike))
    assert by_token(median) == approximately({0: 0.6, 1: 0.4}, {0: 1.0})
    assert experts_of(median) == [0, 1]
    # between two of the sample: 0.7 is halfway from 0.6 to 0.8
    assert by_token(decided(NAEE(0.625, stats), routed(A, unlike))) == approximately({0: 1.0}, {0: 1.0})
    assert by_token(decided(NAEE(0.0, stats), routed(unlike))) == approximately({0: 2 / 3, 1: 1 / 3})
    assert by_token(decided(NAEE(0.5, stats), routed(unlike, rule=PLAIN), PLAIN)) == approximately({0: 0.6})
    # a ratio that is beta itself is enough
    assert by_token(decided(NAEE(1.0, stats), routed([0.4, 0.4, 0.1, 0.1]))) == approximately({0: 0.5, 1: 0.5})


def test_contribution_counts_the_size_of_the_experts_output() -> None:
    stats = stats_of(norms=[1.0, 1.0, 3.0, 1.0])
    # A: 0.6 and 0.4 of 1; C: 0.6 × 3 and 0.4 of 2.2, so that its first brings 82%
    assert by_token(decided(Contribution(0.2, stats), routed(A, C))) == approximately({0: 0.6, 1: 0.4}, {2: 0.6})
    assert by_token(decided(Contribution(0.15, stats), routed(C))) == approximately({2: 0.6, 3: 0.4})
    assert by_token(decided(Contribution(0.45, stats), routed(A))) == approximately({0: 0.6})
    # 3 then 2 by weight, 0.6 × 1 and 0.4 × 3 by contribution: the second is the one that stays
    assert by_token(decided(Contribution(0.35, stats), routed([0.10, 0.20, 0.28, 0.42]))) == approximately({2: 0.4})
    # exactly the mass that is asked for is enough
    assert len(experts_of(decided(Contribution(0.5, stats_of()), routed([0.4, 0.4, 0.1, 0.1])))) == 1


def test_contribution_finds_its_way_back_to_the_place_of_each_expert() -> None:
    # weights 0.5, 0.3, 0.2 of experts 1, 2, 3, and contributions 0.5, 0.9, 0.8 of 2.2: the last two are enough
    rule = replace(RULE, top_k=3)
    stats = stats_of(norms=[1.0, 1.0, 3.0, 4.0])
    decision = decided(Contribution(0.25, stats), routed([0.0, 0.5, 0.3, 0.2], rule=rule), rule)
    assert by_token(decision) == approximately({2: 0.3, 3: 0.2})


# Rules that send assignments to what others load.


def test_oea_takes_the_best_of_what_others_load() -> None:
    # firsts are 0 and 2, so A takes 2 and C takes 0 as their second
    decision = decided(OEA(1), routed(A, A, C))
    first = {0: 0.48 / 0.63, 2: 0.15 / 0.63}
    assert by_token(decision) == approximately(first, first, {2: 0.42 / 0.52, 0: 0.10 / 0.52})
    # 1 is another token's first and comes before 2
    other = [0.10, 0.70, 0.15, 0.05]
    assert by_token(decided(OEA(1), routed(A, C, other)))[0] == pytest.approx({0: 0.6, 1: 0.4}, abs=1e-6)


def test_oea_keeps_original_scores_and_fewer_where_fewer_are_loaded() -> None:
    assert by_token(decided(OEA(1), routed(A, C, rule=PLAIN), PLAIN)) == approximately(
        {0: 0.48, 2: 0.15}, {2: 0.42, 0: 0.1}
    )
    assert by_token(decided(OEA(1), routed(A, rule=PLAIN), PLAIN)) == approximately({0: 0.48})
    scaled = replace(RULE, scale=2.5)
    assert by_token(decided(OEA(1), routed(A, rule=scaled), scaled)) == approximately({0: 2.5})
    assert experts_of(decided(OEA(1), routed(A))) == [0]


def test_sere_sends_to_the_most_similar_of_the_first() -> None:
    alike = [[1.0, 0.2, 0.0, 0.4], [0.2, 1.0, 0.7, 0.9], [0.0, 0.7, 1.0, 0.3], [0.4, 0.9, 0.3, 1.0]]
    stats = stats_of(similarities=alike)
    # 1 goes to 2 (0.7), not to 3 (0.9), which is nobody's first; 3 has 0.4 at best and stays
    assert by_token(decided(SERE(1, 0.5, stats), routed(A, C))) == approximately({0: 0.6, 2: 0.4}, {2: 0.6, 3: 0.4})
    assert by_token(decided(SERE(1, 0.4, stats), routed(A, C))) == approximately({0: 0.6, 2: 0.4}, {2: 0.6, 0: 0.4})
    assert experts_of(decided(SERE(1, 0.4, stats), routed(A, C))) == [0, 2]
    # nothing else is loaded: both assignments meet at one expert
    meeting = decided(SERE(1, 0.0, stats), routed(A))
    assert meeting.indices.tolist() == [[[0, 0]]]
    assert by_token(meeting) == approximately({0: 1.0})
    assert by_token(decided(SERE(2, 0.0, stats), routed(A, C))) == approximately({0: 0.6, 1: 0.4}, {2: 0.6, 3: 0.4})
    # what is somebody's first stays, even with a twin
    twins = stats_of(
        similarities=[[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    )
    assert by_token(decided(SERE(1, 0.5, twins), routed(A, C))) == approximately({0: 0.6, 1: 0.4}, {2: 0.6, 3: 0.4})


SIFT_DISTANCES = [[0.0, 0.5, 1.0, 2.0], [0.5, 0.0, 0.9, 0.1], [1.0, 0.9, 0.0, 0.8], [2.0, 0.1, 0.8, 0.0]]


def test_siftmoe_skips_what_an_expert_kept_before_stands_in_for() -> None:
    # Largest weights 0.6, 0.4, 0.65, 0.35. In the order 2, 0, 1, 3: 2 stays; 0 stays, as 0.6 × 1.0 > 0.25; 1 goes, as 0 is
    # at 0.4 × 0.5; 3 stays, as 2 is at 0.35 × 0.8: it is near 1, but that is gone. The nearest to 1 that stays is 3.
    last, stats = [0.10, 0.20, 0.455, 0.245], stats_of(distances=SIFT_DISTANCES)
    assert by_token(decided(SiftMoE(0.25, stats), routed(A, last))) == approximately(
        {0: 0.6, 3: 0.4}, {2: 0.65, 3: 0.35}
    )
    # at 0.5, 3 goes too
    wider = decided(SiftMoE(0.5, stats), routed(A, last))
    assert by_token(wider) == approximately({0: 1.0}, {2: 1.0})
    # bounds are shares of the layer's mean output norm
    double = stats_of(norms=[1.0, 3.0, 2.0, 2.0], distances=SIFT_DISTANCES)
    assert by_token(decided(SiftMoE(0.25, double), routed(A, last))) == by_token(wider)
    assert by_token(decided(SiftMoE(0.0, stats), routed(A, last))) == approximately(
        {0: 0.6, 1: 0.4}, {2: 0.65, 3: 0.35}
    )
    assert experts_of(decided(SiftMoE(9.0, stats), routed(A, last))) == [2]


def test_siftmoe_follows_a_chain_to_its_end() -> None:
    # 0, 1, 2, 3 by largest weight, each near the next alone: 1 goes to 0, so 2 stays, so 3 goes to 2
    chain = [[0.0, 0.1, 1.0, 1.0], [0.1, 0.0, 0.12, 1.0], [1.0, 0.12, 0.0, 0.1], [1.0, 1.0, 0.1, 0.0]]
    routing = routed([0.45, 0.40, 0.10, 0.05], [0.20, 0.20, 0.35, 0.25], rule=PLAIN)
    decision = decided(SiftMoE(0.2, stats_of(distances=chain)), routing, PLAIN)
    assert by_token(decision) == approximately({0: 0.85}, {2: 0.60})


@given(st.integers(0, 2**31), st.floats(0.02, 0.4), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_siftmoe_follows_its_order_one_expert_after_the_other(seed: int, threshold: float, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # on a line, so that neighbours of neighbours abound
    layer, points = layer_of(replace(RULE, top_k=3), 8), torch.rand(8, 1, generator=generator)
    distances = (points[:, None] - points[None]).norm(dim=-1)
    stats = ExpertStats(torch.ones(1, 8), distances[None], torch.zeros(1, 8, 8), torch.ones(1, 1))
    routing = random_routing(layer, 1, tokens, seed)
    policy = SiftMoE(threshold, stats)
    policy.bind([layer])
    decision = policy.decide(layer, routing)
    largest = torch.zeros(8)
    for e, w in zip(routing.indices.flatten().tolist(), routing.weights.flatten(), strict=True):
        largest[e] = max(largest[e], w)
    bounds = largest[:, None] * distances
    kept: list[int] = []
    for e in sorted(range(8), key=lambda e: -float(largest[e])):
        if largest[e] > 0 and all(bounds[e, j] >= threshold for j in kept):
            kept.append(e)
    nearest = [e if e in kept else min(kept, key=lambda j, e=e: float(distances[e, j])) for e in range(8)]  # type: ignore[misc]
    wanted = [nearest[e] for e in routing.indices.flatten().tolist()]
    assert decision.indices.flatten().tolist() == wanted
    assert torch.equal(decision.weights, routing.weights)


# What every rule keeps to.

ROUTERS = {
    "softmax": RULE,
    "not_normalised": PLAIN,
    "topk_softmax": CHOSEN,
    "grouped": ScoringRule(
        "sigmoid", 2, normalise=True, scale=2.5, bias=torch.linspace(-0.1, 0.1, EXPERTS), expert_groups=2, open_groups=1
    ),
}


def some_stats(experts: int = EXPERTS, layers: int = 1, seed: int = 0) -> ExpertStats:
    """Random statistics of a plausible kind."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(layers, experts, 4, generator=generator)
    distances = torch.cdist(points, points)
    ratios = torch.rand(layers, 101, generator=generator).sort(dim=1).values
    norms = 0.5 + torch.rand(layers, experts, generator=generator)
    return ExpertStats(norms, distances, 1 - distances / distances.amax((1, 2), keepdim=True), ratios)


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
    "top_k": lambda stats: TopK(1),
    "top_k unscaled": lambda stats: TopK(1, scaled=False),
    "naee": lambda stats: NAEE(0.95, stats),
    "contribution": lambda stats: Contribution(0.45, stats),
    "oea": lambda stats: OEA(1),
    "sere": lambda stats: SERE(1, 0.3, stats),
    "siftmoe": lambda stats: SiftMoE(0.4, stats),
}


def random_routing(
    layer: MoeLayer, batches: int, tokens: int, seed: int, dtype: torch.dtype = torch.float32
) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = (1.5 * torch.randn(batches, tokens, layer.num_experts, generator=generator)).to(dtype)
    indices, weights = layer.rule.route(logits)
    active = torch.ones(batches, tokens, dtype=torch.bool)
    return Routing(torch.zeros(batches, tokens, 2), logits, indices, weights.to(dtype), active)


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
        assert (decision.weights >= 0).all()
        every = decision.weights.sum(-1)
        assert (every > 0).all() or "drop" in rule_name
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
    assert all(p.surrogate_bytes(LAYER, 3.0, 2) == 0 for p in policies)


# On models.


@pytest.mark.parametrize(
    "make",
    [XShare, lambda m: XShare(m, warm_up=False), Random, lambda m: GateSquared(m, "drop")],
    ids=["xshare", "gate_sum", "random", "drop"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_no_more_than_m_experts_are_loaded(name: str, make: Callable[[int], KeepSet]) -> None:
    model = tiny_model(name)
    layers = find_moe_layers(model)
    for experts in (2, 3, 5):
        with skip_experts(model, make(experts)) as skipping, watching(layers) as watch:
            decode(model, words(6, 10), prompt=4)
        assert all(len(seen.loaded) <= experts for seen in watch.steps)
        assert max(skipping.stats.experts_after) <= experts
        assert sum(skipping.stats.experts_after) < sum(skipping.stats.experts_before)
        assert skipping.stats.bytes_ratio == pytest.approx(
            sum(skipping.stats.experts_after) / sum(skipping.stats.experts_before)
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_gentlest_settings_change_nothing(name: str) -> None:
    model = tiny_model(name)
    stats = some_stats(layers=len(find_moe_layers(model)))
    gentle = (
        XShare(EXPERTS),
        Lynx(EXPERTS),
        GateSquared(EXPERTS, "drop"),
        TopK(2),
        NAEE(0.0, replace(stats, ratios=torch.zeros_like(stats.ratios))),
        Contribution(0.0, stats),
        OEA(2),
        SERE(1, 1.1, stats),
        SiftMoE(0.0, stats),
    )
    untouched = decode(model, words(6, 10), prompt=4)[1]
    for policy in gentle:
        with skip_experts(model, policy):
            torch.testing.assert_close(decode(model, words(6, 10), prompt=4)[1], untouched, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_two_assignments_of_a_token_may_meet_at_one_expert(name: str, implementation: str) -> None:
    model = tiny_model(name)
    model.set_experts_implementation(implementation)
    layer = find_moe_layers(model)[0]
    hidden = torch.randn(5, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    indices = torch.tensor([[3, 3], [1, 3], [3, 3], [2, 2], [0, 5]])
    weights = torch.tensor([[0.2, 0.5], [0.3, 0.3], [0.4, 0.0], [1.0, 1.0], [0.5, 0.1]])
    with torch.no_grad():
        found = layer.experts(hidden, indices, weights)
    alone = torch.stack([layer.expert_output(e, hidden) for e in range(EXPERTS)], dim=1)
    wanted = (alone[torch.arange(5)[:, None], indices] * weights[..., None]).sum(1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# What is refused.


def refusal(policy: Policy, layer: MoeLayer) -> str:
    with pytest.raises(OptionError) as error:
        policy.bind([layer])
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("experts", [0, 1, 9])
def test_impossible_numbers_of_experts_are_refused(experts: int) -> None:
    with pytest.raises(OptionError, match=r"allows 2 to 8"):
        skip_experts(tiny_model("mixtral"), XShare(experts))


@pytest.mark.parametrize("count", [0, 3])
def test_impossible_numbers_of_experts_per_token_are_refused(count: int) -> None:
    for policy in (TopK(count), OEA(count), SERE(count, 0.5, stats_of())):
        assert refusal(policy, LAYER).startswith(f"{policy.name} takes the first {count} experts")


@pytest.mark.parametrize("voted", [0, 5])
def test_votes_for_more_experts_than_there_are_are_refused(voted: int) -> None:
    assert refusal(Vote(1, 2), LAYER).startswith("vote keeps 1 experts")
    assert refusal(Vote(2, voted), LAYER) == f"vote counts {voted} experts of each token, layer mlp allows 1 to 4"


def test_naee_is_for_two_experts_per_token() -> None:
    text = refusal(NAEE(0.5, stats_of()), layer_of(replace(RULE, top_k=3)))
    assert text.startswith("naee skips the second of two experts")
    assert "gives each token 3" in text


def test_statistics_of_another_model_are_refused() -> None:
    stats = some_stats(experts=6)
    for policy in (NAEE(0.5, stats), Contribution(0.5, stats), SERE(1, 0.5, stats), SiftMoE(0.5, stats)):
        assert "of 1 layers of 6 experts" in refusal(policy, LAYER)


def test_silenced_tokens_point_at_a_loaded_expert_with_weight_zero() -> None:
    indices = torch.tensor([[[3, 1], [0, 2], [3, 2]]])
    active = torch.tensor([[True, False, True]])
    weights, addition = torch.full((1, 3, 2), 0.5), torch.ones(1, 3, 4)
    quiet = silence(Decision(indices, weights, addition, torch.ones_like(indices, dtype=torch.bool)), active, 5)
    loaded: Tensor = used_experts(quiet.indices, torch.ones_like(active), 5)
    assert loaded.tolist() == used_experts(indices, active, 5).tolist() == [[False, True, True, True, False]]
    assert quiet.weights[0].tolist() == [[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]]
    assert quiet.addition is not None
    assert quiet.addition[0, :, 0].tolist() == [1, 0, 1]
    assert quiet.answered is not None
    assert quiet.answered[0, :, 0].tolist() == [True, False, True]
    assert quiet.indices[0, [0, 2]].tolist() == indices[0, [0, 2]].tolist()
