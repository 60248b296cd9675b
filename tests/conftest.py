"""Order and threads of the test run, and the folder its processes share."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

# Files run side by side, one process for each core: more threads would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where Ctrl-C is ignored, as under nohup, tests that send it could not be interrupted by it, nor what they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes says how busy the machine is.
with suppress(ImportError):
    from hypothesis import HealthCheck, settings

    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no process is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def _shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> None:
    from shared import SHARED

    own = tmp_path_factory.getbasetemp()
    SHARED.root = own if worker_id == "master" else own.parent


@pytest.fixture(autouse=True, scope="module")
def _shared_folders_stay(_shared_folder: None) -> Iterator[None]:
    """No test writes to what others read."""
    from shared import SHARED

    yield
    assert SHARED.changed() == []


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 256 KB."""
    folder = tempfile.mkdtemp()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        Path(folder).rmdir()
        pytest.skip("needs the right to mount a small file system")
    try:
        yield Path(folder)
    finally:
        subprocess.run(["umount", folder], check=True)
        Path(folder).rmdir()
