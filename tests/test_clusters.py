"""Workers that a command starts: on this machine, on a Ray cluster of two nodes, and on a Dask cluster; killed in the middle,
they leave the bytes that one process leaves."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from flows import LENGTH, PROMPT, SENTENCE, calibrated, one_line, tiny_flow
from part_cases import CASES, collecting, results

from lynx_learn.errors import OptionError
from lynx_learn.fit.train import TrainOptions, train
from lynx_learn.parts import ShareOptions
from lynx_learn.traces.collect import CollectOptions, collect
from lynx_learn.traces.format import Trace

CLUSTER_COMMANDS = ("collect", "train", "evaluate")
# Found by every Python that is started with its folder in PYTHONPATH: one process dies when the file that is named in
# KILL_AT is in its place.
SITE = """
import os, signal
replaced = os.replace
def stop(source, target, **more):
    replaced(source, target, **more)
    try:
        with open({mark!r}) as file:
            part = file.read()
    except FileNotFoundError:
        return
    if part and str(target).endswith(part):
        os.unlink({mark!r})
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = stop
"""


class Trap:
    """Kills the worker that writes a part."""

    def __init__(self, folder: Path) -> None:
        self.mark, site = folder / "kill-at", folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(SITE.format(mark=str(self.mark)))
        own = [str(site), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self.environment = {"PYTHONPATH": os.pathsep.join(filter(None, own)), "OMP_NUM_THREADS": "1"}

    def set(self, part: str) -> None:
        self.mark.write_text(part)

    @property
    def sprung(self) -> bool:
        return not self.mark.exists()


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trap]:
    """In the environment of everything that this module starts."""
    found = Trap(tmp_path_factory.mktemp("trap"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found


@pytest.fixture(scope="module")
def ray(trap: Trap) -> Iterator[str]:
    """A cluster of two nodes, each a raylet of its own with room for one worker."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install -e '.[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield "ray"
    cluster.shutdown()


@pytest.fixture(scope="module")
def dask(trap: Trap) -> Iterator[str]:
    """A scheduler and two workers, each a process of its own."""
    if find_spec("distributed") is None:
        pytest.skip("Dask is not installed: pip install -e '.[dask]'")
    import dask
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        dask.config.set({"scheduler-address": cluster.scheduler_address}),
    ):
        yield "dask"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "command"),
    [("loky", "collect"), *((backend, command) for backend in ("ray", "dask") for command in CLUSTER_COMMANDS)],
)
def test_a_worker_that_is_killed_leaves_the_same_bytes(
    backend: str, command: str, request: pytest.FixtureRequest, trap: Trap, tmp_path: Path
) -> None:
    """A cluster does its rank again; here the command says what happened, and goes on when it is started again."""
    if backend != "loky":
        request.getfixturevalue(backend)
    case, whole, out = CASES[command], tmp_path / "whole", tmp_path / "out"
    case.run(case.options(whole))
    options = replace(case.options(out), workers=2, backend=backend)
    trap.set(case.part)
    if backend == "loky":
        with pytest.raises(OptionError, match=r"one of 2 workers died, .* take fewer --workers") as error:
            case.run(options)
        one_line(error)
        assert trap.sprung
        assert not (out / case.last).exists()
    case.run(options)
    assert trap.sprung
    assert results(out) == results(whole)


# The commands of the page.

PAGE = Path(__file__).parents[1] / "docs" / "clusters.md"
# As much of srun as the page uses: it starts tasks that know their number. There is no Slurm in this.
SRUN = """#!/usr/bin/env bash
[ "$1 $3" = "--ntasks --gpus-per-task" ] || exit 9
tasks=$2
shift 4
for rank in $(seq 0 $((tasks - 1))); do
  SLURM_PROCID=$rank SLURM_NTASKS=$tasks SLURM_STEP_NUM_TASKS=$tasks SLURM_LOCALID=0 \\
    SLURM_STEP_NODELIST=127.0.0.1 SLURM_JOB_ID=$$ SLURM_STEP_ID=0 "$@" &
  started+=($!)
done
for task in "${started[@]}"; do wait "$task" || exit 1; done
"""


class Page:
    """Runs the page's commands in a folder, on a tiny model and with two processes each."""

    def __init__(self, folder: Path) -> None:
        self.folder, flow = folder, tiny_flow()
        (folder / "bin").mkdir()
        (folder / "bin" / "srun").write_text(SRUN)
        (folder / "bin" / "srun").chmod(0o755)
        path = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        self.environment = {"PATH": os.pathsep.join(path), "SLURM_ARRAY_TASK_COUNT": "2"}
        self.words = {
            "MODEL": str(flow.model),
            "my/text": str(flow.texts),
            "cuda:$LOCAL_RANK": "cpu",
            "--nproc-per-node 4": "--nproc-per-node 2",
            "--ntasks 16": "--ntasks 2",
            "--ntasks 8": "--ntasks 2",
            "--devices 4 --tune-batches 4": "--devices 2 --tune-batches 2 --tune-steps 2",
            "--devices 4 --num-nodes 2 --tune-batches 8": "--devices 1 --num-nodes 2 --tune-batches 2 --tune-steps 2",
            "--workers 16 --worker-gpus 1": "--workers 2",
            "lynx-learn collect": f"lynx-learn collect --quiet --tokens {8 * LENGTH} --length {LENGTH} --batch-size 2",
            "lynx-learn train": "lynx-learn train --quiet --tune-steps 0 --epochs 1 --reference false",
            "lynx-learn evaluate": f"lynx-learn evaluate --quiet --corpus {flow.texts} --mode teacher --length {LENGTH} "
            f"--prompt {PROMPT} --tokens 1 --methods learned --batch-sizes 2",
        }

    def run(self, part: str, out: str, **variables: str) -> None:
        """The command of the page that holds `part`."""
        text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
        (line,) = (line for line in text.splitlines() if part in line and "lynx-learn" in line)
        for word, own in {**self.words, "--out my/trace": f"--out {out}", "--out my/selector": f"--out {out}"}.items():
            line = line.replace(word, own)
        line = line.replace("HEAD:6379", variables.pop("head", "")).replace("HEAD:8786", variables.pop("scheduler", ""))
        line = line.partition("   #")[0]
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env={**os.environ, **self.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.mark.slow
def test_the_commands_of_launchers(trap: Trap, tmp_path: Path) -> None:
    page = Page(tmp_path)
    page.run("lynx-learn collect --model MODEL", "my/trace")
    assert Trace.open(tmp_path / "my" / "trace").collected_tokens == 8 * LENGTH
    flow, shape = tiny_flow(), {"tokens": 8 * LENGTH, "length": LENGTH, "batch_size": 2}
    collect(CollectOptions(str(flow.model), str(tmp_path / "whole"), str(flow.texts), device="cpu", **shape))  # type: ignore[arg-type]
    assert results(tmp_path / "my" / "trace") == results(tmp_path / "whole")
    (tmp_path / "my" / "trace").rename(tmp_path / "short")
    shutil.copytree(tiny_flow().trace, tmp_path / "my" / "trace")
    page.run("--ntasks 16", "my/srun")
    for task in "01":
        page.run("--rank $SLURM_ARRAY_TASK_ID", "my/array", SLURM_ARRAY_TASK_ID=task)
    found = results(tmp_path / "my" / "srun")
    assert "config.json" in found
    assert {
        name: data.replace(b"my/array", b"my/srun") for name, data in results(tmp_path / "my" / "array").items()
    } == found


@pytest.mark.slow
def test_the_commands_of_tuning_together(trap: Trap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, and two machines of one process each, write what one process writes."""
    page = Page(tmp_path)
    shutil.copytree(tiny_flow().trace, tmp_path / "my" / "trace")
    page.run("--devices 4 --tune-batches 4", "my/torchrun")
    page.run("--num-nodes 2", "my/srun")
    monkeypatch.chdir(tmp_path)
    train(TrainOptions("my/trace", "my/one", epochs=1, reference=False, tune_steps=2, tune_batches=2))
    whole = results(tmp_path / "my" / "one")
    assert json.loads(whole["metrics.json"])["train"]["tuning"]["steps"] == 2
    for name in ("torchrun", "srun"):
        found = results(tmp_path / "my" / name)
        assert {file: data.replace(f"my/{name}".encode(), b"my/one") for file, data in found.items()} == whole


@pytest.mark.slow
def test_the_command_of_ray(ray: str, tmp_path: Path) -> None:
    page = Page(tmp_path)
    shutil.copytree(tiny_flow().trace, tmp_path / "my" / "trace")
    page.run("--backend ray", "my/selector", head=os.environ["RAY_ADDRESS"])
    assert (tmp_path / "my" / "selector" / "config.json").is_file()


@pytest.mark.slow
def test_the_command_of_dask(dask: str, tmp_path: Path) -> None:
    page = Page(tmp_path)
    shutil.copytree(calibrated(), tmp_path / "my" / "selector")
    from dask import config

    page.run("--backend dask", "", scheduler=config.get("scheduler-address"))
    assert (tmp_path / "my" / "report" / "report.json").is_file()


PROGRAM = """
import sys
from lynx_learn import CollectOptions, collect
if __name__ == "__main__":
    model, out, corpus = sys.argv[1:]
    collect(CollectOptions(model, out, corpus=corpus, length=32, tokens=10**6, workers=2))
"""


def interrupt(process: subprocess.Popen[str]) -> None:
    """As Ctrl-C on a terminal: every process of the group receives it."""
    os.killpg(process.pid, signal.SIGINT)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("end", "said"), [(interrupt, "KeyboardInterrupt"), (kill, "")])
def test_no_process_stays_behind(end: Callable[[Any], None], said: str, tmp_path: Path) -> None:
    """Also in the middle of its work."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{SENTENCE} " * (100 + i)}) + "\n" for i in range(200)))
    process = subprocess.Popen(
        [sys.executable, str(program), str(tiny_flow().model), str(tmp_path / "out"), str(texts)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: (tmp_path / "out" / "index").exists() or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]
    end(process)
    err = process.communicate()[1]
    assert process.returncode != 0
    assert said in err
    wait_for(lambda: not group_lives(process.pid))  # for ever, if one stays


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)


# What is refused.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 0}, "--workers 0 is not usable"),
        ({"backend": "dask"}, "--workers 1: expected 2 or more"),
        ({"workers": 2, "worker_gpus": 1}, "--worker_gpus 1 is not usable: it is for --backend ray and dask"),
        ({"workers": 2, "backend": "ray", "worker_gpus": -1}, "--worker_gpus -1 is not usable: expected 0 or more"),
        ({"workers": 2, "rank": 0, "world_size": 2}, "leave out --rank"),
        ({"workers": 2, "merge": True}, "leave out --rank"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as error:
        replace(collecting(tmp_path), **options)
    assert said in one_line(error)


def test_workers_are_not_started_by_a_launcher_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match="without torchrun or srun"):
        ShareOptions(workers=2).share  # noqa: B018


@pytest.mark.parametrize(("backend", "module"), [("ray", "ray"), ("dask", "distributed")])
def test_a_cluster_that_is_not_there(
    backend: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(collecting(tmp_path / "out"), workers=2, backend=backend)
    if backend == "dask" and find_spec(module) is not None:  # Ray finds one that anybody has started on this machine
        # Read from the environment once, perhaps while another test had a cluster.
        monkeypatch.setitem(importlib.import_module("dask").config.config, "scheduler-address", None)
        with pytest.raises(OptionError, match="--backend dask finds no cluster") as error:
            CASES["collect"].run(options)
        one_line(error)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OptionError, match=rf"pip install 'lynx-learn\[{backend}\]'") as error:
        CASES["collect"].run(options)
    one_line(error)
    assert not (tmp_path / "out").exists()
