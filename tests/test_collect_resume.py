"""A collecting run that was stopped, or begun with something else: it ends with the same bytes, or is refused and loses nothing."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from collect_cases import LENGTH, choices, digests, environment, save_model, tiny, undisturbed
from flows import one_line

from lynx_learn.errors import OptionError, TraceError
from lynx_learn.traces.collect import collect
from lynx_learn.traces.format import Trace

COLLECT = (
    "import json, sys\nfrom lynx_learn.traces.collect import *\ncollect(CollectOptions(**json.loads(sys.argv[1])))"
)

# Before it: killed when the 17th file is about to be put in its place.
KILLED = """
import itertools, os, signal
count, replaced = itertools.count(), os.replace
def killed(*names, **more):
    if next(count) == 16:
        os.kill(os.getpid(), signal.SIGKILL)
    replaced(*names, **more)
os.replace = killed
"""


def test_killed_and_interrupted_runs_end_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two files of a shard, then interrupted between two others, each of which is put in its place."""
    out, other = tmp_path / "stopped", tmp_path / "undisturbed"
    options = choices(out, mode="generate", batch_size=1, tokens=12 * LENGTH)
    command = [sys.executable, "-c", KILLED + COLLECT, json.dumps(asdict(options))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(out.rglob(".*.part"))
    there = len(list(out.glob("index/*.safetensors")))
    assert 2 < there < 8
    count, replaced = itertools.count(), os.replace

    def interrupted(*names: Any, **more: Any) -> None:
        if next(count) == 7:
            raise KeyboardInterrupt
        replaced(*names, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect(options)
    assert not list(out.rglob(".*.part"))
    with pytest.raises(TraceError, match="not complete"):
        Trace.open(out)
    assert there < len(list(out.glob("index/*.safetensors"))) < 12
    collect(options)
    collect(replace(options, out=str(other)))
    assert digests(out) == digests(other)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _zeros(file: Path) -> None:
    """As some file systems leave a file after a power failure: the right length, no content at the end."""
    data = file.read_bytes()
    file.write_bytes(data[:-64] + bytes(64))


DAMAGES: list[Callable[[Path], None]] = [_cut, _empty, _zeros, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=["cut", "empty", "zeros", "gone"])
@pytest.mark.parametrize(
    "name", ["layer-00/00002.safetensors", "layer-01/00000.safetensors", "index/00001.safetensors"]
)
def test_a_shard_damaged_by_a_crash_is_written_again(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    out = tmp_path / "t"
    shutil.copytree(undisturbed(), out)
    (out / "manifest.json").unlink()
    for last in out.glob("*/00013.safetensors"):
        last.unlink()
    damage(out / name)
    collect(choices(out))
    assert digests(out) == digests(undisturbed())


def test_only_what_is_missing_is_computed(tmp_path: Path) -> None:
    out = tmp_path / "t"
    shutil.copytree(undisturbed(), out)
    (out / "manifest.json").unlink()
    (out / "index" / "00004.safetensors").unlink()
    before = {f: f.stat().st_ino for f in out.rglob("*.safetensors")}
    collect(choices(out))
    renewed = {f.name for f in out.rglob("*.safetensors") if before.get(f) != f.stat().st_ino}
    assert renewed == {"00004.safetensors"}
    assert digests(out) == digests(undisturbed())


def test_a_complete_trace_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        return {f: (f.stat().st_ino, f.stat().st_mtime_ns) for f in undisturbed().rglob("*")}

    before = state()
    # Nothing is written, so a full disk is no objection.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    trace = collect(choices(undisturbed()))
    assert trace.collected_tokens == 40 * LENGTH
    assert state() == before


OTHER_OPTIONS: list[dict[str, Any]] = [
    {"seed": 1},
    {"length": 8},
    {"tokens": 41 * LENGTH},
    {"split": "test"},
    {"mode": "generate"},
    {"batch_size": 4},
    {"dtype": "bfloat16"},
    {"corpus": "python-stdlib"},
]


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("change", OTHER_OPTIONS, ids=str)
def test_other_options_are_refused_and_nothing_is_lost(change: dict[str, Any], complete: bool, tmp_path: Path) -> None:
    out = tmp_path / "t"
    shutil.copytree(undisturbed(), out)
    if not complete:
        (out / "manifest.json").unlink()
    before = digests(out)
    with pytest.raises(OptionError, match="holds a trace with other ") as error:
        collect(choices(out, **change))
    assert str(out) in one_line(error)
    assert digests(out) == before


def test_another_model_of_the_same_name_is_refused(tmp_path: Path) -> None:
    out, model = tmp_path / "t", tmp_path / "model"
    save_model(model, seed=0)
    collect(choices(out, model=str(model), tokens=LENGTH))
    (out / "manifest.json").unlink()
    save_model(model, seed=1)
    with pytest.raises(OptionError, match="holds a trace with other "):
        collect(choices(out, model=str(model), tokens=LENGTH))


def test_a_text_that_changed_in_between_is_refused(tmp_path: Path) -> None:
    texts, out = tmp_path / "texts", tmp_path / "t"
    shutil.copytree(tiny().texts, texts)
    for mode in ("teacher", "generate"):
        collect(choices(out, corpus=str(texts), mode=mode))
        (out / "manifest.json").unlink()
        (out / "index" / "00009.safetensors").unlink()
        before = digests(out)
        lines = (texts / "even.jsonl").read_text().splitlines()
        (texts / "even.jsonl").write_text("\n".join(lines[10:]))
        with pytest.raises(TraceError, match="text") as error:
            collect(choices(out, corpus=str(texts), mode=mode))
        assert str(texts) in one_line(error)
        assert digests(out) == before
        shutil.rmtree(out)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match="not empty") as error:
        collect(choices(tmp_path))
    assert str(tmp_path) in one_line(error)
    assert list(digests(tmp_path)) == ["notes.txt"]
