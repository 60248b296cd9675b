"""Corrections around other policies: weights worked by hand, moments of real layers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flows import trace_of
from rule_cases import PLAIN, A, C, approximately, by_token, decided, layer_of, refusal, routed, some_stats
from tiny import FAMILIES, decode, random_selector, tiny_model, words

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.decode.simulate import Run, stacked_logits
from lynx_learn.moe.decision import Decision, Policy, confine
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.rules.corrections import K1K2, LDA, routed_output
from lynx_learn.rules.expert_stats import measure_experts
from lynx_learn.rules.keep_sets import GateSquared
from lynx_learn.rules.per_token import TopK


def test_k1k2_divides_by_the_mass_of_its_own_number_of_experts() -> None:
    # probabilities of A: 0.48, 0.32, 0.15, 0.05; of C: 0.42, 0.28, 0.20, 0.10
    one = TopK(1, scaled=False)
    assert by_token(decided(K1K2(one, 1), routed(A, C))) == approximately({0: 1.0}, {2: 1.0})
    assert by_token(decided(K1K2(one, 2), routed(A, C))) == approximately({0: 0.6}, {2: 0.6})
    assert by_token(decided(K1K2(one, 3), routed(A, C))) == approximately({0: 0.48 / 0.95}, {2: 0.42 / 0.90})
    assert by_token(decided(K1K2(one, 4), routed(A, C))) == approximately({0: 0.48}, {2: 0.42})
    assert K1K2(one, 3).setting == "top_k k=1 unscaled k2=3"


def test_k1k2_leaves_tokens_alone_that_lose_nothing() -> None:
    # 0 and 1 stay: A has both, C loses both, the last one keeps its first
    drop, last = GateSquared(2, "drop"), [0.48, 0.05, 0.32, 0.15]
    decision = decided(K1K2(drop, 3), routed(A, A, A, A, C, last))
    assert by_token(decision) == approximately(*[{0: 0.6, 1: 0.4}] * 4, {}, {0: 0.48 / 0.95})


def test_k1k2_is_for_models_that_divide_their_weights() -> None:
    assert "does not divide them" in refusal(K1K2(TopK(1), 2), layer_of(PLAIN))
    assert "allows 1 to 4" in refusal(K1K2(TopK(1), 5), layer_of(replace(PLAIN, normalise=True)))


POLICIES = {
    "dropped": lambda model: GateSquared(3, "drop"),
    "learned": lambda model: random_selector(model).at_threshold(0.5),
}


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_lda_gives_the_output_its_mean_and_spread_back(name: str, kind: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    layers = find_moe_layers(model)
    stats = measure_experts(layers, trace_of(model, tmp_path / "trace"))
    inner: Policy = POLICIES[kind](model)
    policy = LDA(inner, stats, size=8)
    policy.bind(layers)
    for layer in layers:
        routing = stats.batches(layer, 8)
        assert routing.hidden.shape[:2] == (12, 8)
        with torch.no_grad():
            full = routed_output(layer, routing, Decision(routing.indices, routing.weights))
            reduced = routed_output(layer, routing, confine(inner.decide(layer, routing), routing.active, 8))
            decision = confine(policy.decide(layer, routing), routing.active, 8)
        assert decision.factor is not None
        assert decision.addition is not None
        experts_alone = routed_output(layer, routing, decision._replace(addition=None))
        found = experts_alone * decision.factor.flatten(0, 1) + decision.addition.flatten(0, 1)
        assert not torch.allclose(reduced.std(0), full.std(0), rtol=5e-2, atol=0)
        torch.testing.assert_close(found.mean(0), full.mean(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.std(0), full.std(0), rtol=5e-3, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_output_is_multiplied_and_added_to_at_decode_as_in_a_simulation(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    layers, tokens = find_moe_layers(model), words(6, 10)
    stats = measure_experts(layers, trace_of(model, tmp_path / "trace"))
    policy = LDA(GateSquared(3, "drop"), stats, size=6)
    with skip_experts(model, policy):
        found = decode(model, tokens, prompt=4)[1]
    with skip_experts(model, GateSquared(3, "drop")):
        assert not torch.allclose(decode(model, tokens, prompt=4)[1], found, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        runs = [Run(tokens, None), Run(tokens, policy)]
        (untouched, _), (simulated, counted) = stacked_logits(model, layers, runs, 4)
        plain = model(input_ids=tokens, use_cache=False).logits[:, 4:]
    torch.testing.assert_close(simulated, found, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(untouched, plain, rtol=1e-3, atol=1e-3)
    assert max(counted.experts_after) <= 3


def test_moments_are_measured_once_for_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    layers = find_moe_layers(model)
    policy = LDA(TopK(1), measure_experts(layers, trace_of(model, tmp_path / "trace")), size=4)
    policy.bind(layers)
    first = policy.maps[0]
    policy.bind(layers)
    assert policy.maps[0] is first
    policy.bind(find_moe_layers(model))
    assert policy.maps[0] is not first
    assert policy.own_bytes(layers[0], torch.ones(layers[0].num_experts), 3) == 3 * 8 * layers[0].hidden_size
    assert "of 1 layers of 6 experts" in refusal(LDA(TopK(1), some_stats(6), 4), layer_of(replace(PLAIN)))
