"""The export command: a checked file or none, its times, and what is refused."""

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from graph_cases import (
    LAYERS,
    MLP,
    ask,
    batch,
    changed,
    content,
    onnxruntime,
    runner_of,
    selector_of,
)

from lynx_learn.cli import main
from lynx_learn.errors import OptionError
from lynx_learn.graph import export as export_module
from lynx_learn.graph.export import ExportOptions, export
from lynx_learn.graph.onnx_runtime import NAMES, OnnxSelector
from lynx_learn.graph.times import time_layers

# The command.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved selector."""
    selector_of(MLP).save_pretrained(tmp_path / "selector")
    return tmp_path / "selector"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, which must fail with one line; returns it."""

    def refused(*words: object) -> str:
        capsys.readouterr()
        assert main(["export", *map(str, words)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1, lines
        return lines[0]

    return refused


def uncompiled(*_: object, **__: object) -> None:
    raise RuntimeError("no compiler\nis here")


def test_command_writes_a_checked_file_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(export_module, "time_layers", functools.partial(time_layers, rounds=30))
    words = ["--time-tokens", "16", "--report", str(folder.parent / "report.json")]
    assert main(["export", "--selector", str(folder), *words]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"lynx-learn export: .+ in all\n", err)
    file = folder / "selector.onnx"
    said = " ".join(out.split())
    assert f"{file}: " in out.replace("\n", "")
    assert "checked with onnxruntime on CPUExecutionProvider" in said
    assert "costs differ by at most" in said
    assert "0 of 72 differ" in said
    assert "torch.compile is not usable here: no compiler" in out
    found = json.loads((folder.parent / "report.json").read_text())
    assert found["parity"]["layers"] == LAYERS
    assert 0 < found["parity"]["relative"] < 1e-4
    assert found["versions"]["onnxruntime"] == onnxruntime.__version__
    times = found["times"]["microseconds"]
    assert times["compiled"] is None
    for name in ("eager", "onnxruntime", "bound", "runner"):
        assert 0 < times[name]["low"] <= times[name]["median"] <= times[name]["high"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "selector.onnx", "selector.safetensors"]
    answers = [ask(runner, 1, batch(MLP, 1, 20), 1.0) for runner in (OnnxSelector(file), runner_of(MLP))]
    assert all(np.array_equal(x, y) for x, y in zip(*answers, strict=True))


def test_a_graph_that_decides_otherwise_is_not_written(
    folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "selector.onnx").write_bytes(b"the one before")
    changed().save_pretrained(folder)
    monkeypatch.setattr(export_module, "to_bytes", lambda selector: content(MLP))
    message = refused("--selector", folder)
    assert "does not compute what PyTorch does (costs of layer 2" in message
    assert (folder / "selector.onnx").read_bytes() == b"the one before"
    assert len(list(folder.iterdir())) == 3


def test_cuda_asked_for_without_one(folder: Path, refused: Callable[..., str]) -> None:
    if NAMES["cuda"] in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built with CUDA")
    (folder / "selector.onnx").write_bytes(b"the one before")
    assert "provider cuda is not usable" in refused("--selector", folder, "--provider", "cuda")
    assert (folder / "selector.onnx").read_bytes() == b"the one before"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_packages_that_are_not_installed(
    package: str, folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = refused("--selector", folder)
    assert f"{package} is not installed" in message
    assert "pip install 'lynx-learn[onnx]'" in message
    assert not (folder / "selector.onnx").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--format", "tflite"], "--format tflite is not usable: expected one of onnx"),
        (["--provider", "tpu"], "--provider tpu is not usable: expected one of cpu, cuda"),
        (["--time-tokens", "-1"], "--time-tokens -1 "),
    ],
)
def test_bad_words(words: list[str], reason: str, folder: Path, refused: Callable[..., str]) -> None:
    assert reason in refused("--selector", folder, *words)


def test_without_a_folder_the_file_must_be_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lynx_learn.selector.selector._download", lambda name, revision: folder)
    with pytest.raises(OptionError, match="--out is missing: some/one is no folder here"):
        export(ExportOptions("some/one"))
