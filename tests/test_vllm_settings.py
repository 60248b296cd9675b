"""What a user sets for a server, and what is refused."""

from typing import Any

import pytest

from lynx_learn.errors import OptionError
from lynx_learn.integrations.vllm.settings import Settings, UnsupportedError, check_version, opted_out, read_settings


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


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lynx_learn.integrations.vllm.settings.engine_version", lambda: "0.32.1")
    assert check_version(Settings("x", 0.01))
    monkeypatch.setattr("lynx_learn.integrations.vllm.settings.engine_version", lambda: "0.33.0")
    with pytest.raises(UnsupportedError, match=r"vLLM 0\.33\.0 is not supported: install 0\.32\.x"):
        check_version(Settings("x", 0.01))
