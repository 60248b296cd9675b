"""Experts in a form whose time depends on how many are distinct."""

import math

import pytest
import torch
from tiny import (
    EXPERTS,
    FAMILIES,
    HIDDEN,
    TOP_K,
    tiny_model,
    words,
)

from lynx_learn.moe import experts
from lynx_learn.moe.experts import experts_by_distinct
from lynx_learn.moe.families import find_moe_layers


@pytest.mark.parametrize(
    ("given_", "used"), [("batched_mm", "lynx_grouped_mm"), ("grouped_mm", "lynx_grouped_mm"), ("eager", "eager")]
)
def test_experts_run_by_distinct_and_are_put_back(given_: str, used: str) -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation(given_)
    layers, ids = find_moe_layers(model), words(2, 6)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with experts_by_distinct(layers):
            assert all(layer.experts.config._experts_implementation == used for layer in layers)
            assert model.get_experts_implementation()[""] == given_, "what is saved meanwhile"
            torch.testing.assert_close(model(input_ids=ids).logits, before)
        with pytest.raises(IndexError), experts_by_distinct(layers):
            model(input_ids=ids + 1000)
        assert all(layer.experts.config is model.config for layer in layers)
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("form", ["_in_one_call", "_one_by_one", "_grouped"])
def test_rows_with_weight_zero_are_not_run(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A left out assignment may point anywhere: its expert is not read, which weights of NaN would tell."""
    if form != "_in_one_call":
        monkeypatch.setattr(experts, "_in_one_call", getattr(experts, form))
    model = tiny_model(name)
    layer = find_moe_layers(model)[0]
    hidden, weights = torch.randn(6, HIDDEN), torch.rand(6, TOP_K)
    indices = torch.randint(0, EXPERTS - 1, (6, TOP_K))
    with torch.no_grad():
        wanted = layer.experts(hidden, indices, weights.masked_fill(torch.eye(6, TOP_K).bool(), 0.0))
        for parameter in layer.experts.parameters():
            parameter[EXPERTS - 1] = math.nan
        broken = indices.masked_fill(torch.eye(6, TOP_K).bool(), EXPERTS - 1)
        with experts_by_distinct([layer]):
            found = layer.experts(hidden, broken, weights.masked_fill(torch.eye(6, TOP_K).bool(), 0.0))
        torch.testing.assert_close(found, wanted)


def test_a_layer_that_runs_nothing_gives_zeros() -> None:
    model = tiny_model("mixtral")
    layer = find_moe_layers(model)[0]
    with torch.no_grad(), experts_by_distinct([layer]):
        found = layer.experts(torch.randn(3, HIDDEN), torch.zeros(3, TOP_K, dtype=torch.int64), torch.zeros(3, TOP_K))
    assert torch.equal(found, torch.zeros(3, HIDDEN))


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_few_rows_and_many_are_multiplied_as_eager_experts_do(name: str, rows: int) -> None:
    model = tiny_model(name)
    layer = find_moe_layers(model)[0]
    hidden, weights = torch.randn(rows, HIDDEN), torch.rand(rows, TOP_K)
    weights[0, 0] = 0.0  # where nothing is left out, BLAS multiplies, as in the untouched model
    indices = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(rows)])
    model.set_experts_implementation("eager")
    with torch.no_grad():
        wanted = layer.experts(hidden, indices, weights)
        model.set_experts_implementation("grouped_mm")
        with experts_by_distinct([layer]):
            torch.testing.assert_close(layer.experts(hidden, indices, weights), wanted)
            hidden[0, 0] = math.nan
            found = layer.experts(hidden, indices, weights)
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()
