"""Methods: every curve can be measured, from gentle to harsh, and what does not apply is refused in one line."""

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from flows import trace_of
from rule_cases import layer_of, some_stats
from tiny import EXPERTS, FAMILIES, build, decode, random_selector, tiny_model, watching, words
from transformers import PreTrainedModel

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.decode.simulate import simulated_logits
from lynx_learn.errors import OptionError
from lynx_learn.moe.decision import Policy
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.moe.routing_rules import ScoringRule
from lynx_learn.rules.expert_stats import measure_experts
from lynx_learn.rules.grids import METHODS, curves
from lynx_learn.rules.keep_sets import KeepSet, Layered
from lynx_learn.rules.oracle import Oracle
from lynx_learn.selector.selector import LynxSelector, ThresholdPolicy

KEEP_SETS = {"random", "popularity", "lynx", "xshare", "gate_sum", "vote", "gate_sq", "gate_max"}
NEED_STATS = {
    "sere",
    "siftmoe",
    "exfold",
    "naee",
    "contribution",
    "layered",
    "ace",
    "modes",
    "alloc",
    "lda",
    "learned_lda",
    "one_expert",
}
NEED_SELECTOR = {"learned_lda", "learned", "formula", "oracle", "one_expert", "layered", "modes", "alloc"}
# Of a large model alone; its layers are never run, and have no weights for `ace`.
SHAPES = [(8, 2), (32, 4), (60, 4), (128, 8), (256, 8)]


@cache
def wide_model() -> PreTrainedModel:
    """More experts and more of them per token than the other tiny models have."""
    return build(
        "Qwen3Moe", num_experts=16, num_experts_per_tok=4, moe_intermediate_size=16, head_dim=16, norm_topk_prob=True
    )


@cache
def learned(model_of: str, sensitivity: float = 0.003) -> LynxSelector:
    """A random selector; the default makes its costs as large as the thresholds that are swept."""
    selector = random_selector(wide_model() if model_of == "wide" else tiny_model(model_of))
    for layer in selector.layers:
        layer.sensitivity.fill_(sensitivity)  # type: ignore[operator]
    return selector


def shaped(experts: int, top_k: int) -> list[MoeLayer]:
    return [layer_of(ScoringRule("softmax", top_k, normalise=True), experts)]


def refusal(method: str, layers: list[MoeLayer], **given: object) -> str:
    with pytest.raises(OptionError) as error:
        curves(method, layers, 16, given.get("stats"), given.get("selector"))  # type: ignore[arg-type]
    text = str(error.value)
    assert "\n" not in text
    return text


def test_methods_stand_in_the_order_of_tables() -> None:
    assert list(METHODS) == [
        *("random", "top_k", "popularity", "lynx", "xshare", "gate_sum", "oea", "sere", "siftmoe", "exfold", "naee"),
        *(
            "contribution",
            "ace",
            "modes",
            "alloc",
            "vote",
            "gate_sq",
            "gate_max",
            "layered",
            "k1k2",
            "lda",
            "learned_lda",
        ),
        *("learned", "formula", "oracle", "one_expert"),
    ]


@pytest.mark.parametrize(("experts", "top_k"), SHAPES)
@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_published_curves_are_named_and_every_setting_stands_once(experts: int, top_k: int, size: int) -> None:
    layers, stats = shaped(experts, top_k), some_stats(experts)
    for method in METHODS:
        if method in NEED_SELECTOR | {"ace", "lda"} or (method == "naee" and top_k != 2):
            continue
        found = curves(method, layers, size, stats, None)
        assert found
        assert all(curve for curve in found)
        assert all(len(curve) <= 14 for curve in found)
        policies = [policy for curve in found for policy in curve]
        assert {policy.name for policy in policies} == {method}
        assert len({policy.setting for policy in policies}) == len(policies)
        for policy in policies:
            policy.bind(layers)


@pytest.mark.parametrize(("experts", "top_k"), SHAPES[1:])
def test_sweeps_are_dense_where_most_experts_stay(experts: int, top_k: int) -> None:
    loaded = experts * (1 - (1 - top_k / experts) ** 16)
    for method in sorted(KEEP_SETS):
        of = experts if method == "random" else loaded
        for curve in curves(method, shaped(experts, top_k), 16, None, None):
            kept = [policy.experts for policy in curve if isinstance(policy, KeepSet)]
            assert kept == sorted(kept, reverse=True)
            assert len(kept) == len(curve) >= 10
            shares = [m / of for m in kept]
            assert shares[0] >= 0.95
            assert sum(0.48 <= share <= 0.99 for share in shares) >= 8
            assert all(a - b < 0.12 for a, b in itertools.pairwise(shares))


@pytest.mark.parametrize("method", ["sere", "siftmoe", "contribution"])
def test_rules_without_a_number_of_experts_have_ten_settings(method: str) -> None:
    for curve in curves(method, shaped(128, 8), 16, some_stats(128), None):
        assert 10 <= len(curve) <= 14


def test_rules_with_a_second_parameter_have_a_curve_for_each() -> None:
    layers, stats = shaped(128, 8), some_stats(128)
    count = {
        m: len(curves(m, layers, 16, stats, None)) for m in ("lynx", "sere", "vote", "gate_sq", "gate_max", "top_k")
    }
    assert count == {**dict.fromkeys(count, 2), "sere": 3}


def test_a_selector_and_a_trace_give_gate_rules_one_threshold_for_all_layers() -> None:
    layers, stats = find_moe_layers(wide_model()), some_stats(16, 2)
    stats = replace(stats, squares=torch.tensor([[1.0, 3.0] * 8, [8.0] * 16]))
    selector = random_selector(wide_model())
    for layer, value in zip(selector.layers, (0.08, 0.005), strict=True):
        layer.sensitivity.fill_(value)  # type: ignore[operator]
    for method, factors in (("gate_sq", [0.16, 0.04]), ("gate_sum", [0.4, 0.2]), ("gate_max", [0.4, 0.2])):
        without = curves(method, layers, 16, stats, None)
        assert len(curves(method, layers, 16, None, selector)) == len(without)
        curve = curves(method, layers, 16, stats, selector)[-1]
        assert len(curves(method, layers, 16, stats, selector)) == len(without) + 1
        assert len(curve) == 14
        for policy, tau in zip(curve, (0.04 * 2.0**i for i in range(-9, 5)), strict=True):
            assert isinstance(policy, Layered)
            assert policy.name == policy.score == method
            assert policy.factors[:, 3].tolist() == pytest.approx(factors)
            assert policy.threshold == pytest.approx(tau if method == "gate_sq" else tau**0.5)
            policy.bind(layers)


def test_layered_weighs_experts_by_their_squares_and_layers_by_their_sensitivity() -> None:
    layers, stats, selector = find_moe_layers(wide_model()), some_stats(16, 2), learned("wide", 0.25)
    (curve,) = curves("layered", layers, 16, stats, selector)
    for policy in curve:
        assert isinstance(policy, Layered)
        torch.testing.assert_close(policy.factors, 0.25 * stats.squares)
    assert [policy.threshold for policy in curve] == sorted(policy.threshold for policy in curve)  # type: ignore[attr-defined]


def test_the_seed_is_that_of_the_random_rule() -> None:
    layers = shaped(32, 4)
    settings = [
        [policy.seed for policy in curves("random", layers, 16, None, None, seed)[0]]  # type: ignore[attr-defined]
        for seed in (0, 7)
    ]
    assert {*settings[0]} == {0}
    assert {*settings[1]} == {7}


@pytest.mark.parametrize("method", ["learned", "formula", "oracle"])
def test_learned_curves_sweep_the_threshold(method: str) -> None:
    selector = learned("wide")
    (curve,) = curves(method, find_moe_layers(wide_model()), 16, None, selector)
    assert len(curve) == 14
    assert {policy.name for policy in curve} == {method}
    assert len({policy.setting for policy in curve}) == 14
    thresholds = [policy.thresholds[1] for policy in curve if isinstance(policy, ThresholdPolicy)]
    assert thresholds == sorted(thresholds)
    assert thresholds[9] == pytest.approx(0.01 * 16**0.5)
    assert thresholds[1] == pytest.approx(2 * thresholds[0])
    assert all(isinstance(policy, Oracle) == (method == "oracle") for policy in curve)
    scorers = {policy.selector.config.scorer for policy in curve if isinstance(policy, ThresholdPolicy)}
    assert scorers == ({"formula"} if method == "formula" else {"mlp"})


def test_thresholds_grow_with_the_root_of_the_batch_size() -> None:
    layers, selector = find_moe_layers(wide_model()), learned("wide")
    small, large = (curves("learned", layers, size, None, selector)[0][0] for size in (4, 64))
    assert isinstance(small, ThresholdPolicy)
    assert isinstance(large, ThresholdPolicy)
    assert large.thresholds[1] == pytest.approx(4 * small.thresholds[1])


# On models.


@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_loads_fewer_experts_on_every_family(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    layers, rows = find_moe_layers(model), words(6, 8)
    stats = measure_experts(layers, trace_of(model, tmp_path / "trace"))
    for method in METHODS:
        if method == "k1k2" and not all(layer.rule.normalises for layer in layers):
            continue
        for curve in curves(method, layers, 6, stats, learned(name, 1e-5)):
            with skip_experts(model, curve[-1]) as skipping, watching(layers) as watch:
                decode(model, rows, prompt=4)
            assert sum(skipping.stats.experts_after) < sum(skipping.stats.experts_before), (method, curve[-1].setting)
            for seen in watch.steps:
                assert int(seen.indices.min()) >= 0
                assert int(seen.indices.max()) < EXPERTS
                assert torch.isfinite(seen.weights).all()
                assert torch.isfinite(seen.output).all()


def first_layer_experts(policy: Policy) -> float:
    """Mean distinct experts of the first layer, whose input no policy changes, over 40 batches of 8."""
    layers = find_moe_layers(wide_model())
    policy.bind(layers)
    with torch.no_grad():
        return simulated_logits(wide_model(), layers, words(8, 44), policy, 4)[1].experts_after[0]


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("naee", "one_expert")])
def test_harsher_settings_load_no_more(method: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    layers = find_moe_layers(wide_model())
    stats = None
    if method in NEED_STATS:
        stats = measure_experts(layers, trace_of(wide_model(), tmp_path_factory.mktemp("wide") / "trace"))
    for curve in curves(method, layers, 8, stats, learned("wide")):
        found = [first_layer_experts(policy) for policy in curve]
        assert all(harsh <= gentle + 0.3 for gentle, harsh in itertools.pairwise(found)), found
        assert found[-1] < found[0], found


def test_one_expert_of_each_layer_stays_with_and_without_surrogates(tmp_path: Path) -> None:
    layers, selector = find_moe_layers(wide_model()), learned("wide")
    stats = measure_experts(layers, trace_of(wide_model(), tmp_path / "trace"))
    (answered,), (dropped,) = curves("one_expert", layers, 8, stats, selector)
    assert [first_layer_experts(policy) for policy in (answered, dropped)] == [1.0, 1.0]
    tokens = torch.tensor([list(range(10, 30))] * 4)
    with torch.no_grad():
        shares = [
            simulated_logits(wide_model(), layers, tokens, policy, 4)[1].answered_share
            for policy in (answered, dropped)
        ]
    assert shares[0] > 0
    assert shares[1] == 0


def test_harsher_quantiles_of_naee_load_no_more(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    layers = find_moe_layers(model)
    stats = measure_experts(layers, trace_of(model, tmp_path / "trace"))
    found = []
    for policy in curves("naee", layers, 8, stats, None)[0]:
        policy.bind(layers)
        with torch.no_grad():
            found.append(simulated_logits(model, layers, words(8, 24), policy, 4)[1].experts_after[0])
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.8 * found[0]


# What is refused.


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    text = refusal("best", shaped(32, 4))
    assert text.startswith("method 'best' is unknown")
    assert all(method in text for method in METHODS)


@pytest.mark.parametrize("method", sorted(NEED_STATS))
def test_rules_that_need_statistics_ask_for_a_trace(method: str) -> None:
    text = refusal(method, shaped(8, 2), selector=learned("mixtral"))
    assert method in text
    assert "--trace" in text


@pytest.mark.parametrize("method", sorted(NEED_SELECTOR))
def test_learned_methods_ask_for_a_selector(method: str) -> None:
    text = refusal(method, shaped(8, 2), stats=some_stats())
    assert method in text
    assert "--selector" in text


def test_k1k2_is_refused_for_models_that_do_not_divide_their_weights() -> None:
    text = refusal("k1k2", [layer_of(ScoringRule("softmax", 4), 32)])
    assert text.startswith("k1k2 changes what weights are divided by")


def test_naee_is_refused_for_other_models() -> None:
    assert "naee skips the second of two experts" in refusal("naee", shaped(32, 4), stats=some_stats(32))


@pytest.mark.parametrize("method", ["top_k", "oea", "sere", "contribution", "ace", "modes", "alloc", "k1k2", "lda"])
def test_rules_that_rank_a_tokens_experts_are_refused_for_models_with_one(method: str) -> None:
    text = refusal(method, shaped(8, 1), stats=some_stats())
    assert method in text
    assert "gives each token one" in text
