"""What stands beside a selector: figures, card and records, written together or not at all."""

import json
import platform
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from flows import contents, one_line, tiny_flow

from lynx_learn.errors import SelectorError
from lynx_learn.selector.saving import read_metrics, run_record, write_card
from lynx_learn.selector.selector import LynxSelector


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A selector that a test may change."""
    shutil.copytree(tiny_flow().selector, tmp_path / "selector")
    return tmp_path / "selector"


def test_figures_are_read_as_they_were_written(folder: Path) -> None:
    before = contents(folder)
    metrics = {**read_metrics(folder), "extra": {"0.01": [1.0, None]}}
    write_card(folder, LynxSelector.from_pretrained(folder), metrics, {"run-extra.yaml": "extra: {}\n"})
    after = contents(folder)
    assert read_metrics(folder) == metrics
    assert after["run-extra.yaml"] == b"extra: {}\n"
    assert {name for name in after if after[name] != before.get(name)} == {"metrics.json", "run-extra.yaml"}


def test_a_selector_without_figures_has_none(folder: Path) -> None:
    (folder / "metrics.json").unlink()
    assert read_metrics(folder) == {}


def test_figures_that_cannot_be_read_are_refused(folder: Path) -> None:
    (folder / "metrics.json").write_text('{"train": ')
    with pytest.raises(SelectorError, match=r"is damaged .* restore it, or train") as error:
        read_metrics(folder)
    one_line(error)
    with pytest.raises(SelectorError, match=r"is no folder here: .* download it first") as error:
        read_metrics("somebody/selector")
    one_line(error)


def test_what_cannot_be_written_leaves_everything_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the files that would have been written before it."""
    selector, before = LynxSelector.from_pretrained(folder), contents(folder)

    def full(*words: object, **names: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(SelectorError, match=r"cannot be written .*No space left.*: make room there") as error:
        write_card(folder, selector, {"train": {}}, {"run-extra.yaml": "extra: {}\n"})
    one_line(error)
    monkeypatch.undo()
    assert contents(folder) == before


def test_a_record_has_the_options_and_the_versions() -> None:
    options = {"selector": "a: b", "budgets": [0.01], "mix": None, "card": True}
    found = yaml.safe_load(run_record("calibrate", options))
    assert list(found) == ["calibrate", "versions"]
    assert found["calibrate"] == options
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert json.loads(json.dumps(found)) == found
