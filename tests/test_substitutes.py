"""Rules that send a token to another expert, against examples worked by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import (
    PLAIN,
    RULE,
    A,
    C,
    approximately,
    by_token,
    decided,
    experts_of,
    layer_of,
    random_routing,
    routed,
    some_stats,
    stats_of,
)
from tiny import EXPERTS, FAMILIES, tiny_model

from lynx_learn.moe.families import find_moe_layers
from lynx_learn.rules.keep_sets import GateNorm, Layered
from lynx_learn.rules.substitutes import OEA, SERE, ExFold, SiftMoE

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


FAR = [99.0] * 4
SIFT_DISTANCES = [[0.0, 0.5, 1.0, 2.0], [0.5, 0.0, 0.9, 0.1], [1.0, 0.9, 0.0, 0.8], [2.0, 0.1, 0.8, 0.0]]


def test_siftmoe_skips_what_an_expert_kept_before_stands_in_for() -> None:
    # Largest weights 0.6, 0.4, 0.65, 0.35. In the order 2, 0, 1, 3: 2 stays; 0 stays, as 0.6 × 1.0 > 0.25; 1 goes, as 0 is
    # at 0.4 × 0.5; 3 stays, as 2 is at 0.35 × 0.8: it is near 1, but that is gone. The nearest to 1 that stays is 3.
    last, stats = [0.10, 0.20, 0.455, 0.245], stats_of(lengths=FAR, distances=SIFT_DISTANCES)
    assert by_token(decided(SiftMoE(0.25, stats), routed(A, last))) == approximately(
        {0: 0.6, 3: 0.4}, {2: 0.65, 3: 0.35}
    )
    # at 0.5, 3 goes too
    wider = decided(SiftMoE(0.5, stats), routed(A, last))
    assert by_token(wider) == approximately({0: 1.0}, {2: 1.0})
    # bounds are shares of the layer's mean output norm
    double = stats_of(norms=[1.0, 3.0, 2.0, 2.0], lengths=FAR, distances=SIFT_DISTANCES)
    assert by_token(decided(SiftMoE(0.25, double), routed(A, last))) == by_token(wider)
    assert by_token(decided(SiftMoE(0.0, stats), routed(A, last))) == approximately(
        {0: 0.6, 1: 0.4}, {2: 0.65, 3: 0.35}
    )
    assert experts_of(decided(SiftMoE(9.0, stats), routed(A, last))) == [2]


def test_siftmoe_follows_a_chain_to_its_end() -> None:
    # 0, 1, 2, 3 by largest weight, each near the next alone: 1 goes to 0, so 2 stays, so 3 goes to 2
    chain = [[0.0, 0.1, 1.0, 1.0], [0.1, 0.0, 0.12, 1.0], [1.0, 0.12, 0.0, 0.1], [1.0, 1.0, 0.1, 0.0]]
    routing = routed([0.45, 0.40, 0.10, 0.05], [0.20, 0.20, 0.35, 0.25], rule=PLAIN)
    decision = decided(SiftMoE(0.2, stats_of(lengths=FAR, distances=chain)), routing, PLAIN)
    assert by_token(decision) == approximately({0: 0.85}, {2: 0.60})


def test_siftmoe_drops_where_nothing_is_nearer_than_any_kept_expert() -> None:
    last = [0.10, 0.20, 0.455, 0.245]
    # As before 2 and 0 stay at .25, and 3, as its .35 × .8 is too much; nothing is at .08 of 1, nearer than 3.
    near = stats_of(lengths=[0.9, 0.08, 0.1, 0.81], distances=SIFT_DISTANCES)
    assert by_token(decided(SiftMoE(0.25, near), routed(A, last))) == approximately({0: 0.6}, {2: 0.65, 3: 0.35})
    # at .5, 3 goes to 2; at .55 also 0 goes, to nothing: .9 is nearer than 1.0. 2 is the first and stays, near nothing
    assert by_token(decided(SiftMoE(0.5, near), routed(A, last))) == approximately({0: 0.6}, {2: 1.0})
    assert by_token(decided(SiftMoE(0.55, near), routed(A, last))) == approximately({}, {2: 1.0})
    # 3 would go to 1, at .1, but that is dropped: 2 at .8 and nothing at .7 are left
    far = stats_of(lengths=[9.0, 0.05, 9.0, 0.7], distances=SIFT_DISTANCES)
    assert by_token(decided(SiftMoE(0.26, far), routed(A, last))) == approximately({0: 0.6}, {2: 0.65})


def test_siftmoe_bounds_by_layer_are_those_of_its_sensitivity() -> None:
    stats = stats_of(norms=[7.0] * 4, lengths=FAR, distances=SIFT_DISTANCES)
    wanted = decided(SiftMoE(0.25, replace(stats, norms=torch.ones(1, 4))), routed(A, C))
    doubled = SiftMoE(0.5, stats, torch.tensor([2.0]))
    assert by_token(decided(doubled, routed(A, C))) == by_token(wanted)
    assert by_token(decided(SiftMoE(0.5, stats, torch.tensor([1.0])), routed(A, C))) != by_token(wanted)


# i -> j: 1 is best replaced by 3, then by 2; 3 by 0, then by 2.
SCALARS = [[1.0, 9.0, 9.0, 9.0], [0.5, 1.0, -0.25, 2.0], [9.0, 9.0, 1.0, 9.0], [3.0, 0.1, 0.5, 1.0]]
LOSSES = [[0.0, 1.0, 1.0, 1.0], [0.9, 0.0, 0.8, 0.3], [1.0, 1.0, 0.0, 1.0], [0.2, 0.9, 0.6, 0.0]]


def test_exfold_scales_the_kept_expert_that_leaves_least() -> None:
    stats = stats_of(scalars=SCALARS, losses=LOSSES)
    # sums of weights 0.6, 0.4, 0.6, 0.4, the norms equal: 0 and 2 stay
    decision = decided(ExFold(GateNorm(2, stats), stats), routed(A, C))
    assert decision.indices.tolist() == [[[0, 2], [2, 0]]]
    assert decision.weights[0].tolist() == [pytest.approx([0.6, 0.4 * -0.25]), pytest.approx([0.6, 0.4 * 3.0])]
    # with three, 3 stays by its norm, and 1 is best replaced by it
    loud = replace(stats, norms=torch.tensor([[1.0, 1.0, 1.0, 1.2]]))
    decision = decided(ExFold(GateNorm(3, loud), loud), routed(A, C))
    assert decision.indices.tolist() == [[[0, 3], [2, 3]]]
    assert decision.weights[0, 0].tolist() == pytest.approx([0.6, 0.4 * 2.0])


def test_exfold_uses_no_expert_that_the_batch_does_not_load_and_drops_what_it_never_saw() -> None:
    stats = stats_of(scalars=SCALARS, losses=LOSSES)
    pool = Layered("layered", "gate_sq", 0.2, torch.ones(1, 4))
    # 1 is dropped (0.16), and 3, which would be best for it, is nobody's: 0 stands in
    assert decided(ExFold(pool, stats), routed(A)).indices.tolist() == [[[0, 0]]]
    assert by_token(decided(ExFold(pool, stats), routed(A))) == approximately({0: 0.6 + 0.4 * 0.5})
    # no pair seen: the scalar is 0
    unseen = stats_of(scalars=[[float(i == j) for j in range(4)] for i in range(4)], losses=[[1e30] * 4] * 4)
    assert by_token(decided(ExFold(pool, unseen), routed(A))) == approximately({0: 0.6})
    assert ExFold(pool, stats).setting == pool.setting


@given(st.integers(0, 2**31), st.floats(0.02, 0.4), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_siftmoe_follows_its_order_one_expert_after_the_other(seed: int, threshold: float, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # on a line, so that neighbours of neighbours abound
    layer, points = layer_of(replace(RULE, top_k=3), 8), torch.rand(8, 1, generator=generator)
    distances = (points[:, None] - points[None]).norm(dim=-1)
    stats = replace(some_stats(8), norms=torch.ones(1, 8), lengths=torch.full((1, 8), 99.0), distances=distances[None])
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
