"""How far a long step is, on stderr: a bar on a terminal, elsewhere a line every half minute; and how long it took."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TypeVar

Item = TypeVar("Item")
# Seconds between two lines where there is no terminal.
INTERVAL_S = 30.0
# Seconds from which on a step that takes none as a rule is named.
SLOW_S = 1.0

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Say nothing of progress from here on, in this process."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether this process says nothing of progress."""
    return _quiet


def say(line: str) -> None:
    """A line of what is about to be done, unless nothing is to be said of progress."""
    if not _quiet:
        _say(line)


def track(items: Iterable[Item], title: str, total: int | None, weight: int = 1, unit: str = "steps") -> Iterator[Item]:
    """Yield the items, showing how many of `total` (None: nobody knows) are done; each counts for `weight` of the unit named."""
    if _quiet:
        yield from items
        return
    start, done = time.monotonic(), 0
    shown = _with_bar if sys.stderr.isatty() else _with_lines
    for item in shown(items, title, total, weight, unit):
        yield item
        done += 1
    _say_end(title, f"{done * weight:,} {unit}", time.monotonic() - start)


def _with_lines(items: Iterable[Item], title: str, total: int | None, weight: int, unit: str) -> Iterator[Item]:
    """A line every half minute, also while one item takes longer than that."""
    start, done, end = time.monotonic(), 0, Event()

    def report() -> None:
        while not _pause(end):
            _say(_line(title, done, total, weight, unit, time.monotonic() - start))

    Thread(target=report, daemon=True).start()
    try:
        for item in items:
            yield item
            done += 1
    finally:
        end.set()


def _pause(end: Event) -> bool:
    """Wait until the next line; True when there shall be none."""
    return end.wait(INTERVAL_S)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def step_if_slow(title: str) -> Iterator[None]:
    """Name a step that takes no time as a rule, such as loading what is compiled once, only where it takes some."""
    start, end, said = time.monotonic(), Event(), Event()

    def report() -> None:
        if not end.wait(SLOW_S) and not _quiet:
            said.set()
            _say(f"{title} …")

    thread = Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
    if said.is_set():
        _say_end(title, "done", time.monotonic() - start)


def duration(seconds: float) -> str:
    """For people: `8 s`, `2 min 5 s`, `1 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _line(title: str, done: int, total: int | None, weight: int, unit: str, passed: float) -> str:
    if total is None:
        return f"{title}: {done * weight:,} {unit}, {duration(passed)} so far"
    share = f"{done * weight:,} of {total * weight:,} {unit}"
    if not done:
        return f"{title}: {share}, {duration(passed)} so far"
    left = duration(passed / done * max(total - done, 0))
    return f"{title}: {share} ({done / total:.0%}), {duration(passed)} so far, about {left} left"


def _say_end(title: str, what: str, seconds: float) -> None:
    _say(f"{title}: {what} in {duration(seconds)}")


def _with_bar(items: Iterable[Item], title: str, total: int | None, weight: int, unit: str) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None if total is None else total * weight, rate="")
        for item in items:
            yield item
            bar.advance(task, weight)
            speed = bar.tasks[task].speed
            bar.update(task, rate=f"{speed:,.0f} {unit}/s" if speed else "")
