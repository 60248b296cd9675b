"""`inspect`: a row for each MoE block, a line for each way of routing, and models that cannot be acted on."""

import re
from pathlib import Path

import pytest
import torch
from flows import EXPERTS, HIDDEN, save_model, save_tokenizer, tiny_flow
from tiny import build

from lynx_learn.errors import ModelError
from lynx_learn.inspection import InspectOptions, inspect_model


def test_the_blocks_of_a_model_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_flow().model
    found = inspect_model(InspectOptions(str(model), device="cpu", dtype="float32"))
    out = capsys.readouterr().out
    assert (found["model_type"], found["layers"]) == ("qwen3_moe", 2)
    # An expert has three matrices of 32 by 48, four bytes a number.
    size = f"{3 * HIDDEN * 48 * 4 / 1e6:.2f} MB"
    for block in ("model.layers.0.mlp", "model.layers.1.mlp"):
        assert re.search(rf"^{block} +2 of {EXPERTS} +{HIDDEN} +{size} *$", out, re.MULTILINE)
    assert re.search(r"^2 routers \w+: .*top-2, softmax, normalised", out, re.MULTILINE)
    assert out.splitlines()[-1] == f"revision {found['revision']}"


def test_bytes_follow_the_precision(capsys: pytest.CaptureFixture[str]) -> None:
    inspect_model(InspectOptions(str(tiny_flow().model), device="cpu", dtype="bfloat16"))
    assert capsys.readouterr().out.count(f"{3 * HIDDEN * 48 * 2 / 1e6:.2f} MB") == 2


def test_layers_that_route_alike_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Another shape, three layers of which the first is dense."""
    folder = save_model(tmp_path / "model", num_hidden_layers=3, mlp_only_layers=[0], num_experts_per_tok=3)
    assert inspect_model(InspectOptions(str(folder), device="cpu"))["layers"] == 2
    out = capsys.readouterr().out
    assert "model.layers.0" not in out
    assert out.count(f"3 of {EXPERTS}") == 2
    assert len(re.findall(r"^\d routers .*top-3", out, re.MULTILINE)) == 1


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    build("Qwen3", intermediate_size=48, head_dim=16, dtype=torch.float32).save_pretrained(folder)
    save_tokenizer(folder)
    with pytest.raises(ModelError, match="has no Mixture-of-Experts block"):
        inspect_model(InspectOptions(str(folder), device="cpu"))
