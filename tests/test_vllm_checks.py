"""Engines and models that are refused by their configuration, and what the refusal says."""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import HIDDEN, random_selector, tiny_model
from vllm_stand_ins import CUDAGraphMode, engine_config, model_config

from lynx_learn.integrations.vllm.checks import prepare as vllm_prepare
from lynx_learn.integrations.vllm.checks import reasons as vllm_reasons
from lynx_learn.integrations.vllm.checks.mending import make_again, without
from lynx_learn.integrations.vllm.checks.prepare import prepare
from lynx_learn.integrations.vllm.checks.reasons import SPECULATIONS, audit_reasons, engine_reasons, model_reasons
from lynx_learn.integrations.vllm.settings import Settings, UnsupportedError

QUANTIZED = SimpleNamespace(quantization_config={})
COMPILED = {"mode": 3, "cudagraph_mode": CUDAGraphMode.FULL}


def speculation(method: str, enable_adaptive_verification: bool = False) -> Any:
    return SimpleNamespace(method=method, enable_adaptive_verification=enable_adaptive_verification)


@pytest.mark.parametrize(
    ("changes", "line", "options"),
    [
        (
            {"cudagraph_mode": CUDAGraphMode.FULL},
            "CUDA graphs was never tried on a GPU",
            {"compilation_config.cudagraph_mode": CUDAGraphMode.NONE},
        ),
        (
            {"speculative_config": speculation("eagle3")},
            "speculative decoding with eagle3 was never tried: take ngram or draft_model",
            {"speculative_config": None},
        ),
        (
            {"speculative_config": speculation("draft_model", enable_adaptive_verification=True)},
            "with adaptive verification was never tried",
            {"speculative_config": None},
        ),
        ({"lora_config": object()}, "LoRA", {"enable_lora": False}),
        (
            {"pipeline_parallel_size": 2, "tensor_parallel_size": 4},
            "pipeline parallelism is not supported",
            {"pipeline_parallel_size": 1, "tensor_parallel_size": 8},
        ),
        ({"data_parallel_size": 2}, "data parallelism is not supported", {"data_parallel_size": 1}),
        (
            {"decode_context_parallel_size": 2},
            "context parallelism is not supported",
            {"decode_context_parallel_size": 1},
        ),
        ({"use_ubatching": True}, "micro-batches", {"enable_dbo": False}),
        ({"enable_eplb": True}, "load balancing", {"enable_eplb": False}),
    ],
)
def test_engines_refused(changes: dict[str, Any], line: str, options: dict[str, Any]) -> None:
    assert engine_reasons(engine_config(mode=3)) == []
    for known in SPECULATIONS:
        assert engine_reasons(engine_config(speculative_config=speculation(known))) == []
    (reason,) = engine_reasons(engine_config(**changes))
    assert line in reason.text
    assert reason.options == options


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"get_num_experts": lambda: 0}, "Qwen3MoeForCausalLM has no MoE layer"),
        ({"get_num_experts": lambda: 7}, f"has 7 of width {HIDDEN}: load the model it was trained for"),
        ({"get_hidden_size": lambda: 7}, "of width 7: load the model it was trained for"),
        ({"quantization": "fp8"}, "is quantized (fp8) as tiny was not when the budget was measured"),
        (
            {"quantization": "awq", "hf_config": QUANTIZED, "model": "/models--some--Tiny-AWQ/snapshots/1"},
            "(awq) as tiny",
        ),
        ({"using_transformers_backend": lambda: True}, "leave --model-impl out"),
        ({"runner_type": "pooling"}, "generates no text token by token"),
        ({"is_diffusion": True}, "generates no text token by token"),
    ],
)
def test_models_refused(changes: dict[str, Any], line: str) -> None:
    own = random_selector(tiny_model("qwen3_moe")).config
    assert model_reasons(model_config(), own) == []
    (reason,) = model_reasons(model_config(**changes), own)
    assert line in reason.text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_config": model_config(has_inner_state=True)}, "recurrent state would advance twice"),
        ({"kv_transfer_config": object()}, "KV connector would save"),
        ({"use_v2_model_runner": True, "cudagraph_mode": CUDAGraphMode.FULL}, "a whole CUDA graph of model runner V2"),
    ],
)
def test_what_cannot_be_audited(changes: dict[str, Any], line: str) -> None:
    """Turned off where it was turned on."""
    plain = {"model_config": model_config()}
    audited, given = Settings("x", 0.01, audit_every=3), {"lynx": {"audit_every": 3, "budget": 0.01}}
    assert audit_reasons(engine_config(**{**plain, **changes}), Settings("x", 0.01)) == []
    assert audit_reasons(engine_config(**plain), audited) == []
    (reason,) = audit_reasons(engine_config(**{**plain, **changes}), audited)
    assert line in reason.text
    assert reason.environment == {"LYNX_AUDIT_EVERY": "0"}
    (reason,) = audit_reasons(engine_config(**{**plain, **changes}, additional_config=given), audited)
    assert reason.options == {"additional_config": {"lynx": {"audit_every": 0, "budget": 0.01}}}


def test_an_audit_that_cannot_be_is_among_the_reasons(selector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYNX_AUDIT_EVERY", "64")
    with pytest.raises(UnsupportedError, match=r"(?s)recurrent state.+this works:\nLYNX_AUDIT_EVERY=0 python …"):
        prepared(Arguments(enforce_eager=True, inner_state=True))
    monkeypatch.setenv("LYNX_AUDIT_EVERY", "0")
    prepared(Arguments(enforce_eager=True, inner_state=True))


def test_a_checkpoint_that_is_quantized_itself_may_be_the_selectors() -> None:
    own = random_selector(tiny_model("qwen3_moe")).config
    assert model_reasons(model_config(quantization="mxfp4", hf_config=QUANTIZED), own) == []


@dataclass
class Compilation:
    """As much of the part of vLLM's arguments that speaks of graphs."""

    cudagraph_mode: CUDAGraphMode = CUDAGraphMode.FULL
    backend: str = "inductor"


@dataclass
class Arguments:
    """As much of vLLM's arguments as these tests change; LoRA keeps it from using graphs."""

    compilation_config: Compilation = field(default_factory=lambda: Compilation(backend="own"))
    additional_config: Mapping[str, Any] | None = None
    enforce_eager: bool = False
    enable_lora: bool = False
    max_lora_rank: int = 16
    pipeline_parallel_size: int = 1
    tensor_parallel_size: int = 1
    inner_state: bool = False

    def make(self) -> Any:
        assert self.compilation_config.backend == "own"
        graphs = bool(self.compilation_config.cudagraph_mode) and not self.enforce_eager
        return engine_config(
            additional_config=self.additional_config or {},
            lora_config=self.max_lora_rank if self.enable_lora else None,
            pipeline_parallel_size=self.pipeline_parallel_size,
            tensor_parallel_size=self.tensor_parallel_size,
            model_config=model_config(has_inner_state=self.inner_state),
            **(COMPILED if graphs and not self.enable_lora else {}),
        )


@pytest.fixture
def selector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Calibrated for 0.01 and 0.03, and asked for in the environment."""
    own = random_selector(tiny_model("qwen3_moe"))
    own.config = replace(own.config, thresholds={"kl": {"0.01": {"1": 1.0}, "0.03": {"1": 2.0}}})
    own.save_pretrained(tmp_path / "selector")
    for name in [name for name in os.environ if name.startswith("LYNX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LYNX_SELECTOR", str(tmp_path / "selector"))
    monkeypatch.setenv("LYNX_BUDGET", "0.01")
    monkeypatch.setattr(vllm_reasons, "engine_version", lambda: "0.32.0")
    return tmp_path / "selector"


def prepared(args: Arguments) -> Any:
    """As the plugin does with what the first process is given."""
    again = make_again(Arguments.make, args)
    config = args.make()
    prepare(config, again)
    return config


def test_settings_of_the_environment_are_put_into_the_configuration(selector: Path) -> None:
    own = prepared(Arguments(enforce_eager=True, additional_config={"other": 1})).additional_config
    asked = {"budget": 0.01, "on_unsupported": "fail", "reuse_generated": False, "audit_every": 0}
    assert own == {"other": 1, "lynx": {"selector": str(selector), **asked}}


def test_nothing_is_touched_when_nothing_is_asked_for(selector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LYNX_SELECTOR")
    monkeypatch.delenv("LYNX_BUDGET")
    assert prepared(Arguments(enable_lora=True)).additional_config == {}


def test_all_reasons_at_once(selector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one that shows only when others are mended; and the last line mends them all."""
    monkeypatch.setenv("LYNX_BUDGET", "0.02")
    with pytest.raises(UnsupportedError) as raised:
        prepared(Arguments(enable_lora=True, pipeline_parallel_size=2, tensor_parallel_size=2))
    lines = str(raised.value).splitlines()
    assert lines[0] == "skipping cannot act here, for 4 reasons:"
    assert [line.split(" ")[0] for line in lines[1:5]] == ["1.", "2.", "3.", "4."]
    told = "\n".join(lines)
    for part in ("not calibrated for a budget of 0.02", "LoRA", "pipeline parallelism", "CUDA graphs"):
        assert part in told
    assert lines[5:] == [
        "this works:",
        "LYNX_BUDGET=0.01 LLM(…, enable_lora=False, pipeline_parallel_size=1, tensor_parallel_size=4, compilation_config={'cudagraph_mode': 'NONE'})",
    ]


def test_what_traces_cannot_be_collected_from() -> None:
    asked = {"lynx": {"record": ["model.layers.0.mlp"]}}
    prepare(engine_config(additional_config=asked, model_config=model_config()), lambda *_: None)
    plain = {"mode": 3, "use_v2_model_runner": True}
    other = engine_config(additional_config=asked, model_config=model_config(quantization="fp8"), **plain)
    line = r"compiled graphs .+; .+ model runner V2.+; vLLM runs this model quantized \(fp8\)"
    with pytest.raises(UnsupportedError, match=line):
        prepare(other, lambda *_: None)


def test_what_no_option_mends_is_not_said_to_work(selector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYNX_SELECTOR", "nowhere")
    with pytest.raises(UnsupportedError, match=r"(?s)'nowhere' is neither.+with what an option can mend:\nLLM"):
        prepared(Arguments())
    monkeypatch.setenv("LYNX_SELECTOR", str(selector))
    monkeypatch.setattr(vllm_reasons, "engine_version", lambda: "0.33.0")
    with pytest.raises(UnsupportedError) as raised:
        prepared(Arguments())
    line = "vLLM 0.33.0 is not supported: install 0.32.x (or set LYNX_ON_UNSUPPORTED=warn to serve untouched)"
    assert str(raised.value) == line


def test_a_budget_in_the_additional_config_is_mended_there(selector: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"LLM\(…, additional_config=\{'lynx': \{'budget': 0.03\}\}\)$"):
        prepared(Arguments(enforce_eager=True, additional_config={"lynx": {"budget": 5}}))


def test_warned_and_served_untouched(selector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are told so, but a mistake in the settings is refused all the same."""
    warned: list[str] = []
    monkeypatch.setattr(vllm_prepare, "warn", warned.append)
    monkeypatch.setenv("LYNX_ON_UNSUPPORTED", "warn")
    assert prepared(Arguments()).additional_config["lynx"]["budget"] == 0
    assert len(warned) == 1
    assert "CUDA graphs" in warned[0]
    monkeypatch.setenv("LYNX_BUDGET", "many")
    with pytest.raises(UnsupportedError, match="LYNX_BUDGET=many"):
        prepared(Arguments())


def test_the_command_is_the_users_own(
    selector: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compilation-config", "-cc")
    parser.add_argument("--enable-lora", action=argparse.BooleanOptionalAction)
    parser.add_argument("--lora-modules", nargs="+")
    parser.add_argument("--model")
    named = SimpleNamespace(make_arg_parser=lambda _: parser)
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.launchers.cli_args", named)  # type: ignore[arg-type]
    flexible = SimpleNamespace(FlexibleArgumentParser=lambda: None)
    monkeypatch.setitem(sys.modules, "vllm.utils.argparse_utils", flexible)  # type: ignore[arg-type]
    words = ["/bin/python", "/bin/vllm", "serve", "--model", "a b", "--enable_lora", "--lora-modules", "x=y", "z=w"]
    monkeypatch.setattr(sys, "orig_argv", words)
    with pytest.raises(UnsupportedError) as raised:
        prepared(Arguments(enable_lora=True))
    assert str(raised.value).splitlines()[-1] == "vllm serve --model 'a b' --compilation-config.cudagraph_mode NONE"
    monkeypatch.setattr(sys, "orig_argv", ["python", "vllm", "serve", "-cc.backend=own"])
    with pytest.raises(UnsupportedError) as raised:
        prepared(Arguments())
    assert str(raised.value).splitlines()[-1] == "vllm serve -cc.backend=own -cc.cudagraph_mode NONE"
    monkeypatch.setattr(sys, "orig_argv", ["python", "vllm", "serve", "--config", "x.yaml"])
    with pytest.raises(UnsupportedError) as raised:  # what a file says, no option takes back
        prepared(Arguments(enable_lora=True))
    assert "serve" not in str(raised.value).splitlines()[-1].partition("to serve untouched")[2]


def test_options_are_left_out_however_they_are_written() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--some-config", "-sc")
    parser.add_argument("--flag", action=argparse.BooleanOptionalAction)
    parser.add_argument("--many", nargs="*")
    given = ["x", "--some-config", "1", "-a", "1", "--some_config=2", "-sc.b.c", "3", "--flag", "y", "--no-flag"]
    kept = without([*given, "--many", "1", "2", "3", "--manual", "4"], parser._actions)
    assert kept == ["x", "-a", "1", "y", "--manual", "4"]
