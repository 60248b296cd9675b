"""Which model counts as the same: in another precision yes; with another rule, routers, experts or other weights no."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import one_line
from safetensors.torch import load_file
from tiny import FAMILIES, random_selector, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lynx_learn import LynxSelector, reference_moe, skip_experts
from lynx_learn.errors import ModelError, SelectorError
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.identity import (
    PROJECTIONS,
    SAME,
    SET,
    Identity,
    Passing,
    differences,
    distance,
    identify,
    is_identity,
    sketch,
)

SHIPPED = "selectors/reference-moe"


def compared(model: nn.Module, other: nn.Module) -> list[str]:
    return differences(*(identify(find_moe_layers(m), m) for m in (model, other)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_shipped_selector_knows_its_model_in_any_precision(dtype: torch.dtype) -> None:
    """V100 and T4 have no bfloat16."""
    selector = LynxSelector.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(reference_moe(), dtype=dtype)
    selector.check(find_moe_layers(model), model)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"num_experts_per_tok": 8}, "top-8, softmax, normalised"),
        ({"norm_topk_prob": False}, "top-4, softmax"),
        ({"hidden_act": "gelu"}, "activation of 1 and -1 0.841, -0.159"),
    ],
)
def test_the_same_weights_routed_otherwise_are_another_model(change: dict[str, Any], found: str) -> None:
    selector = LynxSelector.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(reference_moe(), dtype=torch.float32, **change)
    with pytest.raises(SelectorError, match=r"this model differs in its routing rule \(.*; expected top-4") as error:
        skip_experts(model, selector, budget=0.01)
    assert found in one_line(error)
    assert "its routers" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}, "original_inv_freq"),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 256,
                }
            },
            "rotary_emb",
        ),
        ({"rms_norm_eps": 0.01}, "variance_epsilon"),
        ({"attention_bias": True}, "self_attn.k_proj.bias is new"),
        ({"tie_word_embeddings": False}, "lm_head.weight is new"),
    ],
)
def test_the_same_weights_computed_with_otherwise_are_another_model(change: dict[str, Any], found: str) -> None:
    """Positions stretched for longer texts, other norms, a new head."""
    selector = LynxSelector.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(reference_moe(), dtype=torch.float32, **change)
    with pytest.raises(SelectorError, match=r"this model differs in other weights \(") as error:
        skip_experts(model, selector, budget=0.01)
    assert found in one_line(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_precision_of_every_family_is_the_same_model(family: str) -> None:
    model = tiny_model(family)
    for dtype in (torch.bfloat16, torch.float16):
        assert compared(model, tiny_model(family).to(dtype)) == []


def noise(parameter: nn.Parameter, share: float) -> None:
    """Move a weight by a share of its size."""
    with torch.no_grad():
        parameter += share * parameter.square().mean().sqrt() * torch.randn_like(parameter)


def low_rank(parameter: nn.Parameter, share: float) -> None:
    """What a merged LoRA of rank 1 adds."""
    with torch.no_grad():
        change = torch.randn(parameter.shape[0], 1) @ torch.randn(1, parameter.shape[1])
        parameter += share * parameter.square().mean().sqrt() * change


CHANGES: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "a router": (
        lambda m: noise(m.model.layers[1].mlp.gate.weight, 0.01),
        r"its routers \(by .*weight of MoE layer 1\)",
    ),
    "experts": (
        lambda m: noise(m.model.layers[0].mlp.experts.down_proj, 0.01),
        r"its experts \(by .*down_proj of MoE layer 0\)",
    ),
    "scaled experts": (lambda m: m.model.layers[0].mlp.experts.down_proj.data.mul_(1.01), r"its experts \(by "),
    "one expert": (lambda m: noise(m.model.layers[1].mlp.experts.gate_up_proj[3], 0.05), r"its experts \(by "),
    "attention": (
        lambda m: low_rank(m.model.layers[0].self_attn.q_proj.weight, 0.02),
        r"other weights \(by .*\*\.self_attn\.q_proj",
    ),
    "embeddings": (lambda m: noise(m.model.embed_tokens.weight, 0.02), r"other weights \(by .*embed_tokens"),
    "a norm": (lambda m: m.model.norm.weight.data.mul_(1.02), r"other weights \(by .*norm"),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES.keys())
def test_a_short_fine_tuning_is_told_by_what_it_changed(change: Callable[[PreTrainedModel], None], said: str) -> None:
    torch.manual_seed(0)
    model = tiny_model("qwen3_moe")
    change(model)
    selector = random_selector(tiny_model("qwen3_moe"), thresholds={"kl": {"0.1": {"1": 0.1}}})
    with pytest.raises(SelectorError, match=r"this model differs in " + said) as error:
        skip_experts(model, selector, budget=0.1)
    assert len(compared(tiny_model("qwen3_moe"), model)) == 1, str(error.value)


def test_a_bias_that_lives_beside_the_router_counts() -> None:
    """Where the bias for the choice is the block's own (MiniMax-M2 and others), it is in no router's state."""
    model = tiny_model("deepseek_v3")
    bias = find_moe_layers(model)[0].router.e_score_correction_bias  # type: ignore[union-attr]
    with torch.no_grad():
        bias[2] += 0.3  # type: ignore[operator]
    found = compared(tiny_model("deepseek_v3"), model)
    assert len(found) == 1
    assert "its routers" in found[0]
    layers = find_moe_layers(tiny_model("qwen3_moe"))
    own = [replace(layer, rule=replace(layer.rule, bias=torch.arange(8.0))) for layer in layers]
    other = [replace(layer, rule=replace(layer.rule, bias=torch.arange(8.0).flip(0))) for layer in layers]
    assert "choice bias of MoE layer" in differences(identify(own), identify(other))[0]


def test_an_active_adapter_is_refused_by_name_and_a_merged_one_is_another_model() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("qwen3_moe")
    selector = random_selector(model, thresholds={"kl": {"0.1": {"1": 0.1}}})
    torch.manual_seed(0)
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    for wrapped in (tuned, tuned.base_model.model):
        with pytest.raises(ModelError, match=r"active adapter \(default\)") as error:
            skip_experts(wrapped, selector, budget=0.1)
        one_line(error)
    with tuned.disable_adapter():
        selector.check(find_moe_layers(model), model)
    with pytest.raises(SelectorError, match=r"other weights \(by .*proj"):
        skip_experts(tuned.merge_and_unload(), selector, budget=0.1)


def test_what_an_engine_does_not_know_is_not_compared() -> None:
    whole = identify(find_moe_layers(tiny_model("olmoe")), tiny_model("olmoe"))
    assert differences(whole, {"routers": whole["routers"]}) == []
    other = [{"weight": [2 * number for number in own["weight"]]} for own in whole["routers"]]
    assert "its routers" in differences(whole, {"routers": other})[0]
    assert differences(whole, {"routers": [{"other": [1.0] * (PROJECTIONS + 1)}] * 2}) == [
        "its routers (other tensors)"
    ]


def test_the_distance_of_sketches_is_that_of_the_weights() -> None:
    torch.manual_seed(0)
    for shape in ((50,), (300, 400), (8, 64, 96)):
        weights = torch.randn(shape)
        for share in (0.001, 0.03, 0.5):
            moved = weights + share * torch.randn(shape)
            assert 0.35 * share < distance(sketch([weights]), sketch([moved])) < 2 * share
        assert distance(sketch([weights]), sketch([weights.bfloat16()])) < SAME / 1.5
        # A view of other strides holds the same weights.
        assert sketch([weights.mT.contiguous().mT]) == sketch([weights]) if weights.ndim > 1 else True
    zero = torch.zeros(40)
    assert distance(sketch([zero]), sketch([zero])) == 0
    assert distance(sketch([zero]), sketch([zero + 1])) >= 1


def test_an_identity_goes_through_json_and_anything_else_is_none(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    found = identify(find_moe_layers(model), model)
    assert json.loads(json.dumps(found)) == found
    assert is_identity(found)
    for broken in (
        None,
        {},
        {"routers": 3},
        {**found, "more": []},
        {**found, "rest": {"a": [1.0]}},
        {**found, "rules": [3]},
        {**found, "experts": [{"a": ["1"] * (PROJECTIONS + 1)}]},
        {**found, "routers": [{"a": [float("nan")] * (PROJECTIONS + 1)}]},
    ):
        assert not is_identity(broken)


def passed(folder: Path, model: PreTrainedModel, change: str = "") -> Identity:
    """What is seen of a model's checkpoint as it is read; `change` is the tensor that is another one."""
    model.save_pretrained(folder)
    passing = Passing(find_moe_layers(model)[0].num_experts, model.config.get_text_config().num_hidden_layers)
    for name, value in load_file(folder / "model.safetensors").items():
        passing.see(name, 1.01 * value if change and change in name else value)
    passing.see("model.layers.99.self_attn.q_proj.weight", torch.ones(2, 2))  # one that is speculated with
    return passing.identity()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_known_as_it_is_read(family: str, tmp_path: Path) -> None:
    """As vLLM reads it: one tensor of one expert after the other, where the family has it so."""
    model = tiny_model(family)
    known, found = identify(find_moe_layers(model), model), passed(tmp_path, model)
    assert differences(known, found) == []
    if family != "granitemoe":  # whose checkpoints have other names
        assert [part.keys() for part in found["experts"]] == [part.keys() for part in known["experts"]]
    weights = {name for name in known["rest"] if not name.endswith(SET)}
    assert len(found["rest"].keys() & weights) > len(weights) / 2


@pytest.mark.parametrize(
    ("part", "said"), [("experts.1.up_proj", "its experts"), ("layers.1.self_attn", "other weights")]
)
def test_a_fine_tuned_checkpoint_is_known_as_it_is_read(part: str, said: str, tmp_path: Path) -> None:
    """Its routers may be the same."""
    model = tiny_model("qwen3_moe")
    (found,) = differences(identify(find_moe_layers(model), model), passed(tmp_path, model, part))
    assert found.startswith(said)


def test_experts_that_were_not_all_read_are_not_compared() -> None:
    """With expert parallelism a worker reads its own."""
    passing = Passing(num_experts=2, depth=1)
    passing.see("model.layers.0.mlp.experts.0.down_proj.weight", torch.ones(3, 4))
    assert passing.identity()["experts"] == [{}]
    passing.see("model.layers.0.mlp.experts.1.down_proj.weight", torch.ones(3, 4))
    assert passing.identity()["experts"] == [{"down_proj": sketch([torch.ones(2, 3, 4)])}]


def test_packed_weights_are_compared_by_what_they_stand_for() -> None:
    """A model whose attention torchao has rounded to 8 bits is another one, and is refused by the name of what differs."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = tiny_model("qwen3_moe")
    selector = random_selector(model)
    quantization.quantize_(model.model.layers[0].self_attn, quantization.Int8WeightOnlyConfig())
    with pytest.raises(SelectorError, match=r"differs in other weights \(by 0\.\d%, model.layers.\*.self_attn"):
        skip_experts(model, selector.at_threshold(1.0))
