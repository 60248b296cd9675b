"""A real decode of every supported family is the simulated one; where a model's own decode is not its one pass, that is told."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tiny import random_selector, tiny_model, words
from zoo import ABSENT, VARIANTS, ZOO, build

from lynx_learn.decode.real import RealDecode, mean_of, real_logits
from lynx_learn.decode.runtime import unwrapped
from lynx_learn.decode.simulate import METRICS, Reference, simulated_logits
from lynx_learn.errors import ModelError
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.rules.keep_sets import XShare

ROWS, LENGTH, PROMPT = 3, 20, 6
KINDS = {name: kind for name, kind in {**ZOO, **VARIANTS}.items() if kind.reason in ("", ABSENT)}


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_every_family_decodes_as_it_is_simulated(name: str) -> None:
    """Untouched, or `RealDecode` refuses, and skipping. No supported family is left out."""
    if KINDS[name].reason == ABSENT:
        pytest.skip(f"not in transformers {transformers.__version__}")
    model = build(KINDS[name])
    layers = find_moe_layers(unwrapped(model))
    policy = random_selector(unwrapped(model)).at_threshold(KINDS[name].threshold)
    tokens = words(ROWS, LENGTH)
    decode = RealDecode(model, layers, tokens, PROMPT)
    policy.bind(layers)
    simulated, _ = simulated_logits(model, layers, tokens, policy, PROMPT)
    real = real_logits(model, layers, tokens, policy, PROMPT)
    torch.testing.assert_close(simulated, real, rtol=1e-4, atol=2e-3)  # nemotron_h rounds its state's decays
    assert mean_of(decode.apart, "kl") < 1e-5
    assert mean_of(decode.one.losses(simulated[:, :-1]), "kl") > 1e-3


def tied_keys() -> Any:
    """Sparse attention that chooses among keys of equal score, which a pass does otherwise than a step."""
    kind = ZOO["deepseek_v32"]
    return build(replace(kind, options={**kind.options, "index_n_heads": 1}))


def lost_positions() -> Any:
    """Every decoded token believes to be the first."""

    def first(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("past_key_values") is not None:
            kwargs["position_ids"] = torch.zeros_like(kwargs["input_ids"])
        return args, kwargs

    model = tiny_model("qwen3_moe")
    model.register_forward_pre_hook(first, with_kwargs=True)
    return model


@pytest.mark.parametrize("make", [tied_keys, lost_positions])
def test_a_decode_that_is_another_computation_is_refused(make: Any) -> None:
    model = make()
    with pytest.raises(ModelError, match=rf"{model.config.model_type}.* decodes with a cache otherwise") as error:
        RealDecode(model, find_moe_layers(model), words(ROWS, LENGTH), PROMPT)
    assert "\n" not in str(error.value)


def test_the_floor_is_what_the_untouched_model_differs_from_itself() -> None:
    model = tiny_model("mixtral").to(torch.bfloat16)
    tokens = words(ROWS, LENGTH)
    layers = find_moe_layers(model)
    floor = RealDecode(model, layers, tokens, PROMPT).floor("kl")
    targets = tokens[:, PROMPT + 1 :]

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        sums = Reference(one[:, PROMPT:-1], targets).losses(other[:, PROMPT:-1]).sums
        return float(sums[:, METRICS.index("kl")].sum() / targets.numel())

    with torch.no_grad():
        half = model(input_ids=tokens).logits
        cache, steps = None, []
        for place in range(LENGTH):
            out = model(input_ids=tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache, steps = out.past_key_values, [*steps, out.logits]
        full = tiny_model("mixtral").to(torch.bfloat16).float()(input_ids=tokens).logits
    assert (floor.batch_size, floor.steps, floor.other) == (ROWS, LENGTH - PROMPT - 1, "float32")
    assert floor.precision == pytest.approx(apart(half, full), rel=1e-3)
    assert 1e-5 < floor.cached < 2e-2
    # Here the prompt is read token by token, too, and rounds once more.
    assert floor.cached == pytest.approx(apart(half, torch.cat(steps, 1)), rel=1.0)
    assert model.dtype == torch.bfloat16


def test_a_model_that_is_too_large_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lynx_learn.decode.real.COPIED_BYTES", 1000)
    model = tiny_model("mixtral")
    floor = RealDecode(model, find_moe_layers(model), words(ROWS, LENGTH), PROMPT).floor("kl")
    assert floor.precision is None
    assert "a second copy of the model would take" in floor.other
    assert floor.cached < 1e-5


def test_long_texts_are_decoded_in_part_and_any_policy_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lynx_learn.decode.real.STEPS", 5)
    model = tiny_model("qwen3_moe")
    decode = RealDecode(model, find_moe_layers(model), words(ROWS, LENGTH), PROMPT)
    assert decode.tokens.shape == (ROWS, PROMPT + 6)
    for metric in METRICS:
        simulated, real = decode.compare(XShare(4), metric)
        assert real == pytest.approx(simulated, abs=1e-5)
    assert decode.compare(XShare(4), "kl")[0] > 0.005
