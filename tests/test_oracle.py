"""True costs against a plain loop over tokens and experts, and the oracle that decides by them."""

from functools import cache

import pytest
import torch
from decisions import own, random_routing
from tiny import HIDDEN, random_selector, tiny_model
from torch import Tensor

from lynx_learn.moe.decision import Routing
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.rules.oracle import Oracle, squared_errors
from lynx_learn.selector.selector import LynxSelector


@cache
def subject() -> tuple[list[MoeLayer], LynxSelector]:
    model = tiny_model("qwen3_moe")
    return find_moe_layers(model), random_selector(model)


def by_hand(layer: MoeLayer, selector: LynxSelector, routing: Routing, answers: bool) -> Tensor:
    """weight² × squared error of each assignment, one at a time, from the experts' stacked weights."""
    surrogates, experts = own(selector, layer.index).surrogates, layer.experts
    found = torch.zeros_like(routing.weights)
    for place in routing.active.nonzero().tolist():
        g, t = place
        x = routing.hidden[g, t]
        for k, expert in enumerate(routing.indices[g, t].tolist()):
            gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)  # type: ignore[operator,index]
            error = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)  # type: ignore[operator,index]
            if answers:
                down, out, constant = surrogates.of(expert)
                error = error - (x @ down.T @ out + constant)
            found[g, t, k] = (routing.weights[g, t, k] ** 2) * error.square().sum()
    return found


@pytest.mark.parametrize("place", [0, 1])
@torch.no_grad()
def test_true_costs_are_squared_errors_times_squared_weights(place: int) -> None:
    layers, selector = subject()
    routing = random_routing(layers[place])
    assert not routing.active.all()
    costs, squares = squared_errors(layers[place], [own(selector, place).surrogates.output], routing)
    torch.testing.assert_close(costs, by_hand(layers[place], selector, routing, True), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(squares, by_hand(layers[place], selector, routing, False), rtol=1e-4, atol=1e-6)
    assert not costs[~routing.active].any()
    assert costs[routing.active].min() > 0


@torch.no_grad()
def test_the_oracle_leaves_out_what_costs_less_than_the_threshold_in_all() -> None:
    layers, selector = subject()
    layer = layers[0]
    routing = random_routing(layer, batches=2)
    costs = squared_errors(layer, [own(selector).surrogates.output], routing)[0] * own(selector).sensitivity
    totals = torch.zeros(2, layer.num_experts).scatter_add(1, routing.indices.flatten(1), costs.flatten(1))
    tau = float(totals[totals > 0].median()) * 1.0001
    policy = Oracle(selector, tau)
    policy.bind(layers)
    decision = policy.decide(layer, routing)
    for batch in range(2):
        live = routing.active[batch]
        stays = {e for e in range(layer.num_experts) if totals[batch, e] >= tau}
        assert 0 < len(stays) < int((totals[batch] > 0).sum())
        assert set(decision.indices[batch][live].flatten().tolist()) <= stays
        kept = torch.tensor([[e in stays for e in row] for row in routing.indices[batch].tolist()])
        torch.testing.assert_close(decision.weights[batch][live], (routing.weights[batch] * kept)[live])


@torch.no_grad()
def test_the_oracle_reads_the_surrogates_and_no_scorer() -> None:
    layers, selector = subject()
    layer = layers[0]
    policy = Oracle(selector, 1.0)
    policy.bind(layers)
    # Two maps of its rank and a constant, in float32, for each time that an expert was skipped.
    ranks, skipped = selector.layers[0].surrogates.ranks, torch.arange(layer.num_experts)  # type: ignore[union-attr,operator]
    assert policy.own_bytes(layer, skipped, 2) == float((skipped * 4 * (2 * ranks * HIDDEN + HIDDEN)).sum())
    learned = selector.at_threshold(1.0)
    learned.bind(layers)
    assert learned.own_bytes(layer, skipped, 2) > policy.own_bytes(layer, skipped, 2)
