"""Reads of a checkpoint's files that neither use nor fill the page cache.

With the cache, a model that is read again and again would come to lie in memory after all, only not in that which was
allowed; and what is measured would not be the disk.
"""

import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError
from .stored import Span

# Direct reads begin and end at multiples of this, in the file and in memory.
ALIGNED = 4096


class Disk:
    """Files open for reading, by several threads at once.

    Direct reads (O_DIRECT) where the file system has them; elsewhere what was read is dropped from the cache at once.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.own = threading.local()
        self.opened: list[tuple[int, bool, os.stat_result]] = []
        try:
            for file in self.files:
                self.opened.append(_open(file))
        except OSError as error:
            self.close()
            raise ModelError(
                f"{error.filename} cannot be opened ({error.strerror}): is the checkpoint still there?"
            ) from None

    def close(self) -> None:
        for handle, _, _ in self.opened:
            os.close(handle)
        self.opened = []

    def read(self, span: Span, out: Any) -> None:
        """Fill the bytes `(span.size,)`.

        Raises:
            ModelError: the file is shorter than it was, has been written to, or cannot be read.
        """
        handle, direct, before = self.opened[span.file]
        low = span.start - span.start % ALIGNED
        size = -(-(span.start + span.size - low) // ALIGNED) * ALIGNED
        wanted, got = span.start + span.size - low, 0
        room = self._room(size)
        try:
            while got < wanted:
                count = os.preadv(handle, [room[got:size]], low + got)
                if not count:
                    break
                got += count
                if direct and got % ALIGNED:  # the end of the file
                    break
            now = os.fstat(handle)
        except OSError as error:
            raise ModelError(
                f"{self.files[span.file]} cannot be read ({error.strerror}): check the disk, then load the model again"
            ) from None
        if not direct:
            with suppress(OSError):
                os.posix_fadvise(handle, low, size, os.POSIX_FADV_DONTNEED)
        if got < wanted or (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise ModelError(
                f"{self.files[span.file]} was changed while its experts were read from it: put it back and load the model again"
            )
        out[:] = np.frombuffer(room, np.uint8, span.size, span.start - low)

    def _room(self, size: int) -> memoryview:
        """Memory of this thread that begins at a page."""
        held: mmap.mmap | None = getattr(self.own, "room", None)
        if held is None or len(held) < size:
            held = self.own.room = mmap.mmap(-1, size)
        return memoryview(held)


def _open(file: Path) -> tuple[int, bool, os.stat_result]:
    direct = hasattr(os, "O_DIRECT")
    try:
        handle = os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    except OSError as error:
        if not direct or error.errno != 22:  # EINVAL: a file system without direct reads
            raise
        handle, direct = os.open(file, os.O_RDONLY), False
    return handle, direct, os.fstat(handle)
