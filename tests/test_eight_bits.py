"""Experts in float8: what is collected, fitted and left out is as with the same weights multiplied out, in every form."""

import json
import math
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from eight_bits import Rounding, as_they_are, in_float8, native, save_fp8
from flows import LENGTH, flow_in, one_line, save_tokenizer, tiny_flow, train_options
from safetensors.torch import load_file
from shared import SHARED
from tiny import EXPERTS, HIDDEN, TOP_K, build, decode, random_selector, tiny_model, watching, words
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lynx_learn.checkpoint.blocks import LoadedLayers, StoredLayers
from lynx_learn.decode.runtime import skip_experts
from lynx_learn.errors import ModelError, OptionError
from lynx_learn.fit.train import train
from lynx_learn.moe.experts import experts_by_distinct
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.identity import Passing, differences, identify
from lynx_learn.moe.loading import LoadedModel, load_model
from lynx_learn.offload.loading import load_without_experts
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.traces.collect import CollectOptions, collect, record
from lynx_learn.traces.format import Trace

BLOCKS = {"qwen3_moe": 16, "deepseek_v3": 8, "mixtral": 16}
NATIVE = ["qwen3_moe", "deepseek_v3"]
PROMPT, ROWS, SOME = 6, 8, 1.0


@cache
def checkpoints(family: str) -> tuple[Path, Path]:
    """A float8 checkpoint and one of what its values stand for; nobody may write to them."""

    def make(folder: Path) -> None:
        save_fp8(tiny_model(family), folder / "fp8", folder / "plain", BLOCKS[family])
        for part in ("fp8", "plain"):
            save_tokenizer(folder / part)

    folder = SHARED.folder(f"fp8-{family}", make)
    return folder / "fp8", folder / "plain"


def plain_model(family: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoints(family)[1], dtype=torch.float32).eval()


@cache
def flows() -> dict[str, tuple[Trace, LynxSelector]]:
    """Trace and selector of either checkpoint, as the commands make them on a CPU."""

    def make(folder: Path) -> None:
        for model in checkpoints("qwen3_moe"):
            flow = flow_in(folder / model.name)._replace(model=model, texts=tiny_flow().texts)
            options = CollectOptions(str(model), str(flow.trace), str(flow.texts), tokens=64 * LENGTH, length=LENGTH)
            collect(replace(options, dtype="float32"))
            train(train_options(flow, flow.selector, epochs=1, sensitivity_groups=1, dtype="float32"))

    folder = SHARED.folder("fp8-flows", make)
    return {
        part: (Trace.open(folder / part / "trace"), LynxSelector.from_pretrained(folder / part / "selector"))
        for part in ("fp8", "plain")
    }


# On a machine that does not multiply in float8.


@pytest.mark.parametrize(("family", "dtype"), [*((family, "float32") for family in BLOCKS), ("qwen3_moe", "bfloat16")])
def test_a_checkpoint_is_dequantized_as_a_whole_and_layer_by_layer(family: str, dtype: str) -> None:
    fp8, plain = (str(path) for path in checkpoints(family))
    loaded, wanted = (load_model(path, "cpu", dtype, tokenizer=False) for path in (fp8, plain))
    expected = dict(wanted.model.named_parameters())
    for name, value in loaded.model.named_parameters():
        assert value.dtype == getattr(torch, dtype), name
        assert torch.equal(value, expected[name]), name
    found, layers = StoredLayers(fp8, "cpu", dtype), find_moe_layers(loaded.model)
    assert found.dtype == layers[0].dtype
    assert found.trainable
    for index, layer in enumerate(layers):
        with found.layer(index) as own:
            state, there = own.block.state_dict(), layer.block.state_dict()
            apart = {f"experts.{name}" for name, _ in own.experts.named_parameters()}
            assert state.keys() == there.keys() > apart
            assert all(state[k].is_meta if k in apart else torch.equal(state[k], there[k]) for k in there)
            assert all(state[k].dtype == there[k].dtype for k in there)
            x = torch.randn(5, own.hidden_size, generator=torch.Generator().manual_seed(0)).to(own.dtype)
            for expert in range(own.num_experts):
                assert torch.equal(own.expert_output(expert, x), layer.expert_output(expert, x))
            assert identify([own]) == identify([layer])


def test_it_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    load_model(str(checkpoints("qwen3_moe")[0]), "cpu", "float32", tokenizer=False)
    assert capsys.readouterr().err.count("they are dequantized") == 1


def test_trace_and_selector_are_those_of_the_dequantized_checkpoint() -> None:
    (trace, selector), (other, wanted) = flows()["fp8"], flows()["plain"]
    assert trace.options.dtype == "float32"
    assert trace.options.identity == other.options.identity
    layers = [name for name in trace.sha256 if name.startswith("layer-")]
    assert len(layers) > 1
    assert {name: trace.sha256[name] for name in layers} == {name: other.sha256[name] for name in layers}
    state, there = selector.state_dict(), wanted.state_dict()
    assert all(torch.equal(state[name], there[name]) for name in there)


# With transformers' own FP8 modules.


def kl(base: Tensor, other: Tensor) -> float:
    """Nats per token."""
    p, q = base.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def test_a_selector_of_one_form_is_accepted_by_the_others() -> None:
    """Dequantized in float32 and bfloat16, and as it is stored."""
    fp8, _ = checkpoints("qwen3_moe")
    with native(fp8, dtype=torch.bfloat16) as stored:
        forms = [stored, *(load_model(str(fp8), "cpu", d, tokenizer=False).model for d in ("float32", "bfloat16"))]
        for model in (*forms, plain_model("qwen3_moe")):
            for _, selector in flows().values():
                selector.check(find_moe_layers(model), model)
        for model in forms:
            found = identify(find_moe_layers(model), model)
            assert differences(found, flows()["plain"][1].config.identity) == []
            assert found["experts"][0].keys() == {"gate_up_proj", "down_proj"}
            assert not [name for name in found["rest"] if "scale" in name and "as configured" not in name]
    other = plain_model("qwen3_moe")
    with native(fp8) as stored:  # what is compared are values, not codes: one scale that is another one is noticed
        stored.model.layers[1].mlp.experts.down_proj_scale_inv.data *= 1.05
        (said,) = differences(identify(find_moe_layers(other), other), identify(find_moe_layers(stored), stored))
    assert said.startswith("its experts (by ")


# Of products that are the same but for rounding, and of those where what enters is rounded to float8: how far apart hidden states
# are at most (relative), which share of assignments, and of decisions on them, is the same at least, and by how many nats at most
# what skipping loses is another.
LIMITS = {as_they_are: (1e-5, 1.0, 1.0, 1e-5), in_float8: (0.2, 0.9, 0.85, 0.05)}


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("enters", LIMITS, ids=lambda enters: enters.__name__)
@torch.no_grad()
def test_native_experts_collect_and_skip_as_dequantized_ones(family: str, enters: Rounding) -> None:
    apart, same, decided, loss = LIMITS[enters]
    plain, tokens = plain_model(family), words(ROWS, 14)
    layers, selector = find_moe_layers(plain), random_selector(plain)
    wanted, untouched = record(plain, layers, tokens), decode(plain, tokens, PROMPT)[1]
    with skip_experts(plain, selector.at_threshold(SOME)), watching(layers) as there:
        skipped = decode(plain, tokens, PROMPT)[1]
    with native(checkpoints(family)[0], enters) as model:
        own = find_moe_layers(model)
        assert all(type(layer.experts).__name__ == "FP8Experts" for layer in own)
        found, untouched_here = record(model, own, tokens), decode(model, tokens, PROMPT)[1]
        model.products.calls.clear()
        with skip_experts(model, selector.at_threshold(SOME)) as skipping, watching(own) as here:
            skipped_here = decode(model, tokens, PROMPT)[1]
    assert set(model.products.calls) == {"matmul", "grouped"}
    for one, other in zip(found, wanted, strict=True):
        assert one["hidden"].dtype == torch.float32
        assert (one["hidden"] - other["hidden"]).norm() <= apart * other["hidden"].norm()
        agree = one["indices"].sort().values == other["indices"].sort().values
        assert agree.float().mean() >= same
    for ours, theirs in zip(here.steps, there.steps, strict=True):
        assert enters is in_float8 or torch.equal(ours.indices, theirs.indices)
    kept, expected = (torch.stack([step.weights != 0 for step in steps]) for steps in (here.steps, there.steps))
    assert (kept == expected).float().mean() >= decided
    assert sum(skipping.stats.experts_after) < sum(skipping.stats.experts_before)
    assert kl(untouched, skipped) > 0.01
    assert abs(kl(untouched_here, skipped_here) - kl(untouched, skipped)) <= loss


@torch.no_grad()
def test_everything_is_in_the_type_of_activations(tmp_path: Path) -> None:
    fp8, plain = checkpoints("qwen3_moe")
    with native(fp8, dtype=torch.bfloat16) as model:
        layers = find_moe_layers(model)
        assert {layer.dtype for layer in layers} == {torch.bfloat16}
        assert LoadedLayers(LoadedModel(model, None, "local")).dtype == torch.bfloat16
        values = 3 * HIDDEN * 48
        assert layers[0].expert_bytes == values + 4 * values // 16**2
        loaded = LoadedModel(model, load_model(str(plain), "cpu", "float32").tokenizer, "local")
        options = CollectOptions(str(fp8), str(tmp_path), str(tiny_flow().texts), tokens=LENGTH, length=LENGTH)
        trace = collect(options, loaded)
        assert (trace.options.dtype, trace.options.expert_bytes) == ("bfloat16", layers[0].expert_bytes)
        (shard,) = trace.layer_shards(0)
        assert shard["hidden"].dtype == torch.bfloat16
        assert len(shard["hidden"].unique()) > HIDDEN * LENGTH // 8  # more values than 8 bits have
        ready = flows()["fp8"][1].at_threshold(SOME, kernel="torch")
        with skip_experts(model, ready):
            decode(model, words(2, 8), PROMPT)
        output = layers[0].expert_output(1, torch.randn(3, HIDDEN, dtype=torch.bfloat16))
        assert output.dtype == torch.bfloat16


@torch.no_grad()
def test_what_is_left_out_is_not_multiplied_with() -> None:
    with native(checkpoints("qwen3_moe")[0]) as model:
        layer = find_moe_layers(model)[0]
        hidden, weights, off = torch.randn(6, HIDDEN), torch.rand(6, TOP_K), torch.eye(6, TOP_K).bool()
        indices = torch.randint(0, EXPERTS - 1, (6, TOP_K))
        wanted = layer.experts(hidden, indices, weights.masked_fill(off, 0.0))
        layer.experts.down_proj_scale_inv.data[EXPERTS - 1] = math.nan
        with experts_by_distinct([layer]):
            found = layer.experts(hidden, indices.masked_fill(off, EXPERTS - 1), weights.masked_fill(off, 0.0))
            nothing = layer.experts(hidden, indices, torch.zeros_like(weights))
        torch.testing.assert_close(found, wanted)
        assert torch.equal(nothing, torch.zeros_like(hidden))


@pytest.mark.parametrize(
    ("given_", "used"), [("batched_mm", "lynx_grouped_mm"), ("grouped_mm", "lynx_grouped_mm"), ("eager", "eager")]
)
@torch.no_grad()
def test_implementations_are_put_back(given_: str, used: str) -> None:
    with native(checkpoints("qwen3_moe")[0]) as model:
        model.set_experts_implementation(given_)
        layers, ids = find_moe_layers(model), words(2, 6)
        before = model(input_ids=ids).logits
        with experts_by_distinct(layers):
            assert all(layer.experts.config._experts_implementation == used for layer in layers)
            torch.testing.assert_close(model(input_ids=ids).logits, before)
        assert torch.equal(model(input_ids=ids).logits, before)


# As vLLM reads it.


@pytest.mark.parametrize("family", NATIVE)
def test_a_checkpoint_is_known_as_it_is_read(family: str) -> None:
    plain, tensors = plain_model(family), load_file(checkpoints(family)[0] / "model.safetensors")
    known = identify(find_moe_layers(plain), plain)

    def seen(change: str = "", block: Any = (BLOCKS[family],) * 2) -> Passing:
        passing = Passing(EXPERTS, plain.config.num_hidden_layers, block)
        for name in sorted(tensors, key=lambda name: (name.endswith("_inv") == ("3" in name), name)):  # in any order
            passing.see(
                name, tensors[name] * (1.05 if change and change in name else 1.0) if "_inv" in name else tensors[name]
            )
        return passing

    found = seen()
    assert not found.waiting
    assert differences(known, found.identity()) == []
    assert [part.keys() for part in found.identity()["experts"]] == [part.keys() for part in known["experts"]]
    (said,) = differences(known, seen("experts.1.up_proj").identity())
    assert said.startswith("its experts (by ")
    (said,) = differences(known, seen("layers.1.self_attn.o_proj").identity())
    assert said.startswith("other weights (by ")
    unknown = seen(block=None)  # of another kind, whose scales are not known: nothing is kept for them
    assert not unknown.waiting
    assert not any(unknown.identity()["experts"])


# What is refused.


def refused(folder: Path, said: str, load: Any) -> None:
    with pytest.raises(ModelError, match=said) as error:
        load(str(folder))
    one_line(error)


def whole(folder: str) -> Any:
    return load_model(folder, "cpu", "float32", tokenizer=False)


def by_layer(folder: str) -> Any:
    return StoredLayers(folder, "cpu", "float32")


@pytest.mark.parametrize("rows", [24, 40])
def test_blocks_that_transformers_does_not_dequantize_rightly(rows: int, tmp_path: Path) -> None:
    """A last block that is smaller: an error (40 rows in 3 blocks of 16), or other values without a word (24 in 2 of 12)."""
    model = build(
        "Qwen3Moe",
        num_experts=EXPERTS,
        moe_intermediate_size=32,
        head_dim=rows,
        num_key_value_heads=1,
        norm_topk_prob=True,
    )
    save_fp8(model, tmp_path / "fp8", tmp_path / "plain", 16)
    refused(tmp_path / "fp8", rf"self_attn.k_proj.weight \({rows}, 32\) in blocks of 16 × 16, and transformers", whole)
    assert by_layer(str(tmp_path / "fp8")).names  # whose own blocks are whole
    model = tiny_model("qwen3_moe")
    save_fp8(model, tmp_path / "experts", tmp_path / "other", 32)
    refused(tmp_path / "experts", r"experts.0.down_proj.weight \(32, 48\) in blocks of 32 × 32", by_layer)


def test_a_transformers_that_cannot_load_them_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.16.1")
    for load in (whole, by_layer):
        refused(checkpoints("qwen3_moe")[0], "transformers 5.16.1 loads no checkpoint .+: install 5.17 or newer", load)


def test_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    fp8, _ = checkpoints("qwen3_moe")
    for name, change in {
        "awq": {"quant_method": "awq"},
        "fp8": {},
    }.items():
        shutil.copytree(fp8, tmp_path / name)
        config = json.loads((fp8 / "config.json").read_text())
        config["quantization_config"] |= change
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "awq", "is quantized: its layers cannot be read one by one", by_layer)
    refused(tmp_path / "fp8", "is quantized: experts are read from disk as they are", load_without_experts)
    with native(fp8) as model:
        experts = model.model.layers[0].mlp.experts
        for change, said in (
            ({"activation_scheme": "static"}, r"rounds what enters its experts by fixed scales"),
            ({"config": replace_dtype(experts.config)}, r"its configuration has no dtype"),
        ):
            with pytest.MonkeyPatch.context() as patch:
                for key, value in change.items():
                    patch.setattr(experts, key, value)
                with pytest.raises(ModelError, match=said) as error:
                    find_moe_layers(model)
                one_line(error)
        experts.down_proj = torch.nn.Parameter(experts.down_proj.view(torch.int8), requires_grad=False)
        with pytest.raises(ModelError, match="keeps its experts in float8_e4m3fn; what is known") as error:
            find_moe_layers(model)
        one_line(error)


def replace_dtype(config: Any) -> Any:
    other = type(config)(**config.to_dict())
    other.dtype = None
    return other


def test_tuning_needs_gradients(tmp_path: Path) -> None:
    fp8, _ = checkpoints("qwen3_moe")
    flow = flow_in(tmp_path)._replace(trace=flows()["fp8"][0].folder)
    with native(fp8) as model, pytest.raises(OptionError, match="through which no gradient goes") as error:
        train(train_options(flow, tmp_path / "out", tune_steps=1), LoadedModel(model, None, "local"))
    one_line(error)
    assert not (tmp_path / "out").exists()


# On a GPU that multiplies in float8, with the kernels from the Hub.


@pytest.mark.gpu
@pytest.mark.network
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device of compute capability 8.9 or higher")
@torch.no_grad()
def test_real_kernels_collect_and_skip_as_dequantized_experts(tmp_path: Path) -> None:
    pytest.importorskip("kernels", reason="needs the package kernels, which gets them from the Hub")
    model = build("Qwen3Moe", hidden_size=256, num_experts=EXPERTS, moe_intermediate_size=128, head_dim=64)
    save_fp8(model, tmp_path / "fp8", tmp_path / "plain", 128)
    found = load_model(str(tmp_path / "fp8"), "cuda", "bfloat16", tokenizer=False).model
    plain = load_model(str(tmp_path / "plain"), "cuda", "bfloat16", tokenizer=False).model
    layers, wanted = find_moe_layers(found), find_moe_layers(plain)
    assert type(layers[0].experts).__name__ == "FP8Experts"
    assert differences(identify(wanted, plain), identify(layers, found)) == []
    tokens = words(ROWS, 64).cuda()
    for one, other in zip(record(found, layers, tokens), record(plain, wanted, tokens), strict=True):
        assert one["hidden"].dtype == torch.bfloat16
        assert (one["hidden"] - other["hidden"]).norm() <= 0.2 * other["hidden"].norm()
    selector = random_selector(plain)
    with skip_experts(found, selector.at_threshold(SOME)) as skipping:
        logits = decode(found, tokens, PROMPT)[1]
    assert logits.isfinite().all()
    assert sum(skipping.stats.experts_after) < sum(skipping.stats.experts_before)
    layer, some = layers[0], torch.randint(0, EXPERTS, (6, TOP_K), device="cuda")
    hidden, weights = torch.randn(6, 256, device="cuda").bfloat16(), torch.rand(6, TOP_K, device="cuda").bfloat16()
    weights[0, 0] = 0.0
    expected = layer.experts(hidden, some, weights)
    with experts_by_distinct([layer]):
        torch.testing.assert_close(layer.experts(hidden, some, weights), expected, rtol=2e-2, atol=2e-2)
