"""Sensitivities turn predicted costs into nats, whatever the scorer's scale."""

import math

import pytest
import torch
from flows import (
    reference_flow,
)
from tiny import random_selector, randomise, tiny_model, words
from torch import Tensor

from lynx_learn.decode.simulate import compare
from lynx_learn.fit.sensitivity import LEVEL, measure_sensitivities, scale_to_nats
from lynx_learn.moe.decision import Decision, Routing
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.moe.loading import REFERENCE, load_model
from lynx_learn.selector.layer import LayerSelector
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.traces.groups import decode_groups


class Predicted:
    """Another policy's decisions, with the predicted cost of what they leave out summed up."""

    name, setting = "predicted", ""

    def __init__(self, selector: LynxSelector, threshold: float) -> None:
        self.selector, self.inner = selector, selector.at_threshold(threshold)
        self.cost, self.decided = 0.0, 0

    def bind(self, layers: list[MoeLayer]) -> None:
        self.inner.bind(layers)

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        decision = self.inner.decide(layer, routing)
        own: LayerSelector = self.selector.layers[layer.index]  # type: ignore[assignment]
        self.cost += float(own.costs(routing)[decision.weights == 0].sum())
        self.decided += routing.active.numel()
        return decision

    def own_bytes(self, layer: MoeLayer, skipped: Tensor, batches: int) -> float:
        return self.inner.own_bytes(layer, skipped, batches)


@pytest.mark.slow
def test_predicted_costs_are_nats_of_kl_on_the_reference_model() -> None:
    """All layers skipping at once lose about what was predicted, which was measured one layer at a time."""
    selector = LynxSelector.from_pretrained(reference_flow().selector)
    loaded = load_model(REFERENCE, "cpu", "float32")
    layers = find_moe_layers(loaded.model)
    groups = decode_groups("python-stdlib", loaded.tokenizer, "test", 8, 64, 2, seed=1)
    policy = Predicted(selector, threshold=0.01)
    result = compare(loaded.model, layers, groups, [policy], prompt=16)[0]
    stats = result.mean_stats()
    assert 1.5 < stats["experts"] < 0.8 * stats["experts_before"]  # neither nothing nor everything
    predicted = policy.cost / (policy.decided / len(layers))
    assert predicted / 3 < result.mean("kl") < 3 * predicted


def test_sensitivities_are_positive_and_undo_the_scale_of_the_scorer() -> None:
    """A scorer that says four times as much is given a quarter of the sensitivity, so the nats stay."""
    model = tiny_model("qwen3_moe")
    layers, groups = find_moe_layers(model), [(words(4, 24, seed), ["a"] * 4) for seed in range(2)]
    selector = random_selector(model)
    randomise(selector, 1)
    plain = measure_sensitivities(model, layers, selector, groups, prompt=4)
    assert all(math.isfinite(value) and value > 0 for value in plain)
    assert [float(layer.sensitivity) for layer in selector.layers] == pytest.approx(plain)  # type: ignore[arg-type]
    for layer in selector.layers:
        layer.scorer.log_residual += math.log(4)  # type: ignore[union-attr,operator]
    louder = measure_sensitivities(model, layers, selector, groups, prompt=4)
    assert [4 * value for value in louder] == pytest.approx(plain, rel=1e-3)


def test_after_scaling_predicted_costs_sum_to_the_loss_and_no_decision_changes() -> None:
    """Scaled from any start to the same sensitivities; at the level the sum is the measured loss."""
    model = tiny_model("qwen3_moe")
    layers, groups = find_moe_layers(model), [(words(4, 24, seed), ["a"] * 4) for seed in range(2)]
    selector = random_selector(model)
    for own in selector.layers:
        even = torch.arange(layers[0].num_experts).repeat_interleave(selector.config.rank)
        own.surrogates.owner.copy_(even)  # type: ignore[union-attr,operator]
    measure_sensitivities(model, layers, selector, groups, prompt=4)  # within the range that thresholds are sought in
    found = scale_to_nats(model, layers, selector, groups, prompt=4)
    scaled = [float(layer.sensitivity) for layer in selector.layers]  # type: ignore[arg-type]
    assert [row["name"] for row in found["layers"]] == [layer.name for layer in layers]
    assert all(row["measured"] > 0 for row in found["curve"])
    near = min(found["curve"], key=lambda row: abs(math.log(row["measured"] / LEVEL)))
    policy = Predicted(selector, near["threshold"])
    result = compare(model, layers, groups, [policy], prompt=4)[0]
    assert result.mean("kl") == pytest.approx(near["measured"], rel=1e-4)
    assert policy.cost / (policy.decided / len(layers)) == pytest.approx(near["predicted"], rel=1e-4)
    for layer in selector.layers:
        layer.sensitivity.mul_(3.0)  # type: ignore[operator]
    again = scale_to_nats(model, layers, selector, groups, prompt=4)
    assert [float(layer.sensitivity) for layer in selector.layers] == pytest.approx(scaled, rel=0.4)  # type: ignore[arg-type]
    assert again["factor"] == pytest.approx(1 / 3, rel=0.4)
