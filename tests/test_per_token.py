"""Rules that leave out some of a token's own experts, against examples worked by hand."""

import itertools
from dataclasses import replace

import pytest
import torch
from rule_cases import (
    CHOSEN,
    LAYER,
    PLAIN,
    RULE,
    A,
    C,
    approximately,
    by_token,
    decided,
    experts_of,
    layer_of,
    refusal,
    routed,
    stats_of,
)
from tiny import EXPERTS, HIDDEN, tiny_model

from lynx_learn.moe.families import find_moe_layers
from lynx_learn.rules.per_token import (
    ACE,
    NAEE,
    Alloc,
    Contribution,
    MoDES,
    TopK,
    allocate,
    expert_gains,
    layer_losses,
    spectral_norms,
    without_layers,
)
from lynx_learn.rules.substitutes import OEA, SERE

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
    for policy in (TopK(1), OEA(1), NAEE(1.0, stats_of(ratios=[0.9])), Contribution(stats_of(), 0.5)):
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
    assert by_token(decided(Contribution(stats, 0.2), routed(A, C))) == approximately({0: 0.6, 1: 0.4}, {2: 0.6})
    assert by_token(decided(Contribution(stats, 0.15), routed(C))) == approximately({2: 0.6, 3: 0.4})
    assert by_token(decided(Contribution(stats, 0.45), routed(A))) == approximately({0: 0.6})
    # 3 then 2 by weight, 0.6 × 1 and 0.4 × 3 by contribution: the second is the one that stays
    assert by_token(decided(Contribution(stats, 0.35), routed([0.10, 0.20, 0.28, 0.42]))) == approximately({2: 0.4})
    # exactly the mass that is asked for is enough
    assert len(experts_of(decided(Contribution(stats_of(), 0.5), routed([0.4, 0.4, 0.1, 0.1])))) == 1


def test_contribution_finds_its_way_back_to_the_place_of_each_expert() -> None:
    # weights 0.5, 0.3, 0.2 of experts 1, 2, 3, and contributions 0.5, 0.9, 0.8 of 2.2: the last two are enough
    rule = replace(RULE, top_k=3)
    stats = stats_of(norms=[1.0, 1.0, 3.0, 4.0])
    decision = decided(Contribution(stats, 0.25), routed([0.0, 0.5, 0.3, 0.2], rule=rule), rule)
    assert by_token(decision) == approximately({2: 0.3, 3: 0.2})


@pytest.mark.parametrize("count", [0, 3])
def test_impossible_numbers_of_experts_per_token_are_refused(count: int) -> None:
    for policy in (TopK(count), OEA(count), SERE(count, 0.5, stats_of())):
        assert refusal(policy, LAYER).startswith(f"{policy.name} takes the first {count} experts")


def test_naee_is_for_two_experts_per_token() -> None:
    text = refusal(NAEE(0.5, stats_of()), layer_of(replace(RULE, top_k=3)))
    assert text.startswith("naee skips the second of two experts")
    assert "gives each token 3" in text


def test_contribution_finds_each_layers_tau_for_a_number_of_experts() -> None:
    # of the sample's shares of the second expert, .5, .4, .3, .2, the two smallest go
    sample = routed([0.4, 0.4, 0.1, 0.1], A, [0.56, 0.24, 0.1, 0.1], [0.72, 0.18, 0.05, 0.05])
    policy = Contribution(stats_of(sample=sample), kept=1.5)
    decision = decided(policy, routed([0.62, 0.22, 0.1, 0.06], A))
    assert policy.taus[0] == pytest.approx(0.3, abs=1e-6)
    assert by_token(decision)[0] == pytest.approx({0: 0.62 / 0.84})
    assert by_token(decision)[1] == pytest.approx({0: 0.6, 1: 0.4})
    # what experts put out counts as well: with the first expert's outputs nine times as large, every second one is small
    louder = Contribution(stats_of(norms=[9.0, 1.0, 1.0, 1.0], sample=sample), kept=1.5)
    assert by_token(decided(louder, routed(C))) == approximately({2: 0.6, 3: 0.4})
    assert louder.taus[0] == pytest.approx((0.3 / (0.7 * 9 + 0.3)), abs=1e-6)


def test_ace_drops_behind_the_first_what_lies_below_a_quantile() -> None:
    # Behind the first: weights 0.4, 0.4 and 0.2 of experts 1, 3, 3 with gains 1, 0.5, 0.5, so 0.4, 0.2, 0.1; a half is 0.2.
    sample = routed(A, C, [0.05, 0.05, 0.72, 0.18])
    gains = torch.tensor([[1.0, 1.0, 1.0, 0.5]])
    policy = ACE(0.5, gains, stats_of(sample=sample))
    assert by_token(decided(policy, routed(A, C))) == approximately({0: 0.6, 1: 0.4}, {2: 0.6, 3: 0.4})
    assert by_token(decided(policy, routed([0.05, 0.05, 0.60, 0.30]))) == approximately({2: 1.0})
    # not normalised, weights count by their share of the token's sum, and stay as they are
    assert by_token(decided(policy, routed([0.05, 0.05, 0.60, 0.30], C, rule=PLAIN), PLAIN)) == approximately(
        {2: 0.6}, {2: 0.42, 3: 0.28}
    )
    assert by_token(decided(ACE(1.0, gains, stats_of(sample=sample)), routed(A, C))) == approximately(
        {0: 0.6, 1: 0.4}, {2: 1.0}
    )
    assert "for 2 layers of 4 experts" in refusal(ACE(0.5, torch.ones(2, 4), stats_of()), LAYER)


def test_gains_are_the_larger_of_spectral_norms_and_of_the_output_for_the_routers_row() -> None:
    model = tiny_model("mixtral")
    layers = find_moe_layers(model)
    gains = expert_gains(layers)
    assert gains.shape == (2, EXPERTS)
    for layer in layers:
        matrices = [p for p in layer.experts.parameters() if p.ndim == 3]
        assert len(matrices) == 2
        spectral = torch.linalg.svdvals(matrices[0])[:, 0] * torch.linalg.svdvals(matrices[1])[:, 0]
        rows = layer.router.get_parameter("weight").detach()
        apart = rows - rows.mean(0)
        x = apart / apart.norm(dim=1, keepdim=True) * HIDDEN**0.5
        own = torch.stack([layer.expert_output(e, x[e : e + 1])[0].norm() for e in range(EXPERTS)])
        wanted = torch.maximum(spectral / spectral.mean(), own / own.mean())
        assert (gains[layer.index] == 1).sum() < EXPERTS
        torch.testing.assert_close(gains[layer.index], wanted.detach(), rtol=2e-2, atol=0)
    torch.testing.assert_close(spectral_norms(torch.diag(torch.tensor([1.0, 5.0, 2.0]))[None]), torch.tensor([5.0]))


def test_modes_weighs_by_layer_and_keeps_the_first() -> None:
    unlike = [0.60, 0.30, 0.05, 0.05]  # weights 2/3 and 1/3
    policy = MoDES(0.35, torch.tensor([1.0, 0.5]))
    layers = [LAYER, replace(LAYER, index=1)]
    policy.bind(layers)
    found = [by_token(policy.decide(layer, routed(A, unlike))) for layer in layers]
    assert found[0] == approximately({0: 0.6, 1: 0.4}, {0: 1.0})
    assert found[1] == approximately({0: 1.0}, {0: 1.0})
    assert "for 2 layers" in refusal(policy, LAYER)


def test_alloc_keeps_the_largest_weights_of_the_batch_whosesoever_they_are() -> None:
    # weights 0.6, 0.4 of A, 2/3, 1/3 of the others: one per token of three leaves 2/3, 2/3, 0.6
    unlike, other = [0.60, 0.30, 0.05, 0.05], [0.05, 0.05, 0.30, 0.60]
    assert by_token(decided(Alloc((1,)), routed(A, unlike, other))) == approximately({0: 1.0}, {0: 1.0}, {3: 1.0})
    # of equal weights the first
    sure, even = [0.80, 0.20, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]
    plain = decided(Alloc((1,)), routed(sure, even, rule=PLAIN), PLAIN)
    assert by_token(plain) == approximately({0: 0.8}, {2: 0.5})
    # a token may lose all, and another keep both
    weak = [0.19, 0.18, 0.18, 0.18]
    greedy = decided(Alloc((1,)), routed([0.55, 0.35, 0.05, 0.05], weak, rule=PLAIN), PLAIN)
    assert by_token(greedy) == approximately({0: 0.55, 1: 0.35}, {})
    assert experts_of(greedy) == [0, 1]
    assert by_token(decided(Alloc((2,)), routed(A, C))) == approximately({0: 0.6, 1: 0.4}, {2: 0.6, 3: 0.4})
    assert refusal(Alloc((1, 1)), LAYER) == "alloc has budgets for 2 layers, the model has 1"
    assert refusal(Alloc((3,)), LAYER).startswith("alloc takes the first 3 experts")


def test_budgets_lose_least_for_every_total() -> None:
    losses = torch.tensor([[9.0, 4.0, 0.0], [3.0, 2.0, 0.0], [8.0, 1.0, 0.0]])
    found = allocate(losses)
    assert set(found) == set(range(3, 10))
    for total, chosen in found.items():
        each = [c for c in itertools.product((1, 2, 3), repeat=3) if sum(c) == total]
        cost = {c: sum(float(losses[i, n - 1]) for i, n in enumerate(c)) for c in each}
        assert cost[chosen] == min(cost.values())  # type: ignore[index]
    assert found[4] == (1, 1, 2)


def test_losses_of_a_layer_are_the_energy_of_what_is_left_out() -> None:
    # squared weights 0.36 and 0.16 in both tokens; squared norms 1, 2, 3, 4 of the experts
    stats = stats_of(squares=[1.0, 2.0, 3.0, 4.0], sample=routed(A, C))
    behind = (0.16 * 2 + 0.16 * 4) / 2
    torch.testing.assert_close(layer_losses(stats, torch.tensor([10.0])), torch.tensor([[10 * behind, 0.0]]))
    first = (0.36 * 1 + 0.36 * 3) / 2
    torch.testing.assert_close(without_layers(stats, torch.tensor([10.0])), torch.tensor([10 * (first + behind)]))
