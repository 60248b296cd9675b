"""One way to decode a model whose experts lie on disk, in a process of its own: what it holds in memory is its own too."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...decode.runtime import Skipping
from ...decode.simulate import Reference
from ...decode.timing import with_threads
from ...moe.families import moe_blocks
from ...moe.loading import model_path
from ...selector.prices import RESIDENT, Uniform
from ...selector.selector import LynxSelector
from ..offload import Offloading, offload_experts
from .limits import memory_limited

# Ways that are no others' business than the user's own: transformers and accelerate as they come.
MAPPED, ACCELERATE = "memory mapping", "accelerate"
# Folder of the copy that is mapped.
STACKED = "stacked"


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        way: `MAPPED`, `ACCELERATE`, `no skipping`, the name of a predictor, or `uniform` or `residency` prices.
        thresholds: of the selector, one after the other; empty without skipping.
        tokens: text `(sequences, positions)`, of which so many are the prompt.
        dtype: as `moe.loading.pick_dtype` gives it.
        memory: bytes that it may hold, see `limits.memory_limited`; None: no limit.
        folder: for `reference.safetensors`, which the first job writes, and for copies that a way needs.
    """

    way: str
    model: str
    share: float
    tokens: list[list[int]]
    prompt: int
    folder: str
    dtype: str
    readers: int
    threads: int
    memory: int | None = None
    selector: str | None = None
    thresholds: tuple[float, ...] = ()
    predictors: str | None = None

    @property
    def group(self) -> str:
        """Name of the control group in which its memory is limited."""
        return f"lynx-learn-{Path(self.folder).name}"


@torch.no_grad()
def write_stacked(job: Job) -> None:
    """A copy of the model that can be mapped: each layer's experts in one tensor, in the type that it runs in."""
    _hush()
    path = model_path(job.model)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=job.dtype, trust_remote_code=False)
    loaded.save_pretrained(Path(job.folder) / STACKED, save_original_format=False)


@torch.no_grad()
def decode_way(job: Job) -> list[dict[str, Any]]:
    """Rows of the report, one for each threshold.

    Raises:
        ModelError, OptionError, SelectorError: it cannot be decoded so.
    """
    _hush()
    tokens, start = torch.tensor(job.tokens), peak_rss()
    with with_threads(job.threads), nullcontext() if job.memory is None else memory_limited(job.memory, job.group):
        run = _by_others if job.way in (MAPPED, ACCELERATE) else _by_us
        rows: list[dict[str, Any]] = []
        for logits, row in run(job, tokens):
            peak = rows[0]["peak_rss"] if rows else peak_rss()
            found = {"way": job.way, "share": job.share, "threshold": 0.0, "peak_rss": peak, "start_rss": start, **row}
            rows.append(found | {"kl": _loss(job, tokens, logits)})
    return rows


def _by_us(job: Job, tokens: Tensor) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    own: Any = {"prefetch": job.way, "predictors": job.predictors} if job.predictors else {}
    offloading = offload_experts(job.model, job.share, readers=job.readers, dtype=job.dtype, **own)
    selector = None if job.selector is None else LynxSelector.from_pretrained(job.selector)
    for threshold in job.thresholds or (0.0,):
        with offloading as offloaded:  # whose slots are empty at first, for each threshold
            policy = None
            if selector is not None:
                prices = RESIDENT[offloaded.layers[0].experts] if job.way == "residency" else Uniform()
                policy = selector.at_threshold(threshold, prices=prices)
            with nullcontext() if policy is None else Skipping(offloaded.model, policy) as acting:
                logits, row = _decode(offloaded.model, tokens, job.prompt, offloaded)
            stats, steps = offloaded.stats, tokens.shape[1] - job.prompt
            count, layers = tokens.shape[0] * steps, len(offloaded.layers)
            row |= {
                "threshold": threshold,
                "bytes_per_token": stats.bytes_read / count,
                "prefetched_bytes_per_token": stats.prefetched_bytes / count,
                "unused_bytes_per_token": stats.unused_bytes / count,
                "hits": stats.hits / max(stats.wanted, 1),
                "wait_ms": [1e3 * seconds / steps for seconds in stats.wait_seconds],
                "batches": _batches(sum(stats.wait_seconds), count / row["tokens_per_s"]),
                "experts": None if acting is None else sum(acting.stats.experts_after) / layers,
            }
        yield logits, row


def _batches(waited: float, seconds: float) -> int:
    """How many such batches would have to decode as one for computing to hide the reading (Klotski's n, arXiv 2502.06888).

    Computing grows with the batches, and what is read hardly does once most experts are needed. n times what is computed
    now must be at least what is read; that took no longer than all of the time.
    """
    return math.ceil(seconds / max(seconds - waited, 1e-9))


def _by_others(job: Job, tokens: Tensor) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Both read through the page cache, which holds nothing of the experts at first."""
    folder = Path(job.folder)
    if job.way == MAPPED:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / STACKED, dtype="auto")
    else:
        model = _with_accelerate(job.model, job.dtype, folder / "accelerate")
    _forget([*folder.rglob("*"), *Path(model_path(job.model)).glob("*.safetensors")])
    logits, row = _decode(model.eval(), tokens, job.prompt, None)
    yield (
        logits,
        {
            **row,
            "share": None,
            "bytes_per_token": row["disk_bytes_per_token"],
            "hits": None,
            "wait_ms": None,
            "batches": None,
            "experts": None,
        },
    )


def _with_accelerate(name: str, dtype: str, folder: Path) -> Any:
    """accelerate's disk offload of the experts: all of a layer are read when it runs."""
    path = model_path(name)
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        empty: Any = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = [f"{block}.experts" for block, _, _ in moe_blocks(empty)]
    places: dict[str, str] = dict.fromkeys(names, "disk")
    for module_name, module in empty.named_modules():
        own = list(module.parameters(recurse=False)) + list(module.buffers(recurse=False))
        if own and not any(module_name == part or module_name.startswith(f"{part}.") for part in names):
            places[module_name] = "cpu"
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map=places, offload_folder=str(folder), trust_remote_code=False
    )


def _hush() -> None:
    """No bars of transformers and no advice: other processes show what is done."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def _decode(model: Any, tokens: Tensor, prompt: int, offloaded: Offloading | None) -> tuple[Tensor, dict[str, Any]]:
    """Logits `(sequences, steps, vocabulary)` of decode steps fed with the text, and what they took; the prompt is not
    counted."""
    cache = model(input_ids=tokens[:, :prompt], use_cache=True).past_key_values
    if offloaded is not None:
        offloaded.reset()
    found, read, start = [], _disk_bytes(), perf_counter()
    for position in range(prompt, tokens.shape[1]):
        output = model(input_ids=tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        found.append(output.logits)
    seconds, after = perf_counter() - start, _disk_bytes()
    count = tokens.shape[0] * (tokens.shape[1] - prompt)
    disk = None if read is None or after is None else (after - read) / count
    return torch.cat(found, dim=1), {"tokens_per_s": count / seconds, "disk_bytes_per_token": disk}


def _loss(job: Job, tokens: Tensor, logits: Tensor) -> float:
    """KL in nats per token against the first job's predictions; 0 where they are the same, bit for bit."""
    file, logits = Path(job.folder) / "reference.safetensors", logits[:, :-1].contiguous()
    if not file.exists():
        save_file({"logits": logits}, file)
    before = load_file(file)["logits"]
    if torch.equal(before, logits):  # whose KL would be rounding
        return 0.0
    losses = Reference(before, tokens[:, job.prompt + 1 :]).losses(logits)
    return float(losses.sums[:, 0].sum() / losses.tokens.sum())


def peak_rss() -> int | None:
    """Most bytes of memory that this process has held at once, pages of mapped files among them; None where unknown."""
    return _field("/proc/self/status", "VmHWM", 1024)


def _disk_bytes() -> int | None:
    """Bytes that this process has had read from disks, as the system counts them."""
    return _field("/proc/self/io", "read_bytes", 1)


def _field(file: str, name: str, unit: int) -> int | None:
    with suppress(OSError):
        for line in Path(file).read_text().splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return int(value.split()[0]) * unit
    return None


def _forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                with suppress(OSError):
                    os.fsync(handle)
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
