"""MoE blocks are found in every family, and what does not fit is refused by name."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny import (
    COMMON,
    EXPERTS,
    FAMILIES,
    HIDDEN,
    TOP_K,
    build,
    by_expert,
    tiny_model,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from lynx_learn.errors import ModelError
from lynx_learn.moe.families import find_moe_layers


@pytest.mark.parametrize("name", FAMILIES)
def test_finds_every_moe_block(name: str) -> None:
    model = tiny_model(name)
    layers = find_moe_layers(model)
    parents = [n.rsplit(".", 1)[0] for n, m in model.named_modules() if type(m).__name__.endswith("Experts")]
    assert [layer.name for layer in layers] == parents
    assert [layer.index for layer in layers] == [0, 1]
    for layer in layers:
        assert layer.block is model.get_submodule(layer.name)
        assert (layer.num_experts, layer.top_k, layer.hidden_size) == (EXPERTS, TOP_K, HIDDEN)
        one_expert = [parameter[0] for parameter in layer.experts.parameters()]
        assert layer.expert_bytes == sum(p.numel() * p.element_size() for p in one_expert)


def odd_router(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights that are no known function of the logits."""
    logits = nn.functional.linear(hidden.reshape(-1, HIDDEN), self.weight)
    values, indices = logits.tanh().topk(self.top_k, dim=-1)
    return logits, values.abs() + 1.0, indices


def bare_router(self: Any, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden.reshape(-1, HIDDEN), self.weight)


def with_router(forward: Callable[..., Any], layer: int) -> PreTrainedModel:
    """A Mixtral with one router's forward replaced."""
    model = tiny_model("mixtral")
    router = model.get_submodule(f"model.layers.{layer}.mlp.gate")
    router.forward = forward.__get__(router)
    return model


def build_llama4() -> nn.Module:
    config = transformers.Llama4TextConfig(
        **COMMON, intermediate_size=48, intermediate_size_mlp=48, num_local_experts=4, head_dim=8
    )
    return transformers.Llama4ForCausalLM(config)


def build_dbrx() -> nn.Module:
    ffn = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    return transformers.DbrxForCausalLM(
        transformers.DbrxConfig(
            d_model=32,
            n_heads=4,
            n_layers=2,
            vocab_size=128,
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
            ffn_config=ffn,
        )
    )


def with_stray_experts() -> PreTrainedModel:
    """A Mixtral with one more set of experts that nothing routes to by a known block."""
    model = tiny_model("mixtral")
    stray = nn.ParameterDict({"up": torch.zeros(4, 3, 3), "down": torch.zeros(4, 3, 3)})
    model.get_submodule("model.layers.1").add_module("more", stray)
    return model


def with_another_router_call() -> PreTrainedModel:
    """A Mixtral whose second block gives its experts something else than indices and weights."""
    model = tiny_model("mixtral")
    block = model.get_submodule("model.layers.1.mlp")
    block.forward = lambda hidden: block.experts(hidden, block.gate(hidden[0])[0], None)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "llama": (lambda: build("Llama", intermediate_size=48), "'llama'", "no Mixture-of-Experts block"),
    "llama4": (build_llama4, "'llama4", "runs every expert"),
    "dbrx": (build_dbrx, "'dbrx'", "stacked 3-D parameters"),
    "router of logits only": (lambda: with_router(bare_router, 0), "'mixtral'", "does not return logits, weights and"),
    "unknown scoring": (lambda: with_router(odd_router, 0), "'mixtral'", "unknown way"),
    "experts beside the known ones": (with_stray_experts, "model.layers.1.more", "outside of a known block"),
    "another call of the experts": (with_another_router_call, "model.layers.1.mlp", "does not call its experts with"),
    "unknown scoring in one layer": (lambda: with_router(odd_router, 1), "model.layers.1.mlp", "unknown way"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name_with_the_reason(case: str) -> None:
    make, named, reason = REFUSED[case]
    with pytest.raises(ModelError) as caught:
        find_moe_layers(make())
    message = str(caught.value)
    assert named in message
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("case", ["mixtral", "unknown scoring"])
def test_reading_a_model_leaves_nothing_on_it(case: str) -> None:
    model = tiny_model(case) if case in FAMILIES else REFUSED[case][0]()
    with contextlib.suppress(ModelError):
        find_moe_layers(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_probabilities_in_the_place_of_logits_are_taken_back() -> None:
    """Rows that sum to one are a softmax; its logarithm gives the same routing, also among allowed experts."""

    def forward(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shares = nn.functional.linear(hidden.reshape(-1, HIDDEN), self.weight).softmax(-1)
        values, indices = shares.topk(self.top_k, dim=-1)
        return shares, values / values.sum(-1, keepdim=True), indices

    plain = find_moe_layers(tiny_model("mixtral"))[0]
    layer = find_moe_layers(with_router(forward, 0))[0]
    assert (plain.logits_are_probabilities, layer.logits_are_probabilities) == (False, True)
    hidden = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(3))
    allowed = torch.arange(EXPERTS) % 2 == 0
    with torch.no_grad():
        wanted = plain.rule.route(plain.logits_of(plain.router(hidden)), allowed)
        found = layer.rule.route(layer.logits_of(layer.router(hidden)), allowed)
    torch.testing.assert_close(by_expert(*found), by_expert(*wanted))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_experts_in_eight_bits_are_refused_by_name(dtype: torch.dtype) -> None:
    """Without the scales of transformers' own FP8 experts nobody knows what they stand for."""
    model = tiny_model("qwen3_moe")
    for layer in find_moe_layers(model):
        for name, value in list(layer.experts.named_parameters()):
            setattr(layer.experts, name, torch.nn.Parameter(value.detach().to(dtype), requires_grad=False))
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelError, match=rf"block model\.layers\.0\.mlp .* keeps its experts in {kind}") as error:
        find_moe_layers(model)
    assert "\n" not in str(error.value)


def test_why_a_block_cannot_be_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_moe")

    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone\nand more lines")

    monkeypatch.setattr(type(find_moe_layers(model)[0].router), "forward", fail)
    with pytest.raises(ModelError, match=r"cannot be run .*\(RuntimeError: the device is gone\)$"):
        find_moe_layers(model)
