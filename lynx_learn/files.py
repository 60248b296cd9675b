"""Files that are there whole or not at all, and folders that a run fills and goes on with when it was interrupted."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import OptionError

MARK = "options.json"
LONGEST_ROW = 1000
# What may stand in a folder that counts as empty: remains of an interrupted write, and what file systems put there.
PART, OF_THE_DISK = ".part", "lost+found"


def write_atomically(path: Path, data: bytes, by: str = "") -> None:
    """Write a file so that it is there whole or not at all; of a link, what it points at.

    Args:
        by: what tells this process from others that may be writing the same file.
    """
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}{by}{PART}")
    try:
        with open(part, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write(path: Path, data: bytes, by: str = "") -> None:
    """As `write_atomically`.

    Raises:
        OptionError: it cannot be written.
    """
    try:
        write_atomically(path, data, by)
    except OSError as error:
        raise OptionError(
            f"{path} cannot be written ({error.strerror or error}): mend that and run the same command again"
        ) from error


def compact_json(value: Any, margin: str = "") -> str:
    """JSON for tables: a list of numbers, or a row with all that is in it, is one line, and what is larger is indented."""
    line = json.dumps(value)
    if not isinstance(value, dict | list):
        return line
    parts = value.values() if isinstance(value, dict) else value
    if len(line) <= LONGEST_ROW or not any(isinstance(part, dict | list) for part in parts):
        return line
    inner = margin + "  "
    names = [f"{json.dumps(str(key))}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    rows = (f"{inner}{name}{compact_json(part, inner)}" for name, part in zip(names, parts, strict=True))
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n" + ",\n".join(rows) + f"\n{margin}{closing}"


def write_json(path: Path, value: object, by: str = "") -> None:
    """As `write`, for people to read."""
    write(path, (json.dumps(value, indent=2) + "\n").encode(), by)


def check_writable(folder: Path) -> None:
    """Refuse a folder that nothing could be written into, before the work whose results shall stand there.

    It is tried by writing; what that makes is taken away again.

    Raises:
        OptionError: with the reason.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"trial")
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or str(error)
        raise OptionError(f"{folder} cannot be written into ({reason}): choose another place") from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def check_target(path: Path) -> None:
    """As `check_writable`, for one file: new, or in the place of another; never in that of a device or a pipe.

    Raises:
        OptionError: with the reason.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise OptionError(f"{path} cannot be written (it is {kind}): give the name of a file")
    check_writable((path.resolve() if path.is_symlink() else path).parent)


def is_empty(folder: Path) -> bool:
    """Whether there is no such folder, or nothing in it that anybody has put there."""
    if not folder.is_dir():
        return not folder.exists()
    return all(path.name == OF_THE_DISK or path.name.endswith(PART) for path in folder.iterdir())


def check_empty(folder: Path) -> None:
    """Refuse a folder that holds something, or that cannot be written into.

    Raises:
        OptionError: with the reason.
    """
    check_writable(folder)
    if not is_empty(folder):
        raise OptionError(f"{folder} is not empty: choose another --out, or remove it")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder for files that are put into `folder`, over those of the same names, once all of them are written.

    It lies inside `folder`, so on the same disk; nothing is put in place after an exception.
    """
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".saving-*{PART}"):
        shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=".saving-", suffix=PART, dir=folder))
    try:
        yield part
        for file in sorted(path for path in part.rglob("*") if path.is_file()):
            place = folder / file.relative_to(part)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if fresh:
            with suppress(OSError):
                folder.rmdir()


class RunFolder:
    """A folder that a run fills file by file, and goes on with where an interrupted one stopped.

    `options.json`, written before any other file, holds what two runs must have in common. Of several processes that fill
    it, each has its own `by`, see `write_atomically`.

    Raises:
        OptionError: it holds something else, or cannot be written into.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], holds: str, by: str = "") -> None:
        self.folder, self.by = folder, by
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        mark = folder / MARK
        if mark.is_file():
            stored = read_object(mark)
            names = [*self.identity, *(stored.keys() - self.identity.keys())]
            if other := [n for n in names if n not in stored or stored[n] != self.identity.get(n, stored)]:
                raise OptionError(
                    f"{folder} holds {holds} with other {', '.join(other)} (see {MARK}): choose another --out or remove it"
                )
        elif folder.is_dir() and not is_empty(folder):
            raise OptionError(f"{folder} is not empty and holds no {holds.split(' ', 1)[1]}: choose another --out")
        check_writable(folder)

    def put(self, name: str, data: bytes) -> None:
        """Write a file of the run.

        Raises:
            OptionError: it cannot be written.
        """
        self.begin()
        write(self.folder / name, data, self.by)

    def begin(self) -> None:
        """Make the folder, with what it is of; where it is not there yet.

        Raises:
            OptionError: it cannot be written.
        """
        if not (self.folder / MARK).exists():
            write_json(self.folder / MARK, self.identity, self.by)

    def put_json(self, name: str, value: object) -> None:
        """As `put`, for people to read."""
        self.put(name, (json.dumps(value, indent=2) + "\n").encode())


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; of a file that holds none, an empty one."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def checksum(path: Path) -> str:
    with open(path, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
