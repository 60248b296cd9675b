"""What a user sets for a server, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lynx_learn.errors import OptionError
from lynx_learn.integrations.vllm.settings import Settings, asked_budget, check_request, read_settings


def test_settings() -> None:
    assert read_settings({}) is None
    assert read_settings({}, {"other": 1}) is None
    assert read_settings({"LYNX_SELECTOR": "", "LYNX_BUDGET": ""}) is None
    own = {"LYNX_SELECTOR": "a/b", "LYNX_BUDGET": "0.01"}
    assert read_settings(own) == Settings("a/b", 0.01)
    assert read_settings(own, {"lynx": {"budget": 0.03}}) == Settings("a/b", 0.03)
    assert read_settings({**own, "LYNX_REUSE_GENERATED": "1"}).reuse_generated  # type: ignore[union-attr]
    assert read_settings({**own, "LYNX_AUDIT_EVERY": "64"}).audit_every == 64  # type: ignore[union-attr]
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
        ({"LYNX_SELECTOR": "x", "LYNX_BUDGET": "1", "LYNX_REUSE_GENERATED": "ask"}, None, "expected 0 or 1"),
        ({"LYNX_SELECTOR": "x", "LYNX_BUDGET": "1", "LYNX_AUDIT_EVERY": "-1"}, None, "LYNX_AUDIT_EVERY=-1 is not"),
        ({"LYNX_SELECTOR": "x", "LYNX_BUDGET": "1", "LYNX_AUDIT_EVERY": "often"}, None, "a number of steps, or 0"),
        ({}, {"lynx": {"selector": "x", "budget": 1, "audit_every": True}}, "a number of steps, or 0"),
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
    assert asked_budget({"lynx": value}, 0.01) == (0 if out else 0.01)
    check_request({"lynx": value}, lambda: pytest.fail("is not asked for"))
    assert asked_budget({"other": value}, 0.01) == asked_budget(None, 0.01) == 0.01


@pytest.mark.parametrize("value", [0.003, "0.003", "3e-3"])
def test_a_level(value: Any) -> None:
    check_request({"lynx": value}, lambda: (0.003, 0.01))
    assert asked_budget({"lynx": value}, 0.01) == 0.003


@pytest.mark.parametrize("value", ["of", "none", "", 0.004, -1, 2, None, [0], "nan", "inf"])
def test_what_nobody_understands_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=r"expected false, .+, true, or a budget .+ calibrated for \(0.003, 0.01\)"):
        check_request({"lynx": value}, lambda: (0.003, 0.01))


@pytest.mark.parametrize("value", ["of", -1, None, [0], "nan"])
def test_what_nobody_understands_keeps_all_experts(value: Any) -> None:
    """Where it was not looked at when it came."""
    assert asked_budget({"lynx": value}, 0.01) == 0


def test_settings_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first process writes is what any other reads, whatever its own environment and folder are."""
    folder = tmp_path / "selector"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    settings = Settings("selector", 0.01, "warn", True, 8)
    written = json.loads(json.dumps({"lynx": settings.to_config()}))
    assert read_settings({"LYNX_BUDGET": "0.5"}, written) == replace(settings, selector=str(folder))
    assert Settings("owner/name", 0.01).to_config()["selector"] == "owner/name"
