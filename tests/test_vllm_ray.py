"""The plugin in workers that Ray starts: a cluster that knows nothing of the settings, on this machine's CPU.

vLLM asks Ray for devices, of which its CPU has none: Ray is told of two, and vLLM what they are called.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_vllm import BUDGET, SELECTOR, SETTINGS, other_routers
from vllm_cases import environment, run_cases

from lynx_learn.moe.loading import reference_moe

pytest.importorskip("vllm", reason="needs an environment with vLLM: .ci/vllm makes one")
pytest.importorskip("ray", reason="needs Ray beside vLLM: .ci/vllm-env installs it")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("ray")
    words = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
    words += [f"--port={port}", "--num-cpus=1", "--num-gpus=2", "--include-dashboard=false"]
    words += ["--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
    (folder / "sitecustomize.py").write_text(
        "import sys\nif any('default_worker' in word for word in sys.orig_argv):\n    import vllm_cases\n    vllm_cases.name_device()\n"
    )
    paths = [str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = environment(PYTHONPATH=os.pathsep.join(paths))
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(words, env=own, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            time.sleep(0.5)
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            if "Ray runtime started" in (folder / "log").read_text():
                break
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def ran(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What engines with settings in the environment alone did."""
    folder = tmp_path_factory.mktemp("cases")
    asked = {"LYNX_SELECTOR": str(SELECTOR), "LYNX_BUDGET": str(BUDGET)}
    here = {**SETTINGS, "model": reference_moe(), "enforce_eager": True}
    engine = {**here, "distributed_executor_backend": "ray"}
    other = str(other_routers(folder / "other"))
    planned = [
        {"name": "here", "environment": asked, "engine": here},
        {"name": "ray", "environment": asked, "engine": engine},
        {"name": "other model", "environment": asked, "engine": {**engine, "model": other}},
    ]
    results, _ = run_cases(
        folder, planned, RAY_ADDRESS=cluster, VLLM_HOST_IP="127.0.0.1", VLLM_CPU_OMP_THREADS_BIND="nobind"
    )
    return {result["name"]: result for result in results}


def test_settings_of_the_environment_reach_workers_and_their_counters_come_back(ran: dict[str, dict[str, Any]]) -> None:
    wanted, found = ran["here"], ran["ray"]
    assert "error" not in found, found["error"]
    assert found["tokens"] == wanted["tokens"]
    assert found["counted"] == wanted["counted"]
    assert found["counted"]["experts_loaded"] < found["counted"]["experts_routed"]


def test_a_refusal_of_a_worker_ends_the_start(ran: dict[str, dict[str, Any]]) -> None:
    """Of what only the loaded weights tell."""
    assert "this model differs in its routers" in ran["other model"]["error"]
