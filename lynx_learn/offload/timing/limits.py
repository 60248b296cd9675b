"""A limit of a process's memory that counts the pages of files that it reads, as on a machine that has no more."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import OptionError

# Where Linux has its control groups, by version, and the file that holds a group's limit.
HIERARCHIES = ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max"))


@contextmanager
def memory_limited(most: int, name: str) -> Iterator[None]:
    """While open this process holds at most `most` bytes, the page cache of what it reads included; more ends it.

    What it held before is not counted.

    Args:
        name: of the control group, which `forget_limit` removes should the process be ended.

    Raises:
        OptionError: no control group can be made here.
    """
    root, limit = _hierarchy()
    group, own = root / name, str(os.getpid())
    try:
        group.mkdir()
        (group / limit).write_text(str(most))
        (group / "cgroup.procs").write_text(own)
    except OSError as error:
        forget_limit(name)
        raise OptionError(
            f"--memory is not usable here: no control group can be made ({error}); leave it out, or run as root on Linux"
        ) from None
    try:
        yield
    finally:
        (root / "cgroup.procs").write_text(own)
        forget_limit(name)


def forget_limit(name: str) -> None:
    """Remove the control group of a process that has left it or ended; does nothing where there is none."""
    with suppress(OSError):
        (_hierarchy()[0] / name).rmdir()


def _hierarchy() -> tuple[Path, str]:
    return next((found for found in HIERARCHIES if (found[0] / "cgroup.procs").exists()), HIERARCHIES[1])
