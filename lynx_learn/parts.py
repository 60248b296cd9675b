"""A command's work in parts, split among processes that do not talk to each other.

Part i (a shard, a layer, a group) belongs to rank i mod W, whatever launched the processes. Each part is a file of a
folder that all of them see, and one that is there is done: a process that was lost is run again alone. Whoever finds all
parts puts them together, and nobody else. What is computed does not depend on W.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import OptionError, Unfinished
from .files import PART

# Variables of a process's rank and of the number of processes: torchrun's, and srun's. Slurm sets the latter two for a
# batch script too, which is no task of a step: that the third is there tells them apart.
LAUNCHERS = (("RANK", "WORLD_SIZE", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"))
LOCK = f".merge{PART}"


@dataclass(frozen=True, kw_only=True)
class ShareOptions:
    """The options of every command whose work can be split among processes."""

    rank: int | None = None
    """number of this process, from 0, among those that share the work; by default torchrun's RANK or srun's SLURM_PROCID"""
    world_size: int | None = None
    """processes that share the work; by default torchrun's WORLD_SIZE or srun's SLURM_NTASKS, or 1"""
    merge: bool = False
    """compute no part: only put together what all processes have done"""

    @property
    def share(self) -> "Share":
        """Which parts are this process's.

        Raises:
            OptionError: the rank is none of the processes', or only one of the two options is given.
        """
        rank, size = self.rank, self.world_size
        if rank is None and size is None:
            rank, size = launched()
        if rank is None or size is None:
            if size == 1:
                return Share(0, 1, self.merge)
            raise OptionError("--rank and --world_size go together: give both, or neither")
        if size < 1:
            raise OptionError(f"--world_size {size} is not usable: expected 1 or more")
        if not 0 <= rank < size:
            raise OptionError(f"--rank {rank} is not usable: expected 0 to --world_size - 1 ({size - 1})")
        return Share(rank, size, self.merge)


def launched() -> tuple[int, int]:
    """Rank and number of processes, as a launcher says; 0 and 1 where none does.

    Raises:
        OptionError: its variables are no numbers.
    """
    for rank, size, told_by in LAUNCHERS:
        if all(map(os.environ.get, (rank, size, told_by))):  # an empty one counts as none, as it does to a shell
            try:
                return int(os.environ[rank]), int(os.environ[size])
            except ValueError:
                raise OptionError(
                    f"{rank}={os.environ[rank]} and {size}={os.environ[size]} are no numbers: mend these variables, or give "
                    "--rank and --world_size"
                ) from None
    return 0, 1


def deciding(options: Any) -> dict[str, Any]:
    """The options of a command that decide its result: who computes which part does not."""
    incidental = {field.name for field in fields(ShareOptions)}
    return {field.name: getattr(options, field.name) for field in fields(options) if field.name not in incidental}


@dataclass(frozen=True)
class Share:
    """One process's share of the parts."""

    rank: int = 0
    world_size: int = 1
    merge: bool = False

    @property
    def by(self) -> str:
        """What tells its unfinished files from those of others."""
        return f".{self.rank}" if self.world_size > 1 else ""

    def own(self, count: int) -> range:
        """Of so many parts those that this process makes."""
        return range(0) if self.merge else range(self.rank, count, self.world_size)

    def own_first(self, count: int) -> list[int]:
        """All of so many parts: what everybody needs is made by its owner, or by who comes to it before."""
        return sorted(range(count), key=lambda part: part % self.world_size != self.rank)

    def check_all_there(self, missing: Sequence[int], count: int, what: str, folder: Path) -> None:
        """Stop here where parts of other processes are missing.

        Raises:
            Unfinished: they are.
            OptionError: they are, and all were to be put together.
        """
        if not missing:
            return
        ranks = sorted({part % self.world_size for part in missing})
        whose = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        state = f"{len(missing)} of {count} {what} are not in {folder} yet"
        if self.merge and self.world_size == 1:
            raise OptionError(f"--merge is not usable yet: {state}: run the command without it")
        if self.merge:
            raise OptionError(f"--merge is not usable yet: {state}: run {whose} of {self.world_size}, as after a loss")
        raise Unfinished(
            f"rank {self.rank} of {self.world_size} is done; {state} ({whose}): the last one puts all together, and one that "
            "is lost is run again alone"
        )

    @contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """While open no other process puts the parts of `folder` together.

        Raises:
            Unfinished: one is doing so.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise Unfinished(f"another process is putting together what is in {folder}") from None
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()
            lock.release()


# All parts are one process's.
ALL = Share()
