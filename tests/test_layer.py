"""The threshold rule of one layer by hand, its costs and surrogates, and that it is one graph."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from decisions import COSTS, INDICES, WEIGHTS, own, random_routing, same
from tiny import EXPERTS, random_selector, randomise, tiny_model
from torch import Tensor

from lynx_learn.moe.decision import Decision, Routing
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.selector.features import assignment_features
from lynx_learn.selector.layer import LayerSelector, sum_in_order
from lynx_learn.selector.selector import LynxSelector, ThresholdPolicy


def hand_decision(threshold: float, keep_top1: bool = False, rank: int = 0, costs: Tensor = COSTS) -> Decision:
    config = random_selector(tiny_model("mixtral"), rank=rank, keep_top1=keep_top1).config
    selector = LynxSelector(replace(config, num_experts=4, hidden_size=2))
    randomise(selector)
    active = torch.ones(1, 3, dtype=torch.bool)
    routing = Routing(torch.ones(1, 3, 2), torch.zeros(1, 3, 4), INDICES, WEIGHTS, active)
    return own(selector).decide(routing, torch.tensor([threshold]), costs)


def test_experts_below_the_threshold_together_are_left_out() -> None:
    decision = hand_decision(0.75)  # experts 1 and 2 cost 0.5 each; 0 is the anchor
    assert decision.indices.tolist() == [[[0, 0], [0, 0], [3, 0]]]
    torch.testing.assert_close(decision.weights, torch.tensor([[[0.75, 0.0], [0.0, 0.0], [0.6, 0.0]]]))
    assert decision.addition is None
    assert decision.answered is None


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_cost_equal_to_the_threshold_keeps(threshold: float) -> None:
    decision = hand_decision(threshold)
    assert torch.equal(decision.indices, INDICES)
    assert torch.equal(decision.weights, WEIGHTS)


def test_the_costliest_expert_always_stays() -> None:
    decision = hand_decision(math.inf)
    assert decision.indices.unique().tolist() == [0]
    torch.testing.assert_close(decision.weights, torch.tensor([[[0.75, 0.0], [0.0, 0.0], [0.0, 0.0]]]))


def test_keep_top1_keeps_each_first_expert() -> None:
    decision = hand_decision(math.inf, keep_top1=True)
    assert decision.indices.tolist() == [[[0, 1], [1, 0], [3, 0]]]  # only 2 is nobody's first
    torch.testing.assert_close(decision.weights, torch.tensor([[[0.75, 0.25], [0.625, 0.0], [0.6, 0.0]]]))


def test_a_cost_that_is_no_number_keeps_its_expert() -> None:
    costs = COSTS.clone()
    costs[0, 0, 1] = costs[0, 2, 1] = math.nan  # experts 1 and 2; only 3 costs less than 2
    decision = hand_decision(2.0, costs=costs)
    torch.testing.assert_close(decision.weights, torch.tensor([[[0.75, 0.25], [0.625, 0.375], [0.0, 0.4]]]))
    assert decision.indices[decision.weights > 0].tolist() == [0, 1, 1, 2, 2]
    assert decision.indices[0, 2, 0] in (1, 2)


@pytest.mark.parametrize(("batches", "tokens", "rank"), [(1, 6, 4), (1, 12, 3), (3, 6, 4)])
def test_surrogates_answer_with_the_original_weight(batches: int, tokens: int, rank: int) -> None:
    selector = random_selector(tiny_model("mixtral"), rank=rank)
    layer = find_moe_layers(tiny_model("mixtral"))[0]
    routing = random_routing(layer, batches, tokens)
    part = own(selector).surrogates
    decision = own(selector).decide(routing, torch.full((batches,), 2.0))
    assert decision.addition is not None
    assert decision.answered is not None
    wanted = torch.zeros_like(routing.hidden)
    for g, t, k in decision.answered.nonzero().tolist():
        expert, weight = int(routing.indices[g, t, k]), routing.weights[g, t, k]
        assert decision.weights[g, t, k] == 0
        down, up, constant = part.of(expert)
        answer = up.T @ (down @ routing.hidden[g, t]) + constant
        wanted[g, t] += weight * answer
    torch.testing.assert_close(decision.addition, wanted, rtol=1e-4, atol=1e-4)
    kept = ~decision.answered & routing.active.unsqueeze(-1)
    assert torch.equal(decision.indices[kept], routing.indices[kept])
    assert torch.equal(decision.weights[kept], routing.weights[kept])
    assert 0.05 < decision.answered[routing.active].float().mean() < 0.9


def test_costs_are_scores_times_sensitivity_and_what_does_not_run_adds_none() -> None:
    model = tiny_model("olmoe")
    selector = random_selector(model)
    routing = random_routing(find_moe_layers(model)[0])
    part = own(selector)
    with torch.no_grad():
        features = assignment_features(routing.logits, routing.indices, routing.weights)
        logarithms = part.scorer(features, routing.indices, routing.hidden)
    wanted = logarithms.exp() * part.sensitivity
    torch.testing.assert_close(part.costs(routing), wanted)
    assert not routing.active.all()
    assert part.sensitivity != 1
    total = torch.zeros(len(routing.active), EXPERTS)
    for g, t in routing.active.nonzero().tolist():
        total[g].index_add_(0, routing.indices[g, t], wanted[g, t])
    torch.testing.assert_close(part.totals(routing, wanted), total)


@pytest.mark.parametrize("scorer", ["formula", "linear", "mlp"])
def test_decode_runs_the_same_costs_folded(scorer: str) -> None:
    model = tiny_model("olmoe")
    layers = find_moe_layers(model)
    selector = random_selector(model, scorer=scorer)
    policy = selector.at_threshold(1.0)
    policy.bind(layers)
    for layer in layers:
        routing = random_routing(layer, batches=3, tokens=40)
        part: LayerSelector = selector.layers[layer.index]  # type: ignore[assignment]
        torch.testing.assert_close(policy.ready[layer.index].costs(routing), part.costs(routing), rtol=1e-4, atol=1e-6)


def test_one_copy_serves_all_thresholds_until_the_selector_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("olmoe")
    layers, selector = find_moe_layers(model), random_selector(model)
    copied: list[object] = []
    deepcopy = copy.deepcopy

    def counting(part: object, memo: dict[int, object] | None = None) -> object:
        copied.extend([part] if memo is None else [])
        return deepcopy(part, memo)

    def bound(threshold: float, selector: LynxSelector = selector, dtype: torch.dtype | None = None) -> ThresholdPolicy:
        policy = selector.at_threshold(threshold)
        policy.bind(layers if dtype is None else find_moe_layers(deepcopy(model).to(dtype)))
        return policy

    monkeypatch.setattr(copy, "deepcopy", counting)
    routing = random_routing(layers[1], batches=2, tokens=12)

    def is_right(policy: ThresholdPolicy, threshold: float) -> bool:
        decision, wanted = (
            policy.decide(layers[1], routing),
            own(selector, 1).decide(routing, torch.tensor(threshold).expand(2)),
        )
        return torch.equal(decision.indices, wanted.indices) and torch.equal(decision.weights, wanted.weights)

    policies = {tau: bound(tau) for tau in (0.5, 1.0, 2.0)}
    assert len(copied) == len(layers)
    assert all(is_right(policy, tau) for tau, policy in policies.items())
    own(selector, 1).sensitivity.fill_(1e-3)
    assert is_right(bound(1.0), 1.0)
    assert not is_right(policies[1.0], 1.0)  # bound before the change
    assert len(copied) == len(layers) + 1
    selector.double().float()  # the same values at other places in memory
    for change in ({}, {"dtype": torch.bfloat16}, {"selector": deepcopy(selector)}):
        copied.clear()
        bound(1.0, **change)  # type: ignore[arg-type]
        assert len(copied) == len(layers)
    with torch.inference_mode():
        bound(1.0)  # a copy made here is of no use elsewhere
    copied.clear()
    bound(1.0)
    assert len(copied) == len(layers)


@pytest.mark.parametrize(
    ("scorer", "rank", "keep_top1", "batches", "tokens"),
    [("formula", 0, False, 3, 6), ("linear", 4, True, 1, 4), ("mlp", 4, False, 1, 20), ("mlp", 8, True, 3, 6)],
)
def test_deciding_is_one_graph_for_any_values(
    scorer: str, rank: int, keep_top1: bool, batches: int, tokens: int
) -> None:
    """No break, and no shape or branch that depends on data, from the router's output to what is run instead."""
    model = tiny_model("mixtral").to(torch.bfloat16 if rank == 8 else torch.float32)
    layer = find_moe_layers(model)[0]
    policy = random_selector(model, rank, scorer, keep_top1=keep_top1).at_threshold(2.0, "torch")  # bits are compared
    policy.bind(find_moe_layers(model))
    policy.ready[0].selector.surrogates.use("grouped" if rank == 8 else "dense")  # those of other devices than a CPU
    torch.compiler.reset()
    traced = torch.compile(
        lambda routing: policy.decide(layer, routing), fullgraph=True, backend="eager", dynamic=False
    )
    for seed in range(3):
        routing = random_routing(layer, batches, tokens, seed)
        routing = routing._replace(hidden=routing.hidden.to(layer.dtype))
        if seed == 2:
            routing = routing._replace(active=torch.zeros_like(routing.active))
        with torch.no_grad(), torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            assert same(traced(routing), policy.decide(layer, routing))


def test_sums_in_order_are_those_of_scatter_add() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, 6, (3, 20), generator=generator)
    values = torch.rand(3, 20, generator=generator)
    values[0, 0], values[1, 0] = torch.inf, torch.nan
    wanted = torch.zeros(3, 7).scatter_add(-1, places, values)
    torch.testing.assert_close(sum_in_order(places, values, 7), wanted, equal_nan=True)
