"""Files are whole or as they were, also on a full disk."""

import errno
import os
from pathlib import Path

import pytest
from flows import contents

from lynx_learn.files import write_atomically


def test_write_atomically_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "file", b"one")
    write_atomically(tmp_path / "new" / "file", b"two")
    assert list(contents(tmp_path)) == ["new/file"]
    assert (tmp_path / "new" / "file").read_bytes() == b"two"


@pytest.mark.parametrize("kind", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(
    kind: BaseException, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise kind

    write_atomically(tmp_path / "file", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        for name in ("file", "other"):
            with pytest.raises(type(kind)):
                write_atomically(tmp_path / name, b"new content")
    assert list(contents(tmp_path)) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    write_atomically(small_disk / "file", b"old" * 10_000)
    with pytest.raises(OSError, match="No space left") as error:
        write_atomically(small_disk / "file", b"new" * 200_000)
    assert error.value.errno == errno.ENOSPC
    assert list(contents(small_disk)) == ["file"]
    assert (small_disk / "file").read_bytes() == b"old" * 10_000
