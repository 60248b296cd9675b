"""How far a step is: lines where there is no terminal, a bar where there is one, nothing when quiet."""

import io
from collections.abc import Iterator
from queue import Queue
from threading import Semaphore

import pytest

from lynx_learn.show import progress
from lynx_learn.show.progress import duration, set_quiet, step_if_slow, track


@pytest.fixture(autouse=True)
def aloud() -> Iterator[None]:
    set_quiet(False)
    yield
    set_quiet(False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one number."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_every_half_minute_and_the_time_at_the_end(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half minutes end when the test says so, also in the middle of an item."""
    due, said = Semaphore(0), Queue[str]()
    monkeypatch.setattr(progress, "_pause", lambda end: due.acquire() and end.is_set())
    monkeypatch.setattr(progress, "_say", said.put)

    def half_minute() -> str:
        clock[0] += 30.0
        due.release()
        return said.get()

    lines = [half_minute() for _ in track(range(4), "collect", 4, 4096, "tokens")]
    due.release()
    assert lines == [
        "collect: 0 of 16,384 tokens, 30 s so far",
        "collect: 4,096 of 16,384 tokens (25%), 1 min 0 s so far, about 3 min 0 s left",
        "collect: 8,192 of 16,384 tokens (50%), 1 min 30 s so far, about 1 min 30 s left",
        "collect: 12,288 of 16,384 tokens (75%), 2 min 0 s so far, about 40 s left",
    ]
    assert said.get() == "collect: 16,384 tokens in 2 min 0 s"
    assert said.empty()


def test_a_short_step_says_only_how_long_it_took(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "train", 3, unit="layers")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "train: 3 layers in 0 s\n"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Semaphore:
    """Released by each line; every step is slow."""
    lines = Semaphore(0)
    monkeypatch.setattr(progress, "SLOW_S", 0.0)
    monkeypatch.setattr(progress, "_say", lambda line, say=progress._say: [say(line), lines.release()])
    return lines


def fail_after(line: Semaphore) -> None:
    assert line.acquire(timeout=60)
    raise ValueError("no")


def test_a_step_that_fails_claims_nothing(said: Semaphore, capsys: pytest.CaptureFixture[str]) -> None:
    broken = (1 / item for item in (1, 0))
    with pytest.raises(ZeroDivisionError):
        list(track(broken, "train", 2))
    with pytest.raises(ValueError, match="no"), step_if_slow("load"):
        fail_after(said)
    assert capsys.readouterr().err == "load …\n"


def test_a_quick_step_is_not_named(capsys: pytest.CaptureFixture[str]) -> None:
    with step_if_slow("compiling"):
        pass
    assert capsys.readouterr().err == ""


def test_a_slow_step_is_named(said: Semaphore, capsys: pytest.CaptureFixture[str]) -> None:
    with step_if_slow("compiling"):
        assert said.acquire(timeout=60)
    assert capsys.readouterr().err == "compiling …\ncompiling: done in 0 s\n"


def test_quiet_is_quiet(said: Semaphore, capsys: pytest.CaptureFixture[str]) -> None:
    set_quiet(True)
    progress.say("3 tokens into a file")
    with step_if_slow("load"):
        assert list(track(range(3), "train", 3)) == [0, 1, 2]
        assert not said.acquire(timeout=0.2)
    assert capsys.readouterr().err == ""
    set_quiet(False)
    progress.say("3 tokens into a file")
    assert capsys.readouterr().err == "3 tokens into a file\n"


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    assert list(track(range(3), "train", 3, unit="layers")) == [0, 1, 2]
    assert "━" in shown.getvalue()
    assert shown.getvalue().endswith("train: 3 layers in 0 s\n")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (3600, "1 h 0 min"), (4359, "1 h 12 min")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
