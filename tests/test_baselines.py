"""The published rules against examples worked by hand."""

from collections.abc import Callable

import pytest
import torch
from tiny import EXPERTS, FAMILIES, decode, tiny_model, watching, words
from torch import Tensor, nn

from lynx_learn.baselines import KeepSet, Random, XShare
from lynx_learn.families import MoeLayer, ScoringRule, find_moe_layers
from lynx_learn.policies import Decision, Groups, silence, used_experts
from lynx_learn.runtime import skip_experts

RULE = ScoringRule("softmax", top_k=2, normalise=True)
LAYER = MoeLayer(0, "mlp", nn.Identity(), nn.Linear(2, 4), nn.Identity(), 4, 2, 2, RULE, 0)
# Router probabilities of three tokens for four experts. Two choose 0 then 1 (0.6 and 0.4), one chooses 2 then 3.
A, C = [0.48, 0.32, 0.15, 0.05], [0.10, 0.20, 0.42, 0.28]


def group(*probabilities: list[float], active: list[bool] | None = None) -> Groups:
    logits = torch.tensor(probabilities).log().unsqueeze(0)
    indices, weights = RULE.route(logits)
    tokens = len(probabilities)
    running = torch.tensor([active or [True] * tokens])
    return Groups(torch.zeros(1, tokens, 2), logits, indices, weights, running)


def by_token(decision: Decision) -> list[dict[int, float]]:
    """Weight of each expert, token by token, without those of weight 0."""
    rows = zip(decision.indices[0].tolist(), decision.weights[0].tolist(), strict=True)
    return [{e: w for e, w in zip(*row, strict=True) if w > 0} for row in rows]


def approximately(*tokens: dict[int, float]) -> list[object]:
    return [pytest.approx(token, abs=1e-6) for token in tokens]


def test_gate_sum_keeps_the_largest_sums_and_routes_again() -> None:
    # sums: 0.6+0.6, 0.4+0.4, 0.6, 0.4 -> experts 0 and 1
    decision = XShare(2, warm_up=False).decide(LAYER, group(A, A, C))
    assert by_token(decision) == approximately({0: 0.6, 1: 0.4}, {0: 0.6, 1: 0.4}, {1: 2 / 3, 0: 1 / 3})


def test_xshare_keeps_every_first_expert_before_larger_sums() -> None:
    # experts 0 and 2 are somebody's first, so 2 comes before 1 in spite of 0.6 < 0.8
    decision = XShare(2).decide(LAYER, group(A, A, C))
    first = {0: 0.48 / 0.63, 2: 0.15 / 0.63}
    assert by_token(decision) == approximately(first, first, {2: 0.42 / 0.52, 0: 0.10 / 0.52})
    # with three: 0 and 2, then 1 by its sum
    assert by_token(XShare(3).decide(LAYER, group(A, A, C)))[2] == pytest.approx({2: 0.42 / 0.62, 1: 0.20 / 0.62})


@pytest.mark.parametrize("policy", [XShare(2), XShare(2, warm_up=False)], ids=lambda p: p.name)
def test_tokens_that_are_not_active_do_not_vote(policy: KeepSet) -> None:
    alone = policy.decide(LAYER, group(A))
    crowd = policy.decide(LAYER, group(A, C, C, C, active=[True, False, False, False]))
    assert by_token(crowd)[0] == by_token(alone)[0] == pytest.approx({0: 0.6, 1: 0.4}, abs=1e-6)


def test_batches_side_by_side_are_decided_apart() -> None:
    both = Groups(*(torch.cat(parts) for parts in zip(group(A, A), group(C, C), strict=True)))
    decision = XShare(2).decide(LAYER, both)
    assert decision.indices[0].unique().tolist() == [0, 1]
    assert decision.indices[1].unique().tolist() == [2, 3]


def test_random_is_seeded_keeps_m_and_reaches_every_expert() -> None:
    def draws(seed: int) -> list[tuple[int, ...]]:
        policy = Random(2, seed)
        policy.bind([LAYER])
        decisions = [policy.decide(LAYER, group(A, A, C)) for _ in range(40)]
        assert all(d.weights.sum(-1) == pytest.approx(1.0) for d in decisions)
        return [tuple(sorted(d.indices.unique().tolist())) for d in decisions]

    first = draws(0)
    assert first == draws(0) != draws(1)
    assert {len(kept) for kept in first} == {2}
    assert len(set(first)) == 6, "not every pair of experts was drawn"


@pytest.mark.parametrize(
    "make", [XShare, lambda m: XShare(m, warm_up=False), Random], ids=["xshare", "gate_sum", "random"]
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
def test_keeping_all_experts_changes_nothing(name: str) -> None:
    model = tiny_model(name)
    untouched = decode(model, words(6, 10), prompt=4)[1]
    with skip_experts(model, XShare(EXPERTS)):
        torch.testing.assert_close(decode(model, words(6, 10), prompt=4)[1], untouched, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("experts", [0, 1, 9])
def test_impossible_numbers_of_experts_are_refused(experts: int) -> None:
    with pytest.raises(ValueError, match=r"allows 2 to 8"):
        skip_experts(tiny_model("mixtral"), XShare(experts))


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
