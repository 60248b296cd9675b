"""Processes that tune together: who may, how they meet, and that none of them stays when another one ends."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import LAYERS, one_line, tiny_flow, train_options

from lynx_learn.errors import OptionError
from lynx_learn.fit import trainer
from lynx_learn.fit.train import TrainOptions
from lynx_learn.fit.trainer import ALONE, Team, joined
from lynx_learn.parts import deciding

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
SLURM = tuple(
    f"SLURM_{name}" for name in ("PROCID", "LOCALID", "NTASKS", "STEP_NUM_TASKS", "STEP_NODELIST", "JOB_ID", "STEP_ID")
)
TWO: dict[str, Any] = {"devices": 2, "tune_batches": 2, "rank": 0, "world_size": 2}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *SLURM):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        number: int = found.getsockname()[1]
    return number


# Who may.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"devices": 0}, "--devices 0 is not usable: expected 1 or more"),
        ({"num_nodes": 0}, "--num_nodes 0 is not usable"),
        ({"strategy": "fsdp"}, "--strategy fsdp is not usable: expected ddp"),
        (
            {"devices": 2, "tune_batches": 2},
            "are 2 processes, and 1 was started: .* torchrun --nproc-per-node 2 --nnodes 1",
        ),
        ({**TWO, "num_nodes": 2}, "are 4 processes, and 2 were started"),
        ({**TWO, "tune_batches": 3}, "--tune_batches 3 is not usable: expected a multiple of the 2 processes"),
        ({**TWO, "tune_steps": 0}, "--devices 2 .* leave them out with --tune_steps 0"),
        ({**TWO, "merge": True}, "leave out --workers, --backend and --merge"),
        ({"devices": 2, "tune_batches": 2, "workers": 2}, "leave out --workers, --backend and --merge"),
    ],
    ids=str,
)
def test_processes_that_cannot_tune_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said) as error:
        TrainOptions("trace", "out", **options)
    one_line(error)


def test_how_many_tune_decides_nothing() -> None:
    """What is written does not say it, as it does not say who fitted which layer."""
    one, two = TrainOptions("trace", "out", tune_batches=2), TrainOptions("trace", "out", **TWO)
    assert deciding(one) == deciding(two)
    assert deciding(one)["tune_batches"] == 2
    assert {"devices", "num_nodes", "strategy", "rank"}.isdisjoint(deciding(one))


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    second = Team(1, 1, devices=2)
    assert [second.device(name) for name in ("auto", "cuda", "cpu", "cuda:0")] == ["cuda:1", "cuda:1", "cpu", "cuda:0"]
    assert ALONE.device("auto") == Team(3, 0, 1, 4).device("auto") == "auto"  # which is all of a machine
    with pytest.raises(OptionError, match="--devices 4 is not usable here: torch sees 2 GPUs"):
        Team(2, 2, devices=4).device("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as srun's --gpus-per-task
    assert Team(2, 2, devices=4).device("auto") == "auto"


# How they meet.


def refused_to_meet(**changes: Any) -> str:
    with pytest.raises(OptionError) as error, joined(TrainOptions("trace", "out", **{**TWO, **changes})):
        pass
    return one_line(error)


def test_a_place_to_meet_is_needed() -> None:
    assert "set MASTER_ADDR and MASTER_PORT" in refused_to_meet()


def test_nobody_is_waited_for_for_ever(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "MEET_S", 0.2)
    monkeypatch.setattr(trainer, "ATTEMPT_S", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    assert "rank 0 of 2 has waited 0.2 s for rank 1: start all of them" in refused_to_meet()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert "rank 0 of 2 cannot meet the others at 127.0.0.1:" in refused_to_meet()


def test_machines_are_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    said = refused_to_meet(rank=1, devices=1, num_nodes=2)
    assert said.startswith("--devices 1 is not usable: this is process 1 of its machine")


def test_slurm_names_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEP_NODELIST": "gpu[07-09]", "JOB_ID": "123456", "STEP_ID": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_PORT", "")  # counts as none
    assert trainer._meeting_place() == ("gpu07", 15_000 + 3_458)
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert trainer._meeting_place() == ("here", 29_500)


# What becomes of the others.

# In the third step of tuning, rank 1 ends, and rank 0 waits for its gradient.
PROGRAM = """
import os, signal, sys
from lynx_learn import cli
from lynx_learn.fit import tuning
loss, steps = tuning._loss, []
def counted(*given):
    steps.append(1)
    if len(steps) == 3 and os.environ["RANK"] == "1":
        {end}
    return loss(*given)
tuning._loss = counted
sys.exit(cli.main(sys.argv[1:]))
"""
ENDS = {
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", (-signal.SIGKILL, 2), "has ended or cannot be reached"),
    "terminated": ("os.kill(os.getpid(), signal.SIGTERM)", (-signal.SIGTERM, 2), "has ended or cannot be reached"),
    # As on a terminal, where every process of the group hears it.
    "interrupted": ("os.killpg(os.getpgid(0), signal.SIGINT)", (130, 130), "interrupted: what was finished is kept"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("end", "statuses", "said"), ENDS.values(), ids=ENDS.keys())
def test_none_stays_when_one_ends(end: str, statuses: tuple[int, int], said: str, port: int, tmp_path: Path) -> None:
    out = tmp_path / "selector"
    options = deciding(train_options(tiny_flow(), out, epochs=1, tune_steps=6, tune_batches=2))
    argv = [f"--{name}={value}" for name, value in options.items() if isinstance(value, str | int | float)]
    program = [sys.executable, "-c", PROGRAM.format(end=end), "train", "--quiet", "--devices=2", *argv]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    start: Callable[..., subprocess.Popen[str]] = subprocess.Popen
    first = start(program, env={**os.environ, **place, "RANK": "0"}, stderr=subprocess.PIPE, text=True, process_group=0)
    second = start(
        program,
        env={**os.environ, **place, "RANK": "1"},
        stderr=subprocess.PIPE,
        text=True,
        process_group=first.pid,
    )
    errors = [process.communicate(timeout=600)[1] for process in (second, first)]
    assert (second.returncode, first.returncode) == statuses, errors
    assert said in errors[1]
    assert errors[1].startswith("lynx-learn: ")
    assert len(errors[1].splitlines()) == 1
    assert sorted(path.name for path in out.rglob("*.safetensors")) == [f"{i:05d}.safetensors" for i in range(LAYERS)]
    assert not [path for path in out.iterdir() if path.name != ".train.part"]
