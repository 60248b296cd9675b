"""Blocks: one read alone is the block of the model that transformers loads, for every family."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from flows import one_line, tiny_flow
from zoo import ZOO, WithHead, build

from lynx_learn.checkpoint.blocks import LoadedLayers, StoredLayer, StoredLayers
from lynx_learn.errors import ModelError
from lynx_learn.moe.identity import identify
from lynx_learn.moe.loading import LoadedModel

NAMES = [name for name, kind in ZOO.items() if not kind.reason]


def saved(name: str, folder: Path) -> Any:
    """The model's checkpoint in several files, and the model as transformers loads it."""
    model = build(ZOO[name])
    if isinstance(model, WithHead):
        pytest.skip("transformers has no causal language model of this kind alone")
    model.save_pretrained(folder, max_shard_size="40KB")
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except ValueError:
        pytest.skip("transformers does not load it as a causal language model")


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_those_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    whole = LoadedLayers(LoadedModel(model, None, "local"))
    found = StoredLayers(str(tmp_path), "cpu", "float32")
    assert found.names == whole.names
    assert found.dtype == whole.dtype
    alone = 0
    for index, expected in enumerate(whole.layers):
        with found.layer(index) as layer:
            wanted = {**dict(expected.block.named_parameters()), **dict(expected.block.named_buffers())}
            held = {**dict(layer.block.named_parameters()), **dict(layer.block.named_buffers())}
            assert held.keys() == wanted.keys()
            apart = {id(value) for value in layer.experts.parameters()} if isinstance(layer, StoredLayer) else set()
            alone += bool(apart)
            for key, value in wanted.items():
                assert held[key].is_meta if id(held[key]) in apart else torch.equal(held[key], value), key
                assert held[key].dtype == value.dtype
            assert identify([layer]) == identify([expected])
            assert (layer.top_k, layer.hidden_size, layer.num_experts) == (
                expected.top_k,
                expected.hidden_size,
                expected.num_experts,
            )
            x = torch.randn(5, layer.hidden_size, generator=torch.Generator().manual_seed(0))
            for expert in (1, layer.num_experts - 1, 0):
                assert torch.equal(layer.expert_output(expert, x), expected.expert_output(expert, x))
            others = [key for key, value in found.model.named_parameters() if not value.is_meta]
            assert all(key.startswith(layer.name) for key in others)
        assert all(value.is_meta for value in found.model.parameters())
    assert alone == len(whole.layers)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    flow = tiny_flow()
    for name, damage in {
        "empty": lambda folder: (folder / "model.safetensors").unlink(),
        "cut": lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"),
        "quantized": lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace("{", '{"quantization_config": {"quant_method": "awq"},', 1)
        ),
    }.items():
        shutil.copytree(flow.model, tmp_path / name)
        damage(tmp_path / name)
        with pytest.raises(ModelError) as error:
            StoredLayers(str(tmp_path / name), "cpu", "float32")
        assert name != "quantized" or "is quantized" in str(error.value)
        one_line(error)
    with pytest.raises(ModelError) as error:
        StoredLayers(str(tmp_path / "nowhere"), "cpu", "float32")
    one_line(error)
