"""Which type a model is loaded in, what is said of it, and what is refused: damaged and pickled weights, code beside them."""

import io
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import one_line, tiny_flow
from safetensors.torch import load_file, save_file
from tiny import decode, random_selector, tiny_model, words
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import core_model_loading as loader

from lynx_learn import LynxSelector, reference_moe, skip_experts
from lynx_learn.errors import ModelError, SelectorError
from lynx_learn.moe import loading as models


def on_a_cpu(monkeypatch: pytest.MonkeyPatch, architecture: str, capability: str, *features: str) -> None:
    found = {"architecture": architecture, **dict.fromkeys(("avx2", "avx512_bf16", "amx_bf16", "bf16"), False)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found | dict.fromkeys(features, True))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


@pytest.mark.parametrize(
    ("architecture", "capability", "features", "native"),
    [
        ("x86_64", "AVX2", ["avx2"], False),
        ("x86_64", "AVX512", ["avx2"], False),
        ("x86_64", "AVX512", ["avx512_bf16"], True),
        ("x86_64", "AVX512", ["amx_bf16"], True),
        # held back by ATEN_CPU_CAPABILITY
        ("x86_64", "AVX2", ["avx512_bf16"], False),
        ("aarch64", "DEFAULT", ["bf16"], True),
        ("aarch64", "DEFAULT", [], False),
    ],
)
def test_native_bfloat16(
    architecture: str, capability: str, features: list[str], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_cpu(monkeypatch, architecture, capability, *features)
    assert models.has_native_bfloat16() is native


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_what_runs_fast(
    native: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "has_native_bfloat16", lambda: native)
    model = models.load_model("reference-moe", "cpu").model
    said = [line for line in capsys.readouterr().err.splitlines() if " runs in " in line]
    assert next(model.parameters()).dtype == (torch.bfloat16 if native else torch.float32)
    assert len(said) == (0 if native else 1)
    assert all("--dtype bfloat16 keeps it" in line for line in said)
    assert next(models.load_model("reference-moe", "cpu", "bfloat16").model.parameters()).dtype == torch.bfloat16
    assert " runs in " not in capsys.readouterr().err


def test_auto_keeps_what_a_gpu_runs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "has_native_bfloat16", lambda: False)
    for stored in (torch.bfloat16, torch.float16, torch.float32):
        assert models.fast_dtype(stored, torch.device("cuda")) == stored
        assert models.fast_dtype(stored, torch.device("cpu")) == torch.float32


def test_a_folder_without_a_configuration_is_one_line(tmp_path: Path) -> None:
    shutil.copy(Path(reference_moe()) / "model.safetensors", tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        models.load_model(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_model_without_a_tokenizer_of_its_own_is_refused(tmp_path: Path) -> None:
    """Transformers makes up an empty one where there is none, and takes another model's without a word."""
    folder = tmp_path / "moe"
    shutil.copytree(reference_moe(), folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer") as error:
        models.load_model(str(folder), "cpu")
    assert "\n" not in str(error.value)
    assert models.load_model(str(folder), "cpu", tokenizer=False).tokenizer is None
    other = AutoTokenizer.from_pretrained(reference_moe())
    other.add_tokens(["a word more"])
    other.save_pretrained(folder)
    with pytest.raises(ModelError, match="is another model's: it has tokens up to 4096, the model knows 4096"):
        models.load_model(str(folder), "cpu")


@pytest.mark.parametrize("native", [True, False])
def test_attaching_to_emulated_products_warns_once_with_the_cure(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "has_native_bfloat16", lambda: native)
    selector = LynxSelector.from_pretrained("selectors/reference-moe")
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(reference_moe(), dtype=dtype)
        with warnings.catch_warnings(record=True) as seen, skip_experts(model, selector, 0.01):
            pass
        said = [str(warning.message) for warning in seen]
        assert len(said) == (0 if native or dtype == torch.float32 else 1)
        assert all("dtype=torch.float32" in text for text in said)


def as_from_the_hub(home: Path, commit: str) -> Path:
    """The reference MoE laid out as the Hub's cache holds a model."""
    repository = home / "hub" / "models--acme--moe"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in Path(reference_moe()).iterdir():
        if file.name != "training.json":
            (snapshot / file.name).symlink_to(file)
    return snapshot


def test_the_commit_that_was_loaded_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    first, later = "0123456789abcdef0123456789abcdef01234567", "f" * 40
    snapshot = as_from_the_hub(tmp_path, first)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert models.load_model("acme/moe", "cpu").revision == first
    assert models.load_model(str(snapshot), "cpu").revision == first
    # The main branch has moved on; what a selector names is still loaded.
    shutil.copytree(snapshot, snapshot.with_name(later), symlinks=True)
    (snapshot.parents[1] / "refs" / "main").write_text(later)
    assert models.load_model("acme/moe", "cpu").revision == later
    assert models.load_base(None, "acme/moe", first, "cpu", "auto").revision == first
    assert models.load_base("acme/moe", "other", first, "cpu", "auto").revision == later
    with pytest.raises(ModelError, match="'acme/other' cannot be loaded"):
        models.load_model("acme/other", "cpu")


@pytest.mark.parametrize("place", ["disk", "memory"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_weights_that_lie_elsewhere_are_run_and_compared_as_if_they_did_not(
    family: str, place: str, tmp_path: Path
) -> None:
    """accelerate brings a module's weights in when it runs; until then they are on the meta device."""
    import accelerate

    tokens = words(4, 12)
    plain = tiny_model(family)
    selector = random_selector(plain, thresholds={"kl": {"1": {"1": 1.0}}})
    with skip_experts(plain, selector, budget=1.0) as skipping:
        wanted = decode(plain, tokens, 6)[1]
    assert skipping.stats.experts_after < skipping.stats.experts_before
    moved = tiny_model(family)
    if place == "disk":
        accelerate.disk_offload(moved, tmp_path, execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(moved, execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in moved.parameters())
    with skip_experts(moved, selector, budget=1.0):
        assert torch.equal(decode(moved, tokens, 6)[1], wanted)
    other = random_selector(tiny_model(family), thresholds={"kl": {"1": {"1": 1.0}}})
    other.config.identity["experts"][1] = {
        name: [2 * number for number in own] for name, own in other.config.identity["experts"][1].items()
    }
    with pytest.raises(SelectorError, match="its experts"):
        skip_experts(moved, other, budget=1.0)


def test_the_larger_model_is_found_in_a_clone_and_elsewhere_the_error_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(reference_moe(), tmp_path / "elsewhere")
    monkeypatch.setattr(models, "files", lambda package: tmp_path / "site-packages" / package)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match="run this in a clone of it, or give the path of its folder data/reference-moe-50m"
    ):
        models.load_model("reference-moe-50m")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "data" / "reference-moe-50m")
    assert models.load_model("reference-moe-50m", tokenizer=False).model.config.model_type == "qwen3_moe"


# What is refused.


def test_a_damaged_model_is_one_line(tmp_path: Path) -> None:
    model = tmp_path / "model"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        shutil.copytree(tiny_flow().model, model)
        data = (model / name).read_bytes()
        (model / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ModelError, match="cannot be loaded") as error:
            models.load_model(str(model), "cpu")
        one_line(error)
        shutil.rmtree(model)


def test_why_a_model_cannot_be_loaded_is_said_in_words_that_help(tmp_path: Path) -> None:
    shutil.copytree(tiny_flow().model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "hidden_size": 10**8}))
    with pytest.raises(ModelError, match=r"\(its weights have other shapes than its config\.json says\)") as error:
        models.load_model(str(tmp_path / "model"), "cpu")
    one_line(error)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_flow().model, model)
    weights = models.load_model(str(tiny_flow().model), "cpu").model.state_dict()
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors") as error:
        models.load_model(str(model), "cpu")
    one_line(error)


def test_wrong_devices_and_dtypes_are_one_line() -> None:
    for options in ({"device": "gpu"}, {"dtype": "float64"}, {"device": "cpu:x"}):
        with pytest.raises(ModelError) as error:
            models.load_model(str(tiny_flow().model), **{"device": "cpu", **options})
        one_line(error)


def test_a_strangers_training_json_is_no_reason_to_stop(tmp_path: Path) -> None:
    for text, revision in (
        ('{"epochs": 3}', "local"),
        ("[]", "local"),
        ("{", "local"),
        ('{"tokens_seen": 7}', "7 tokens"),
    ):
        model = tmp_path / "model"
        shutil.copytree(tiny_flow().model, model)
        (model / "training.json").write_text(text)
        assert models.load_model(str(model), "cpu").revision == revision
        shutil.rmtree(model)


def with_code(folder: Path, model_type: str) -> Path:
    """The tiny model with Python code beside it that leaves a mark when it is run; returns the mark."""
    mark = folder.parent / "code-was-run"
    shutil.copytree(tiny_flow().model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type}
    config["auto_map"] = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM\n"
        f"class Config(Qwen3MoeConfig):\n    model_type = {model_type!r}\n"
        "class Model(Qwen3MoeForCausalLM):\n    config_class = Config\n"
    )
    return mark


def test_a_model_with_its_own_code_is_refused(tmp_path: Path) -> None:
    mark = with_code(tmp_path / "model", "someones_moe")
    with pytest.raises(ModelError, match="custom code") as error:
        models.load_model(str(tmp_path / "model"), "cpu")
    one_line(error)
    assert not mark.exists()


def test_code_beside_a_model_that_transformers_knows_is_not_run(tmp_path: Path) -> None:
    mark = with_code(tmp_path / "model", "qwen3_moe")
    model = models.load_model(str(tmp_path / "model"), "cpu").model
    assert type(model).__module__.startswith("transformers.models.qwen3_moe")
    assert not mark.exists()


def test_nobody_is_asked_whether_to_run_a_models_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal transformers asks, unless told; a `y` typed ahead must not run a stranger's code."""
    mark = with_code(tmp_path / "model", "someones_moe")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 4))
    with pytest.raises(ModelError, match="custom code"):
        models.load_model(str(tmp_path / "model"), "cpu")
    assert not mark.exists()
    assert "Do you wish to run" not in capsys.readouterr().out


def test_a_model_with_weights_missing_is_refused(tmp_path: Path) -> None:
    """Transformers would fill the gap with random weights and a warning."""
    model = tmp_path / "model"
    shutil.copytree(tiny_flow().model, model)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.gate.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights \(model\.layers\.1\.mlp\.gate\.weight") as error:
        models.load_model(str(model), "cpu")
    one_line(error)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c"])
def test_a_path_that_is_not_there_is_told_as_one(name: str) -> None:
    with pytest.raises(ModelError, match="there is no such folder") as caught:
        models.load_model(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(SelectorError, match=r"no such folder.*`lynx-learn train`"):
        LynxSelector.from_pretrained(name)


@pytest.mark.parametrize(("dtype", "ahead"), [("auto", True), ("bfloat16", False)])
def test_what_is_cast_is_not_read_ahead(dtype: str, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a second copy of the model would wait in memory for the first one."""
    pools = []

    class Counted(loader.ThreadPoolExecutor):  # type: ignore[name-defined]
        def __init__(self, *given: Any, **more: Any) -> None:
            pools.append(self)
            super().__init__(*given, **more)

    monkeypatch.setattr(loader, "ThreadPoolExecutor", Counted)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "0")
    models.load_model(str(tiny_flow().model), "cpu", dtype)
    assert bool(pools) == ahead
    assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "0"
