"""Folders that are made once in a run of the tests, by whichever process needs them first, and read by all."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


class Shared:
    """Folders that all processes of this run of the tests read."""

    root: Path  # set by conftest.py

    def __init__(self) -> None:
        self.used: dict[Path, dict[str, tuple[int, int]]] = {}

    def folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder `name`; the first to ask for it fills it with `make`, and others wait for that."""
        folder, done = self.root / name, self.root / f"{name}.done"
        with FileLock(self.root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        self.used.setdefault(folder, stamps(folder))
        return folder

    def changed(self) -> list[str]:
        """Files of the folders used here that somebody has written to."""
        now = {folder: stamps(folder) for folder in self.used}
        return [
            str(f / name) for f, old in self.used.items() for name in old | now[f] if old.get(name) != now[f].get(name)
        ]


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    files = (f for f in folder.rglob("*") if f.is_file())
    return {f.relative_to(folder).as_posix(): (f.stat().st_size, f.stat().st_mtime_ns) for f in files}


SHARED = Shared()
