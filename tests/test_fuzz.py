"""Whatever stands in the files that people bring: an answer or one clear line, and nothing half-written.

A few dozen inputs each; `FUZZ_INPUTS=8000` tries more: some minutes, and for configuration files, which run a command each, hours.
"""

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from flows import contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_format import OPTIONS, content, write
from texts import Bytes
from tiny import random_selector, tiny_model

from lynx_learn.cli import main
from lynx_learn.errors import LynxError
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.traces.corpus import read_sequences
from lynx_learn.traces.documents import SUFFIXES, read_documents
from lynx_learn.traces.format import Trace

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_INPUTS", "30")),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def refused_or(act: Callable[[], object]) -> None:
    """It works, or the reason is one line."""
    said = "-"
    try:
        act()
    except LynxError as error:
        said = str(error)
    assert said
    assert "\n" not in said


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with some of them changed, left out, doubled or put in."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.sampled_from([0, 1, 8, 1000])))
        data = data[:at] + draw(st.sampled_from([b"", data[at:end] * 2]) | st.binary(max_size=9)) + data[end:]
    return data


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """JSON with one value somewhere in it replaced, dropped or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: draw(edited(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(edited(value[at])), *value[at + 1 :]]
    if isinstance(value, dict) and value and draw(st.booleans()):
        gone = draw(st.sampled_from(sorted(value)))
        return {key: part for key, part in value.items() if key != gone}
    large = st.sampled_from([0, -1, 2**31, 10**12, 10**30, 1e308, float("nan"), float("inf"), "", [], {}])
    return draw(JSON | large)


@pytest.fixture(scope="module")
def selector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "selector"
    thresholds = {"kl": {"0.1": {"1": 0.5, "4": 1.0}}}
    random_selector(tiny_model("qwen3_moe"), rank=2, thresholds=thresholds).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "trace"
    write(folder, OPTIONS, content(OPTIONS))
    return folder


LINES = st.lists(st.builds(json.dumps, JSON | st.fixed_dictionaries({"text": st.text() | st.none()})), max_size=8)


@fuzz
@given(
    data=st.binary(max_size=200) | LINES.map(lambda lines: "\n".join(lines).encode()) | st.text().map(str.encode),
    suffix=st.sampled_from(SUFFIXES),
    packed=st.booleans(),
    length=st.integers(1, 40),
)
def test_corpus_files(data: bytes, suffix: str, packed: bool, length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"a{suffix}"
        file.write_bytes(gzip.compress(data) if packed and suffix.endswith(".gz") else data)
        for corpus in (folder, str(file)):
            refused_or(lambda corpus=corpus: list(read_documents(corpus)))  # type: ignore[misc]
            refused_or(lambda corpus=corpus: list(read_sequences(corpus, Bytes((257,)), length, "fit")))  # type: ignore[misc]
        assert [path.name for path in Path(folder).iterdir()] == [file.name]


@fuzz
@given(data=st.data())
def test_selector_files(data: st.DataObject, selector: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "s"
        shutil.copytree(selector, folder)
        which = data.draw(st.sampled_from(["values", "config.json", "selector.safetensors"]))
        if which == "values":
            values = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(data.draw(edited(values))))
        else:
            (folder / which).write_bytes(data.draw(damaged((folder / which).read_bytes())))
        before = contents(folder)
        refused_or(lambda: LynxSelector.from_pretrained(folder).policy(0.1))
        assert contents(folder) == before


@fuzz
@given(data=st.data())
def test_trace_files(data: st.DataObject, trace: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "t"
        shutil.copytree(trace, folder)
        which = data.draw(
            st.sampled_from(["values", "manifest.json", "index/00000.safetensors", "layer-00/00001.safetensors"])
        )
        if which == "values":
            values = json.loads((folder / "manifest.json").read_text())
            (folder / "manifest.json").write_text(json.dumps(data.draw(edited(values))))
        else:
            (folder / which).write_bytes(data.draw(damaged((folder / which).read_bytes())))
        before = contents(folder)

        def read() -> None:
            opened = Trace.open(folder)
            opened.index()
            for layer in range(len(opened.options.layers)):
                list(opened.layer_shards(layer))

        refused_or(read)
        assert contents(folder) == before


COMMANDS = {
    "collect": {"model": "no/model", "out": "out", "tokens": 100, "mode": "teacher", "length": 32, "bos": "auto"},
    "train": {"trace": "no-trace", "out": "out", "surrogate_share": 0.1, "scorer": "mlp", "tune_batch_sizes": [8, 16]},
    "calibrate": {"selector": "no-selector", "budgets": [0.01], "batch_sizes": [1, 8], "confidence": 0.9},
    "evaluate": {"selector": "no-selector", "out": "out", "methods": ["random"], "batches": ["mixed", "single:16"]},
    "coverage": {"selector": "no-selector", "out": "out", "shift": {"calibrate": ["a"], "test": ["b"]}},
    "bench": {"out": "out", "model": "no/model", "fraction": 0.5, "batch_sizes": [16], "dtypes": ["auto"]},
}


@fuzz
@given(data=st.data(), command=st.sampled_from(sorted(COMMANDS)))
def test_configuration_files(data: st.DataObject, command: str) -> None:
    text = yaml.safe_dump(COMMANDS[command]).encode()
    whole = data.draw(damaged(text) | edited(COMMANDS[command]).map(lambda value: yaml.safe_dump(value).encode()))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        Path("run.yaml").write_bytes(whole)
        try:
            # Without it in the file these would take the reference MoE, and run.
            model = ["--model", "no/model"] if "model" in COMMANDS[command] else []
            status = main([command, "--config", "run.yaml", *model])
        except SystemExit as ended:  # --help and its like, as a key of the file
            status = int(ended.code or 0)
        assert status in (0, 2)
        assert [path for path in Path(folder).rglob("*") if path.is_file()] == [Path(folder) / "run.yaml"]
