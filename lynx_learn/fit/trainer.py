"""Lightning as this package uses it: quiet, and in the processes that were asked for, whatever surrounds them.

A scorer is trained in one process. Tuning through the model may take several, that torchrun or srun has started: each has
the frozen model as a whole, and gradients are averaged (data parallel). They meet before any of them begins.
"""

import logging
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from ..errors import OptionError
from ..parts import Share, ShareOptions

# Lightning reads these while it is imported, and fails where one is no number, such as an empty one.
_ranks = {
    name: os.environ.pop(name)
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    if name in os.environ
}
try:
    import lightning as L
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
    from lightning.pytorch.utilities import rank_zero_only
finally:
    os.environ |= _ranks

__all__ = ["ALONE", "CSVLogger", "L", "Team", "TeamOptions", "fit_module", "joined"]

Made = TypeVar("Made")
StrategyName = Literal["ddp"]
# How long the first processes wait for the last one to be started; one attempt to reach the meeting place, in seconds.
MEET_S, ATTEMPT_S = 600.0, 5.0
# How long one may work while others wait for it. Launchers end all when one ends, and a connection that breaks says so.
PATIENCE = timedelta(days=1)
POLL_S = 0.05
# Of these, each step of Slurm takes one to meet at.
SLURM_PORTS = range(15_000, 25_000)


@dataclass(frozen=True, kw_only=True)
class TeamOptions(ShareOptions):
    """The options of a command that has a step in which processes work together, and not each for itself."""

    devices: int = 1
    """processes of each machine that tune together, each with the whole model, and a GPU of its own where there are several"""
    num_nodes: int = 1
    """machines that tune together; torchrun or srun starts the processes of all of them"""
    strategy: StrategyName = "ddp"
    """how they tune together: ddp, which averages the gradients of a copy of the selector in each process"""

    @property
    def team_size(self) -> int:
        """Processes that work together."""
        return self.devices * self.num_nodes

    def check_team(self) -> None:
        """Refuse processes that cannot work together, and those that the launcher has not started.

        Raises:
            OptionError: with the reason.
        """
        for name in ("devices", "num_nodes"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)} is not usable: expected 1 or more")
        if self.strategy not in get_args(StrategyName):
            raise OptionError(f"--strategy {self.strategy} is not usable: expected ddp")
        if self.team_size == 1:
            return
        asked = f"--devices {self.devices} and --num_nodes {self.num_nodes}"
        if self.starts_workers or self.merge:
            raise OptionError(
                f"{asked} are for processes that torchrun or srun has started: leave out --workers, --backend and --merge"
            )
        if (found := self.share.world_size) != self.team_size:
            raise OptionError(
                f"{asked} are {self.team_size} processes, and {found} {'was' if found == 1 else 'were'} started: give these "
                f"options as they were given to torchrun or srun, as in torchrun --nproc-per-node {self.devices} --nnodes "
                f"{self.num_nodes}"
            )


@dataclass(frozen=True)
class Team:
    """One of the processes that work together; alone it needs nobody."""

    rank: int = 0
    local: int = 0
    """Its number on its machine."""
    devices: int = 1
    """Processes of a machine."""
    num_nodes: int = 1

    @property
    def size(self) -> int:
        """Processes of all machines."""
        return self.devices * self.num_nodes

    @property
    def leads(self) -> bool:
        """Whether it does what is done once."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all have come here.

        Raises:
            OptionError: one of them has ended.
        """
        if self.size == 1:
            return
        with _unless_left():
            work = distributed.barrier(async_op=True)
            while not work.is_completed():  # so that Ctrl-C is heard
                time.sleep(POLL_S)
            work.wait()

    def from_leader(self, make: Callable[[], Made]) -> Made:
        """What the first process makes, in all of them.

        Raises:
            OptionError: one of them has ended.
        """
        made = [make() if self.leads else None]
        if self.size > 1:
            self.wait()
            with _unless_left():
                distributed.broadcast_object_list(made)
        return made[0]  # type: ignore[return-value]

    def device(self, name: str) -> str:
        """What `--device` means here: of several processes on a machine with several GPUs, each takes its own.

        Raises:
            OptionError: there are fewer.
        """
        gpus = torch.cuda.device_count()
        if self.devices == 1 or name not in ("auto", "cuda") or gpus < 2:  # srun shows each task its own
            return name
        if self.local >= gpus:
            raise OptionError(f"--devices {self.devices} is not usable here: torch sees {gpus} GPUs")
        return f"cuda:{self.local}"


ALONE = Team()


@contextmanager
def joined(options: TeamOptions) -> Iterator[Team]:
    """While open, this process is one of those that the options ask for, which all have come.

    Raises:
        OptionError: some have not come in time, or the place to meet is not known.
    """
    if options.team_size == 1:
        yield ALONE
        return
    share = options.share
    team = Team(share.rank, _local_rank(share, options.devices), options.devices, options.num_nodes)
    if team.local >= options.devices:
        raise OptionError(
            f"--devices {options.devices} is not usable: this is process {team.local} of its machine, counted from 0: give as "
            "many as each machine runs, and with --num_nodes how many machines there are"
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo"
    store = _meet(team)
    with _unless_left():
        distributed.init_process_group(backend, store=store, rank=team.rank, world_size=team.size, timeout=PATIENCE)
    try:
        yield team
    finally:
        distributed.destroy_process_group()


def _local_rank(share: Share, devices: int) -> int:
    """Torchrun and srun say it; started by hand, ranks are counted machine by machine."""
    said = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or ""
    return int(said) if said.isdigit() else share.rank % devices


def _meet(team: Team) -> Any:
    """A store of torch that all processes have come to.

    Raises:
        OptionError: where it is is not known, or they have not.
    """
    host, port = _meeting_place()
    end = time.monotonic() + MEET_S
    advice = "start all of them at the same time, with the same options and where they reach each other"
    # Torchrun keeps a store itself; else it is the first process that does.
    keeps = team.leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    while True:
        try:
            attempt = timedelta(seconds=ATTEMPT_S)
            store = TCPStore(host, port, team.size, keeps, attempt, wait_for_workers=False)
            break
        except distributed.DistError as error:
            if keeps or time.monotonic() > end:
                raise OptionError(
                    f"rank {team.rank} of {team.size} cannot meet the others at {host}:{port} ({_reason(error)}): {advice}"
                ) from None
    with _unless_left():
        store.set(f"here/{team.rank}", "")
        while missing := [rank for rank in range(team.size) if not store.check([f"here/{rank}"])]:
            if time.monotonic() > end:
                raise OptionError(
                    f"rank {team.rank} of {team.size} has waited {MEET_S:g} s for rank {', '.join(map(str, missing))}: {advice}"
                )
            time.sleep(POLL_S)
    return PrefixStore("group", store)


def _meeting_place() -> tuple[str, int]:
    """Address and port: as torchrun or a person sets them, or the first machine of a step of Slurm, and a port by its number."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host and port and port.isdigit():
        return host, int(port)
    machines, job, step = (os.environ.get(f"SLURM_{name}", "") for name in ("STEP_NODELIST", "JOB_ID", "STEP_ID"))
    if not (machines and job.isdigit() and step.isdigit()):
        raise OptionError(
            "processes that tune together need a place to meet: start them by torchrun or srun, or set MASTER_ADDR and "
            "MASTER_PORT to rank 0's machine and a free port of it"
        )
    first, ports = SLURMEnvironment.resolve_root_node_address(machines), SLURM_PORTS
    return first, ports[(int(job) + int(step)) % len(ports)]


@contextmanager
def _unless_left() -> Iterator[None]:
    """Say in one line that another process has ended, which torch finds out by a connection that breaks."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise OptionError(
            f"another process that tunes with this one has ended or cannot be reached ({_reason(error)}): see what it said, and "
            "start all of them again; layers that are fitted are kept"
        ) from None


def _reason(error: RuntimeError) -> str:
    """What torch says, without where in its source it says so."""
    return re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0]).partition(" Exception raised from")[0]


class _Joined(ClusterEnvironment):
    """To Lightning, the processes that have met."""

    creates_processes_externally = True
    main_address, main_port = "", 0

    def __init__(self, team: Team) -> None:
        self.team = team

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.team.size

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.team.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self.team.local

    def node_rank(self) -> int:
        return 0


class _InPlace(SingleDeviceStrategy):
    """What is trained stays where it is: a selector's layers are where the model's are, on one device or several."""

    def model_to_device(self) -> None:
        pass


class _InPlaceDDP(DDPStrategy):
    """The same, of several processes."""

    def model_to_device(self) -> None:
        pass


@contextmanager
def undisturbed(rank: int = 0) -> Iterator[None]:
    """While open, Lightning takes this process for the one it is, whatever a cluster's or a launcher's variables say.

    Inside a job of SLURM and its like it would take this process for one of many, and write no losses in all but one;
    `PL_TRAINER_…` would change how it trains. With a `ClusterEnvironment` as a plugin it looks for no cluster.
    """
    zero: Any = rank_zero_only
    before = zero.rank
    taken = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("PL_TRAINER_")}
    zero.rank = rank
    try:
        yield
    finally:
        zero.rank = before
        os.environ |= taken


class _Ends(L.Callback):
    """SIGTERM ends a process at once: Lightning would first ask the others, of which one may be gone."""

    def __init__(self) -> None:
        self.before = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.before)


def fit_module(module: L.LightningModule, data: Any, team: Team = ALONE, **settings: Any) -> None:
    """Train with Lightning, in place, on the devices where the parameters are.

    Args:
        data: a data module, or batches.
        team: the processes that average their gradients.
        settings: of Lightning's trainer.

    Raises:
        OptionError: another process of the team has ended.
    """
    # Lightning reports its environment for every layer; what went wrong still raises.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    handler = signal.getsignal(signal.SIGINT)
    strategy: Strategy = _InPlaceDDP() if team.size > 1 else _InPlace()
    with warnings.catch_warnings(), undisturbed(team.rank), _unless_left():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*num_workers.*|.*treespec.*|.*many workers.*")
        trainer = L.Trainer(
            accelerator="cpu",  # so that it moves nothing
            devices=team.devices,
            num_nodes=team.num_nodes,
            strategy=strategy,
            plugins=[_Joined(team) if team.size > 1 else LightningEnvironment()],
            callbacks=[_Ends()] if team.size > 1 else [],
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **settings,
        )
        try:
            trainer.fit(module, data)
        except SystemExit:  # what Lightning makes of Ctrl-C, with a status of its own and further ones ignored
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from None
