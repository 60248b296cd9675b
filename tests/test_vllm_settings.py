"""What a user sets for a server, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lynx_learn.errors import OptionError
from lynx_learn.integrations.vllm.settings import Settings, opted_out, read_settings


def test_settings() -> None:
    assert read_settings({}) is None
    assert read_settings({}, {"other": 1}) is None
    assert read_settings({"LYNX_SELECTOR": "", "LYNX_BUDGET": ""}) is None
    own = {"LYNX_SELECTOR": "a/b", "LYNX_BUDGET": "0.01"}
    assert read_settings(own) == Settings("a/b", 0.01)
    assert read_settings(own, {"lynx": {"budget": 0.03}}) == Settings("a/b", 0.03)
    assert read_settings({**own, "LYNX_ON_UNSUPPORTED": "warn"}).on_unsupported == "warn"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("environment", "additional", "line"),
    [
        ({"LYNX_BUDGET": "0.01"}, None, "no selector: set LYNX_SELECTOR"),
        ({"LYNX_SELECTOR": "x"}, None, "no budget: set LYNX_BUDGET"),
        ({"LYNX_SELECTOR": "x", "LYNX_BUDGET": "much"}, None, "LYNX_BUDGET=much is not usable"),
        ({"LYNX_SELECTOR": "x", "LYNX_BUDGET": "-1"}, None, "LYNX_BUDGET=-1 is not usable"),
        ({"LYNX_SELECTOR": "x", "LYNX_BUDGET": "nan"}, None, "LYNX_BUDGET=nan is not usable"),
        ({"LYNX_SELECTOR": "x", "LYNX_BUDGET": "1", "LYNX_ON_UNSUPPORTED": "ask"}, None, "expected fail or warn"),
        ({}, {"lynx": {}}, "no selector"),
        ({}, {"lynx": "x"}, "expected an object"),
        ({}, {"lynx": {"selector": "x", "budget": True}}, "not usable"),
        ({}, {"lynx": {"selector": "x", "badget": 1}}, "lynx.badget"),
    ],
)
def test_settings_refused(environment: dict[str, str], additional: Any, line: str) -> None:
    with pytest.raises(OptionError, match=line):
        read_settings(environment, additional)


@pytest.mark.parametrize(
    ("value", "out"),
    [(False, True), (0, True), (0.0, True), ("false", True), ("Off", True), (True, False), (1, False), ("on", False)],
)
def test_opting_out(value: Any, out: bool) -> None:
    assert opted_out({"lynx": value}) is out
    assert not opted_out({"other": value})
    assert not opted_out(None)


def test_settings_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first process writes is what any other reads, whatever its own environment and folder are."""
    folder = tmp_path / "selector"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    settings = Settings("selector", 0.01, "warn")
    written = json.loads(json.dumps({"lynx": settings.to_config()}))
    assert read_settings({"LYNX_BUDGET": "0.5"}, written) == replace(settings, selector=str(folder))
    assert Settings("owner/name", 0.01).to_config()["selector"] == "owner/name"
