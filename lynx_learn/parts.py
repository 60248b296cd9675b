"""A command's work in parts, split among processes that do not talk to each other.

Part i (a shard, a layer, a group) belongs to rank i mod W, whatever launched the processes. Each part is a file of a
folder that all of them see, and one that is there is done: a process that was lost is run again alone. Whoever finds all
parts puts them together, and nobody else. What is computed does not depend on W.

The processes are started by a launcher, by hand, or by the command itself through joblib: `--workers` on this machine, or
on a Ray or Dask cluster with `--backend`.
"""

import ctypes
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock, Timeout

from .errors import LynxError, OptionError, Unfinished
from .files import PART
from .show.progress import is_quiet, say, set_quiet

# Variables of a process's rank and of the number of processes: torchrun's, and srun's. Slurm sets the latter two for a
# batch script too, which is no task of a step: that the third is there tells them apart.
LAUNCHERS = (("RANK", "WORLD_SIZE", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"))
LOCK = f".merge{PART}"
# How often Ray starts a worker anew that has died, and its rank again.
RESTARTS = 3

Backend = Literal["loky", "ray", "dask"]
Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class ShareOptions:
    """The options of every command whose work can be split among processes."""

    rank: int | None = None
    """number of this process, from 0, among those that share the work; by default torchrun's RANK or srun's SLURM_PROCID"""
    world_size: int | None = None
    """processes that share the work; by default torchrun's WORLD_SIZE or srun's SLURM_NTASKS, or 1"""
    merge: bool = False
    """compute no part: only put together what all processes have done"""
    workers: int = 1
    """processes that this one starts, and that share the work, each with its own model"""
    backend: Backend = "loky"
    """where workers run: loky on this machine's CPU, ray or dask on the cluster of RAY_ADDRESS or DASK_SCHEDULER_ADDRESS"""
    worker_gpus: int = 0
    """GPUs that each worker of ray or dask is given; of dask as its resource GPU"""

    @property
    def starts_workers(self) -> bool:
        """Whether others do the work."""
        return self.workers > 1 or self.backend != "loky"

    @property
    def share(self) -> "Share":
        """Which parts are this process's.

        Raises:
            OptionError: the rank is none of the processes', or options do not go together.
        """
        rank, size = self.rank, self.world_size
        if self.workers < 1:
            raise OptionError(f"--workers {self.workers} is not usable: expected 1 or more")
        if self.worker_gpus < 0 or (self.worker_gpus and self.backend == "loky"):
            expected = (
                "expected 0 or more" if self.worker_gpus < 0 else "it is for --backend ray and dask; use torchrun here"
            )
            raise OptionError(f"--worker_gpus {self.worker_gpus} is not usable: {expected}")
        if self.starts_workers:
            if self.workers == 1:
                raise OptionError(f"--backend {self.backend} is not usable with --workers 1: expected 2 or more")
            if rank is not None or size is not None or self.merge or launched()[1] > 1:
                raise OptionError(
                    "--workers and --backend start the processes that share the work: leave out --rank, --world_size and "
                    "--merge, and start the command once, without torchrun or srun"
                )
            return ALL
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
    bases = (base for base in type(options).__mro__[1:] if issubclass(base, ShareOptions))
    incidental = {field.name for base in bases for field in fields(base)}
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

    def owns(self, part: int) -> bool:
        """Whether this process makes a part, where nobody knows yet how many there will be."""
        return part in self.own(part + 1)

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


def give_back(collect: bool = False) -> None:
    """Give memory that a part, or a piece of one, has freed back to the system, where the C library can be asked to.

    Where pieces are of different sizes, what one has freed is too small for the next, and the heap would grow with each.

    Args:
        collect: free what only holds itself first, as a trainer and what it trains do; takes longer.
    """
    if collect:
        gc.collect()
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def in_workers(command: Command) -> Command:
    """Make a command `(options, ...)` run in the workers that its options ask for, and as it is where they ask for none.

    Workers load what they need themselves. The result is that of the worker that has put all together.

    Raises:
        OptionError: workers cannot be had, or one died.
    """

    @wraps(command)
    def run(options: Any, *given: Any, **more: Any) -> Any:
        if not options.starts_workers:
            return command(options, *given, **more)
        from joblib import Parallel, delayed

        world = options.workers
        alone = replace(options, workers=1, backend="loky", worker_gpus=0)
        parent = os.getpid() if options.backend == "loky" else None
        calls = (
            delayed(_work)(run, replace(alone, rank=rank, world_size=world), str(Path.cwd()), parent, is_quiet())
            for rank in range(world)
        )
        say(f"{run.__name__}: {world} workers ({options.backend})")
        with CLUSTERS[options.backend](options):
            results = Parallel(n_jobs=world, batch_size=1, pre_dispatch="all")(calls)
        if errors := [result for result in results if isinstance(result, LynxError)]:
            rest = [error for error in errors if not isinstance(error, Unfinished)]
            if rest or len(errors) == len(results):
                raise (rest or errors)[0]
        return next(result for result in results if not isinstance(result, LynxError))

    return run  # type: ignore[return-value]


def _work(command: Callable[[Any], Any], options: Any, folder: str, parent: int | None, quiet: bool) -> Any:
    """One rank of a command in a worker: its result, or the error that it ends with.

    Args:
        folder: where relative paths begin.
        parent: the process to end with, where that is on the same machine.
    """
    import transformers

    if parent is not None:
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # Ctrl-C reaches every process of a terminal; the first one decides
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    set_quiet(quiet or options.rank > 0)
    try:
        os.chdir(folder)
    except OSError:
        return OptionError(f"{folder} is not there on a worker: start the command in a folder that all machines see")
    try:
        result = command(options)
    except LynxError as error:
        return error
    # A selector may be on a device that the first process has not.
    return result.cpu() if hasattr(result, "cpu") else result


def _end_with(parent: int) -> None:
    """End with the process that started this one: a process whose parent ends is given another one."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _died(workers: int, advice: str) -> OptionError:
    return OptionError(
        f"one of {workers} workers died, perhaps for lack of memory: {advice}; what was finished is kept, and the command "
        "goes on from there"
    )


@contextmanager
def _on_this_machine(options: ShareOptions) -> Iterator[None]:
    """Processes of this machine, its cores shared among them."""
    import torch
    from joblib import parallel_config
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.process_executor import BrokenProcessPool

    device = getattr(options, "device", "cpu")
    if not device.startswith("cpu") and torch.cuda.is_available():
        raise OptionError(
            f"--workers {options.workers} is for a CPU: add --device cpu, or start the command by torchrun"
        )
    try:
        with parallel_config("loky"):
            yield
    except BrokenProcessPool:
        raise _died(options.workers, "take fewer --workers") from None
    finally:
        get_reusable_executor(options.workers).shutdown(kill_workers=True)


@contextmanager
def _on_ray(options: ShareOptions) -> Iterator[None]:
    """A running Ray cluster; a worker that dies is started anew, and does its rank again."""
    from joblib import parallel_config

    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError:
        raise OptionError("--backend ray needs Ray: pip install 'lynx-learn[ray]'") from None
    began = not ray.is_initialized()
    try:
        ray.init(address="auto", ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise OptionError(
            f"--backend ray finds no cluster ({reason}): start one with `ray start --head`, or set RAY_ADDRESS"
        ) from None
    try:
        there = ray.cluster_resources()
        for name, wanted in (("CPU", options.workers), ("GPU", options.workers * options.worker_gpus)):
            if wanted > (found := int(there.get(name, 0))):
                raise OptionError(
                    f"--workers {options.workers} need {wanted} {name}s and the Ray cluster has {found}: take fewer, or add "
                    "machines with `ray start --address`"
                )
        register_ray()
        again = {"max_restarts": RESTARTS, "max_task_retries": RESTARTS}
        with parallel_config("ray", ray_remote_args={"num_cpus": 1, "num_gpus": options.worker_gpus, **again}):
            yield
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError):
            raise
        raise _died(options.workers, "take fewer --workers on each machine") from None
    finally:
        if began:
            ray.shutdown()


@contextmanager
def _on_dask(options: ShareOptions) -> Iterator[None]:
    """A running Dask cluster, whose scheduler gives the rank of a worker that dies to another one."""
    from joblib import parallel_config

    try:
        import dask
        from distributed import Client, KilledWorker
    except ImportError:
        raise OptionError("--backend dask needs Dask: pip install 'lynx-learn[dask]'") from None
    address = dask.config.get("scheduler-address", None)
    if not address:
        raise OptionError(
            "--backend dask finds no cluster: start one with `dask scheduler`, and set DASK_SCHEDULER_ADDRESS to its address"
        )
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--backend dask: no scheduler answers at {address} ({error}): set DASK_SCHEDULER_ADDRESS"
        ) from None
    with client:
        threads = client.nthreads().values()
        if not threads:
            raise OptionError(f"the Dask cluster at {address} has no workers: add some with `dask worker --nthreads 1`")
        if max(threads) > 1:
            raise OptionError(
                "Dask's workers run several tasks at once, and a model is one task's: start them with --nthreads 1"
            )
        wanted = {"resources": {"GPU": options.worker_gpus}} if options.worker_gpus else {}
        try:
            with parallel_config("dask", client=client, **wanted):
                yield
        except KilledWorker:
            raise _died(options.workers, "take fewer --workers on each machine") from None


CLUSTERS = {"loky": _on_this_machine, "ray": _on_ray, "dask": _on_dask}
