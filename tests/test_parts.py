"""Parts: who makes which, and that any number of processes, one of them killed, writes the bytes that one does."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from flows import contents, one_line
from hypothesis import given
from hypothesis import strategies as st
from part_cases import CASES, Case, collecting, results

from lynx_learn import cli
from lynx_learn.errors import LynxError, OptionError, Unfinished
from lynx_learn.fit.train import train
from lynx_learn.parts import LOCK, Share, ShareOptions, deciding
from lynx_learn.traces.collect import CollectOptions

WORLD = 4
VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


# Whose a part is.


@given(st.integers(1, 9), st.integers(0, 40))
def test_every_part_has_one_owner(size: int, count: int) -> None:
    shares = [Share(rank, size) for rank in range(size)]
    assert sorted(part for share in shares for part in share.own(count)) == list(range(count))
    for share in shares:
        order = share.own_first(count)
        assert order[: len(share.own(count))] == list(share.own(count))
        assert sorted(order) == list(range(count))
        assert not replace(share, merge=True).own(count)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "3"}, (1, 3)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, (2, 4)),
        # A batch script: it has the variables of its first task, and is none.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
        ({"RANK": "1"}, (0, 1)),
    ],
    ids=["none", "torchrun", "srun", "sbatch", "empty", "half"],
)
def test_launchers_are_understood(
    variables: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = ShareOptions().share
    assert (found.rank, found.world_size) == expected
    assert ShareOptions(world_size=1).share == Share(0, 1)
    assert ShareOptions(rank=4, world_size=5).share == Share(4, 5)


@pytest.mark.parametrize(
    ("options", "variables", "said"),
    [
        ({"rank": 1}, {}, "go together"),
        ({"world_size": 2}, {}, "go together"),
        ({"rank": 2, "world_size": 2}, {}, "--rank 2 is not usable: expected 0 to"),
        ({"rank": -1, "world_size": 2}, {}, "--rank -1 is not usable"),
        ({"rank": 0, "world_size": 0}, {}, "--world_size 0 is not usable"),
        ({}, {"RANK": "first", "WORLD_SIZE": "2"}, "RANK=first"),
    ],
)
def test_ranks_that_cannot_be(
    options: dict[str, Any], variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for make in (lambda: ShareOptions(**options).share, lambda: CollectOptions("m", "o", **options)):
        with pytest.raises(OptionError, match=said) as error:
            make()
        one_line(error)


def test_two_processes_do_not_put_together_at_once(tmp_path: Path) -> None:
    with Share(0, 2).alone(tmp_path):
        with pytest.raises(Unfinished, match="another process"), Share(1, 2).alone(tmp_path):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert not list(tmp_path.iterdir())
    # A lock that a dead process has left holds nobody up.
    lock = FileLock(tmp_path / LOCK)
    lock.acquire()
    lock.release()
    with Share(1, 2).alone(tmp_path):
        pass


# The commands, with any number of processes.


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def ranks(options: Any, order: Iterator[int] | range = range(WORLD)) -> Iterator[Any]:
    return (replace(options, rank=rank, world_size=WORLD) for rank in order)


def test_any_number_of_processes_writes_the_same_bytes(case: Case, tmp_path: Path) -> None:
    """In any order, and run again when all is done; each waits for nobody, and only the last one puts all together."""
    whole, out = tmp_path / "whole", tmp_path / "parts"
    case.run(case.options(whole))
    given = case.options(out)
    *others, last = ranks(given, iter([2, 0, 3, 1]))
    for options in others:
        with pytest.raises(Unfinished, match=f"rank {options.rank} of {WORLD} is done; .* yet") as rest:
            case.run(options)
        one_line(rest)
        assert not (out / case.last).exists()
    case.run(last)
    expected = results(whole)
    assert results(out) == expected
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if "0000" in path.name}
    case.run(others[0])
    case.run(replace(given, merge=True))
    assert results(out) == expected
    assert {path: path.stat().st_mtime_ns for path in before} == before


# Before a command: killed when a part is in its place.
KILLED = """
import os, signal
replaced = os.replace
def stop(source, target, **more):
    replaced(source, target, **more)
    if str(target).endswith("{part}"):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = stop
"""


@pytest.mark.slow
def test_a_killed_rank_is_run_again_alone(case: Case, tmp_path: Path) -> None:
    """The others end meanwhile; nothing that was finished is made again."""
    whole, out = tmp_path / "whole", tmp_path / "parts"
    case.run(case.options(whole))
    world = 1 if case.run is train else 2
    options = replace(case.options(out), rank=world - 1, world_size=world)
    module, made, run = type(options).__module__, type(options).__name__, case.run.__name__  # type: ignore[attr-defined]
    program = f"{KILLED.format(part=case.part)}from {module} import *\n{run}({made}(**{vars(options)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    finished = [path for path in out.rglob("*0000*") if path.is_file()]
    assert any(str(path).endswith(case.part) for path in finished)
    stamps = [path.stat().st_mtime_ns for path in finished]
    for other in range(world - 1):
        with pytest.raises(Unfinished, match="rank 1"):
            case.run(replace(options, rank=other))
    with pytest.raises(OptionError, match="--merge is not usable yet") as error:
        case.run(replace(options, merge=True))
    one_line(error)
    assert [path.stat().st_mtime_ns for path in finished] == stamps
    case.run(options)
    assert [path.stat().st_mtime_ns for path in finished if path.exists()] in (stamps, [])
    assert results(out) == results(whole)


def test_a_rank_that_waits_for_others_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A launcher would kill the others otherwise."""
    options = collecting(tmp_path / "t")
    words = [f"--{name}={value}" for name, value in deciding(options).items() if isinstance(value, str | int)]
    assert cli.main(["collect", *words, "--rank", "1", "--world-size", "2", "--quiet"]) == 0
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("lynx-learn: rank 1 of 2 is done; 5 of 9 shards are not in")
    assert not (tmp_path / "t" / "manifest.json").exists()


# Coverage keeps what it measures under names that say what decided it: other options are other files.
@pytest.mark.parametrize("case", sorted(CASES.keys() - {"coverage"}), indirect=True)
def test_other_options_in_another_rank_are_refused(case: Case, tmp_path: Path) -> None:
    first, second, *_ = ranks(case.options(tmp_path / "t"))
    with suppress(Unfinished):
        case.run(first)
    before = contents(tmp_path / "t")
    with pytest.raises(LynxError, match=r"with other .*seed") as error:
        case.run(replace(second, seed=9))
    one_line(error)
    assert contents(tmp_path / "t") == before
