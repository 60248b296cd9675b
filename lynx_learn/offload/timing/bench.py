"""`lynx-learn bench --offload`: decode a model whose experts lie on disk, by this package and by what else a user could take.

All decode the same text, fed to them, so that losses are those of the same predictions.
"""

import math
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import OptionError
from ...files import check_writable, write_json
from ...moe.loading import environment, load_tokenizer, model_path, pick_dtype
from ...selector.selector import LynxSelector
from ...show.progress import track
from ...traces import corpus as corpora
from ...traces.groups import decode_groups
from ..predict import PREDICTORS
from .limits import forget_limit
from .ways import ACCELERATE, MAPPED, Job, decode_way, write_stacked


@dataclass(frozen=True)
class OffloadBenchOptions:
    """Time decode steps of a model whose experts are read from disk."""

    out: str
    """folder for offload.json"""
    offload: str = "disk"
    """where experts lie; only disk"""
    model: str = "reference-moe"
    """folder or Hub id, or reference-moe"""
    shares: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """shares of the experts that fast memory holds"""
    selector: str | None = None
    """folder or Hub id; without one, nothing is skipped"""
    thresholds: list[float] = field(default_factory=lambda: [0.01, 0.03, 0.1])
    """thresholds (nats) of the selector, each with prices uniform and residency"""
    predictors: str | None = None
    """folder that replay --predictors has written; without one, nothing is read ahead"""
    batch_size: int = 16
    """sequences that decode together"""
    prompt: int = 32
    """tokens of prefill"""
    steps: int = 24
    """decode steps"""
    readers: int = 4
    """threads that read from disk"""
    threads: int = 1
    """threads of torch, as in bench"""
    others: bool = True
    """also decode by plain memory mapping, and by accelerate's disk offload where that is installed; both need a copy of the
    model beside --out, which is removed again"""
    memory: int | None = None
    """bytes that each way may hold, page cache included, as on a machine with no more; needs Linux and root"""
    corpus: str = corpora.BUILT_IN
    """text to decode, as in bench"""
    seed: int = 0
    """seed of the text's grouping"""

    def __post_init__(self) -> None:
        if self.offload != "disk":
            raise OptionError(f"--offload {self.offload} is not usable: expected disk")
        for name in ("batch_size", "prompt", "steps", "readers", "threads"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)} is not usable: expected 1 or more")
        if self.memory is not None and self.memory < 1:
            raise OptionError(f"--memory {self.memory} is not usable: expected 1 or more")
        for share in self.shares:
            if not 0 < share <= 1:
                raise OptionError(f"--shares {share:g} is not usable: expected above 0, at most 1")
        if not self.shares:
            raise OptionError("--shares is empty: expected one number or more")


def bench_offload(options: OffloadBenchOptions) -> dict[str, Any]:
    """Decode in every way, each in a process of its own, one after the other; writes and returns the report.

    Raises:
        ModelError, SelectorError, OptionError: what was asked for cannot be timed; nothing is written.
    """
    out = Path(options.out)
    check_writable(out)
    if options.selector is not None:
        LynxSelector.from_pretrained(options.selector)  # refused before anything runs
    tokens, rows = _text(options), []
    there = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=out) as folder:
            jobs = _jobs(options, tokens, folder)
            context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
            if sys.platform == "linux":  # what is imported once is not read again by every process
                context.set_forkserver_preload([decode_way.__module__])
            with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
                for job in track(jobs, "bench", len(jobs), unit="ways"):
                    if job.way == MAPPED:
                        pool.submit(write_stacked, job).result()
                    rows += _result(pool, job)
    except BaseException:
        if not there:
            out.rmdir()
        raise
    report = {"options": asdict(options), "environment": environment(), "rows": rows, "matched": matched(rows)}
    write_json(out / "offload.json", report)
    return report


def _result(pool: ProcessPoolExecutor, job: Job) -> list[dict[str, Any]]:
    try:
        return pool.submit(decode_way, job).result()
    except BrokenProcessPool:
        raise OptionError(
            f"{job.way!r} was ended by the system, which does so where memory is short: "
            + ("give more" if job.memory is None else f"--memory {job.memory} is too little for it; give more")
            + ", or leave out what else a user could take with --others false"
        ) from None
    finally:
        forget_limit(job.group)


def _jobs(options: OffloadBenchOptions, tokens: list[list[int]], folder: str) -> list[Job]:
    """The first one, with most experts in memory, is what the others' losses are measured against."""

    dtype = pick_dtype(options.model, "auto", torch.device("cpu"))

    def job(way: str, share: float, **more: Any) -> Job:
        length, readers, threads = options.prompt, options.readers, options.threads
        own = (share, tokens, length, folder, dtype, readers, threads, options.memory)
        return Job(way, options.model, *own, **more)

    shares = sorted(options.shares, reverse=True)
    jobs = [job("no skipping", share) for share in shares]
    if options.predictors is not None:
        jobs += [job(name, share, predictors=options.predictors) for name in PREDICTORS for share in shares]
    if options.selector is not None:
        own = {"selector": options.selector, "thresholds": tuple(options.thresholds)}
        jobs += [job(prices, share, **own) for prices in ("uniform", "residency") for share in shares]
    if options.others:
        jobs += [job(way, 0.0) for way in (MAPPED, ACCELERATE) if way == MAPPED or find_spec("accelerate") is not None]
    return jobs


def _text(options: OffloadBenchOptions) -> list[list[int]]:
    """Tokens `(sequences, positions)`."""
    from transformers import AutoConfig

    length = options.prompt + options.steps
    tokenizer = load_tokenizer(options.model, sys.maxsize)
    rows = AutoConfig.from_pretrained(model_path(options.model), trust_remote_code=False).get_text_config().vocab_size
    groups = decode_groups(options.corpus, tokenizer, "test", options.batch_size, length, 1, options.seed + 1, fewest=1)
    tokens = groups[0][0]
    if int(tokens.max()) >= rows:
        load_tokenizer(options.model, rows)
    return tokens.tolist()


def matched(rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Bytes read with residency prices beside uniform ones where both lose the same, by share and KL.

    A curve's points are its thresholds. At the KL of each point of one curve, the other's logarithm of bytes is interpolated
    linearly over the logarithm of KL between its two neighbours, and nothing is read beyond its ends.
    """
    found = []
    for share in sorted({row["share"] for row in rows if row["way"] == "residency"}):
        curves = {way: _curve(rows, way, share) for way in ("uniform", "residency")}
        for level in sorted({kl for kl, _ in (*curves["uniform"], *curves["residency"])}):
            uniform, residency = (_at(curves[way], level) for way in ("uniform", "residency"))
            if uniform is not None and residency is not None:
                found.append(
                    {
                        "share": share,
                        "kl": level,
                        "uniform": uniform,
                        "residency": residency,
                        "ratio": residency / uniform,
                    }
                )
    return found


def _curve(rows: Sequence[dict[str, Any]], way: str, share: float) -> list[tuple[float, float]]:
    own = [row for row in rows if (row["way"], row["share"]) == (way, share)]
    return sorted((row["kl"], row["bytes_per_token"]) for row in own if row["kl"] > 0 and row["bytes_per_token"] > 0)


def _at(curve: list[tuple[float, float]], level: float) -> float | None:
    if not curve or not curve[0][0] <= level <= curve[-1][0]:
        return None
    kl, size = zip(*curve, strict=True)
    return math.exp(np.interp(math.log(level), np.log(kl), np.log(size)))
