"""What workers tell the process that the user started: counters for `/metrics`, and why they refuse.

vLLM has no channel for a plugin from a worker to the server, so both go through files in a folder that the first process
names in the environment, which its children inherit. Nothing is written until a worker skips or refuses.
"""

import atexit
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "LYNX_WORKER_DIR"
REFUSED = "refused"
ACTED = "acted"
SKIPPED = ("prefill", "mixed", "opted_out", "below_smallest_size")
"""Why a step is left as it is."""
SUMS = ("experts_routed", "experts_loaded", "assignments", "assignments_answered")
ASKED = ("budget", "level", "opted_out")
"""What a token's request asks for: the server's budget, another one, or all experts."""
AUDIT_EDGES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Upper edges of the audit's histogram, in nats."""
AUDIT = (*(f"audit_kl_{edge:g}" for edge in AUDIT_EDGES), "audit_kl_inf", "audit_kl_sum")
GAUGES = {
    "moe_layers": "MoE layers that are acted on.",
    "budget": "The server's budget, in nats of KL per token.",
    "expert_bytes": "Bytes of one expert of one layer, as the selector was trained.",
}
TOKENS = "tokens_"
"""Before what is asked, among the slots."""
SLOTS = (*SUMS, ACTED, *SKIPPED, *(TOKENS + name for name in ASKED), *AUDIT, *GAUGES)
HELP = {
    "experts_routed": "Distinct experts that steps acted on are routed to, summed over steps and MoE layers.",
    "experts_loaded": "Distinct experts that those steps load, summed over steps and MoE layers.",
    "assignments": "Assignments of tokens to experts in those steps, summed over MoE layers.",
    "assignments_answered": "Assignments that a surrogate answers instead of the expert.",
}


def open_slots(folder: Path, name: str) -> np.memmap[Any, np.dtype[np.float64]]:
    """A worker's counters, all 0."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return np.memmap(folder / f"{name}.counters", dtype=np.float64, mode="w+", shape=len(SLOTS))


def read_totals(folder: Path) -> dict[str, float]:
    """Sums over all workers that write there, of gauges the largest; empty when none does."""
    parts = [np.fromfile(file, dtype=np.float64) for file in sorted(folder.glob("*.counters"))]
    whole = [part for part in parts if len(part) == len(SLOTS)]  # a file is empty for the moment of its creation
    if not whole:
        return {}
    totals = dict(zip(SLOTS, np.sum(whole, axis=0).tolist(), strict=True))
    return totals | dict(zip(GAUGES, np.max(whole, axis=0)[-len(GAUGES) :].tolist(), strict=True))


class Collector:
    """Reads the counters when Prometheus asks for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        totals = read_totals(self.folder)
        if not totals:
            return
        for name in SUMS:
            yield CounterMetricFamily(f"lynx_{name}", HELP[name], value=totals[name])
        steps = CounterMetricFamily(
            "lynx_steps", "Steps of the engine, by what was done with them.", labels=["outcome"]
        )
        for name in (ACTED, *SKIPPED):
            steps.add_metric([name], totals[name])
        yield steps
        tokens = CounterMetricFamily(
            "lynx_decode_tokens",
            "Tokens that were decoded, drafts that were verified included, by what their requests ask for.",
            labels=["asked"],
        )
        for name in ASKED:
            tokens.add_metric([name], totals[TOKENS + name])
        yield tokens
        counts = np.cumsum([totals[name] for name in AUDIT[:-1]]).tolist()
        edges = [*(f"{edge:g}" for edge in AUDIT_EDGES), "+Inf"]
        yield HistogramMetricFamily(
            "lynx_audit_kl",
            "Nats of KL that skipping in a step moves its tokens by, in those that were audited.",
            buckets=list(zip(edges, counts, strict=True)),
            sum_value=totals[AUDIT[-1]],
        )
        for name, meaning in GAUGES.items():
            yield GaugeMetricFamily(f"lynx_{name}", meaning, value=totals[name])


def refused(reason: str) -> None:
    """Have the first process say the reason again when it ends: behind the traces of every process, not before them."""
    folder = os.environ.get(FOLDER)
    if folder and not _is_first():
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        (Path(folder) / REFUSED).write_text(reason, encoding="utf-8")


def _is_first() -> bool:
    """Whether this process was not started by another one for an engine; Ray's actors are given the environment of the first."""
    if parent_process() is not None:
        return False
    from vllm.ray.lazy_utils import is_in_ray_actor

    return not is_in_ray_actor()


def expose() -> None:
    """Name the folder, in an engine's first process, and show what is there in this process's metrics.

    A server that a process with an engine starts is a first process again, though it inherits the name.
    """
    if FOLDER in os.environ and not _is_first():
        return
    owner = os.getpid()
    # Memory that processes share, where there is some: what is written there reaches no disk.
    shared = Path("/dev/shm")
    place = shared if os.access(shared, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    folder = place / f"lynx-learn-{owner}-{uuid.uuid4().hex[:12]}"
    os.environ[FOLDER] = str(folder)

    def end() -> None:
        if os.getpid() != owner:  # a child that inherited this by forking
            return
        if (folder / REFUSED).exists():
            print(f"lynx-learn: {(folder / REFUSED).read_text(encoding='utf-8')}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    from prometheus_client import REGISTRY

    REGISTRY.register(Collector(folder))
