"""Rules that keep a set of experts, against examples worked by hand."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rule_cases import (
    LAYER,
    A,
    C,
    approximately,
    by_token,
    decided,
    experts_of,
    layer_of,
    refusal,
    routed,
)
from tiny import FAMILIES, decode, tiny_model, watching, words

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.errors import OptionError
from lynx_learn.moe.decision import Decision, Routing
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.routing_rules import ScoringRule
from lynx_learn.rules.keep_sets import GateMax, GateSquared, KeepSet, Layered, Lynx, Popularity, Random, Vote, XShare
from lynx_learn.rules.rule import Then

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


def layered(routing: Routing, score: str, threshold: float, factors: list[float], then: Then = "drop") -> Decision:
    return decided(Layered("layered", score, threshold, torch.tensor([factors]), then), routing)


def test_layered_drops_what_costs_less_than_the_threshold() -> None:
    # sums of squares 0.72, 0.32, 0.36, 0.16, times the experts' factors: 0.72, 0.64, 0.18, 0.48
    routing, factors = routed(A, A, C), [1.0, 2.0, 0.5, 3.0]
    assert by_token(layered(routing, "gate_sq", 0.5, factors)) == approximately(*[{0: 0.6, 1: 0.4}] * 2, {})
    assert by_token(layered(routing, "gate_sq", 0.47, factors)) == approximately(*[{0: 0.6, 1: 0.4}] * 2, {3: 0.4})
    assert by_token(layered(routing, "gate_sq", 0.17, factors)) == by_token(layered(routing, "gate_sq", 0.0, factors))
    # sums of weights 1.2, 0.8, 0.6, 0.4, and largest ones 0.6, 0.4, 0.6, 0.4, with the same factors
    assert by_token(layered(routing, "gate_sum", 1.19, factors)) == approximately(*[{0: 0.6, 1: 0.4}] * 2, {3: 0.4})
    assert by_token(layered(routing, "gate_max", 0.9, factors)) == approximately({}, {}, {3: 0.4})


def test_layered_keeps_the_dearest_expert_whatever_the_threshold() -> None:
    factors = [1.0, 2.0, 0.5, 3.0]
    assert by_token(layered(routed(A, A, C), "gate_sq", 9.0, factors)) == approximately({0: 0.6}, {0: 0.6}, {})
    again = layered(routed(A, A, C), "gate_sq", 0.5, factors, "reroute")
    assert by_token(again)[2] == pytest.approx({1: 0.20 / 0.30, 0: 0.10 / 0.30})
    # fewer are kept than a token has: it takes those
    assert by_token(layered(routed(A, A, C), "gate_sq", 9.0, factors, "reroute")) == approximately(*[{0: 1.0}] * 3)


def test_layers_have_factors_of_their_own() -> None:
    policy = Layered("layered", "gate_sq", 0.5, torch.tensor([[1.0] * 4, [2.0] * 4]))
    layers = [LAYER, replace(LAYER, index=1)]
    policy.bind(layers)
    assert [experts_of(policy.decide(layer, routed(A, A, C))) for layer in layers] == [[0], [0, 1, 2]]
    assert "for 2 layers of 4 experts" in refusal(policy, LAYER)


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


@pytest.mark.parametrize("experts", [0, 1, 9])
def test_impossible_numbers_of_experts_are_refused(experts: int) -> None:
    with pytest.raises(OptionError, match=r"allows 2 to 8"):
        skip_experts(tiny_model("mixtral"), XShare(experts))


@pytest.mark.parametrize("voted", [0, 5])
def test_votes_for_more_experts_than_there_are_are_refused(voted: int) -> None:
    assert refusal(Vote(1, 2), LAYER).startswith("vote keeps 1 experts")
    assert refusal(Vote(2, voted), LAYER) == f"vote counts {voted} experts of each token, layer mlp allows 1 to 4"
