"""Run a model whose experts lie on disk: `with offload_experts("my/model", fast_memory=2 * 2**30) as offloaded: …`.

The order of a layer is Klotski's (arXiv 2502.06888): what the router has chosen and fast memory lacks is requested at
once; experts that are there run while it is read, and the others in the order in which they arrive. An assignment of
weight 0 is none, so what skipping leaves out is not read.
"""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.stored import Checkpoint
from ..decode.runtime import unwrapped
from ..errors import ModelError, OptionError
from ..moe.families import MoeLayer, find_moe_layers
from ..moe.hooks import foreign, left_out_of_copies
from ..moe.loading import LoadedModel
from ..selector.prices import RESIDENT, Price, Uniform
from .disk import Disk
from .loading import load_without_experts
from .slots import Eviction, LeastRecent, Slots
from .spans import Part, expert_parts

NAME = "lynx_offload"
# Some CPUs' BLAS rounds by where operands begin, up to multiples of this.
ALIGNED = 64


@dataclass
class OffloadStats:
    """What was read since the last `reset`.

    Attributes:
        bytes_read: of expert weights, from disk.
        wanted, hits: experts that layers ran, and how many of them fast memory held.
        wait_seconds: of each layer, for reads that nothing was left to be computed beside.
    """

    bytes_read: int = 0
    wanted: int = 0
    hits: int = 0
    wait_seconds: list[float] = field(default_factory=list)


class Resident(Uniform):
    """Prices of fast memory as it is: an expert that it holds is free."""

    source = "residency"

    def __init__(self, offloading: "Offloading") -> None:
        self.offloading = offloading

    def of(self, layer: Any) -> Price:
        held = self.offloading.slots.held(layer.index)
        return Price(torch.from_numpy((~held).astype(np.float32)))

    def describe(self) -> dict[str, Any]:
        slots = self.offloading.slots
        return {"source": self.source, "share": slots.count / (slots.shape[0] * slots.shape[1])}


class Offloading:
    """A model whose experts are read from its checkpoint; a context manager, or `attach()` and `detach()`.

    Several threads may call the model; its experts run one call at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        fast_memory: float,
        eviction: Eviction | None = None,
        readers: int = 4,
        loaded: LoadedModel | None = None,
    ) -> None:
        self.model, self.loaded, self.readers = unwrapped(model), loaded, readers
        self.layers = find_moe_layers(self.model)
        _check(self.layers)
        self.parts = expert_parts(self.model, self.layers, checkpoint)
        self.views = [_Views(layer, parts) for layer, parts in zip(self.layers, self.parts, strict=True)]
        self.slot_bytes = max(views.bytes for views in self.views)
        experts = max(layer.num_experts for layer in self.layers)
        self.slots = Slots(self._count(fast_memory, experts), len(self.layers), experts, eviction or LeastRecent())
        self.checkpoint, self.stats, self.lock = checkpoint, OffloadStats(), threading.Lock()
        self.reset()
        self.stack: ExitStack | None = None
        self.memory = torch.empty(0, dtype=torch.uint8)

    def _count(self, fast_memory: float, experts: int) -> int:
        everything = experts * len(self.layers)
        if isinstance(fast_memory, float) and 0 < fast_memory <= 1:
            count = int(fast_memory * everything)
        else:
            count = int(fast_memory // self.slot_bytes)
        top_k = max(layer.top_k for layer in self.layers)
        if count < top_k:
            raise OptionError(
                f"fast_memory {fast_memory:g} is not usable: it holds {max(count, 0)} experts of {self.slot_bytes:,} bytes, a "
                f"token needs {top_k} in each layer: give {top_k * self.slot_bytes:,} bytes or more"
            )
        return min(count, everything)

    def reset(self) -> None:
        """Count anew."""
        self.stats = OffloadStats(wait_seconds=[0.0] * len(self.layers))

    def attach(self) -> "Offloading":
        """Let experts run from fast memory. What the model has of them itself is set aside until `detach`.

        Raises:
            ModelError: the model is offloaded already, or its files cannot be opened.
        """
        own = [layer.experts for layer in self.layers]
        if any(experts in RESIDENT for experts in own):
            raise ModelError("this model's experts are offloaded already: detach that first")
        with ExitStack() as stack:
            self.disk = Disk(self.checkpoint.files)
            stack.callback(self.disk.close)
            self.pool = stack.enter_context(ThreadPoolExecutor(self.readers, "lynx-read"))
            self.memory = torch.empty(self.slots.count * self.slot_bytes + ALIGNED, dtype=torch.uint8)
            stack.callback(self._give_back)
            prices = Resident(self)
            for experts in own:
                RESIDENT[experts] = prices
                stack.callback(RESIDENT.pop, experts)
            stack.enter_context(left_out_of_copies(self.model, self.layers))
            stack.enter_context(_instead(self))
            self.stack = stack.pop_all()
        return self

    def _give_back(self) -> None:
        for slot in range(self.slots.count):
            self.slots.empty(slot)
        self.memory = torch.empty(0, dtype=torch.uint8)

    def detach(self) -> None:
        """The model is as it was; does nothing when it is.

        Raises:
            ModelError: something else was attached since, and still is.
        """
        if self.stack is not None:
            if any(not isinstance(vars(layer.experts)["config"], _Config) for layer in self.layers):
                raise ModelError("skipping was attached to this model after offloading: detach that first")
            self.stack.close()
            self.stack = None

    def __enter__(self) -> "Offloading":
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def run(self, index: int, experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """A layer's experts; arguments as those of an experts module. Sums are those of `grouped_mm`, bit for bit."""
        count, top_k = self.layers[index].num_experts, indices.shape[-1]
        expert, order = indices.masked_fill(weights == 0, count).flatten().sort()
        ends = torch.bincount(expert, minlength=count + 1)[:count].cumsum(0).tolist()
        rows = {
            e: order[start:end] for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start
        }
        if not rows:
            return torch.zeros_like(hidden)
        flat = weights.flatten()
        by_slot = hidden.new_zeros(
            indices.numel(), hidden.shape[-1], dtype=torch.promote_types(hidden.dtype, flat.dtype)
        )
        with self.lock:
            for e, slot in self._in_order(index, list(rows)):
                own = rows[e]
                weights_ = self.views[index].tensors(e, self._slot(slot))
                output = _run_expert(experts, weights_, hidden.index_select(0, own // top_k))
                by_slot.index_copy_(0, own, output * flat.index_select(0, own).unsqueeze(-1))
        return by_slot.unflatten(0, (-1, top_k)).sum(1).to(hidden.dtype)

    def _in_order(self, index: int, wanted: list[int]) -> Iterator[tuple[int, int]]:
        """Experts and their slots as they can run: what is held, then what arrives; missing ones are being read meanwhile."""
        slots, stats = self.slots, self.stats
        held = [(e, slots.pin(index, e)) for e in wanted if slots.where[index, e] >= 0]
        missing = deque(e for e in wanted if slots.where[index, e] < 0)
        reading: dict[Future[None], tuple[int, int]] = {}
        stats.wanted += len(wanted)
        stats.hits += len(held)

        def request() -> None:
            while missing and len(reading) < self.readers:
                slot = slots.claim(index, missing[0])
                if slot is None:
                    return
                e = missing.popleft()
                reading[self.pool.submit(self._read, index, e, slot)] = e, slot

        try:
            request()
            while held:
                yield held[0]
                slots.release(held.pop(0)[1])
                request()
            while reading:
                start = perf_counter()
                done, _ = wait(reading, return_when=FIRST_COMPLETED)
                stats.wait_seconds[index] += perf_counter() - start
                for future in sorted(done, key=lambda future: reading[future]):
                    e, slot = reading[future]
                    future.result()
                    del reading[future]
                    stats.bytes_read += self.views[index].stored_bytes
                    yield e, slot
                    slots.release(slot)
                    request()
        finally:  # after an error: nothing is on its way, and nothing half-filled counts as held
            wait(reading)
            for _, slot in reading.values():
                slots.empty(slot)
            for _, slot in held:
                slots.release(slot)

    def _slot(self, slot: int) -> Tensor:
        start = -self.memory.data_ptr() % ALIGNED + slot * self.slot_bytes
        return self.memory[start : start + self.slot_bytes]

    def _read(self, index: int, expert: int, slot: int) -> None:
        self.views[index].read(self.disk, expert, self._slot(slot))


class _Views:
    """How one layer's experts lie in a slot: as far behind a multiple of `ALIGNED` as in the untouched model's memory."""

    def __init__(self, layer: MoeLayer, parts: list[Part]) -> None:
        self.parts, self.dtype = parts, layer.dtype
        self.sizes = [torch.Size(part.shape).numel() * self.dtype.itemsize for part in parts]
        self.starts, end = [], 0
        for part, size in zip(parts, self.sizes, strict=True):
            own = dict(layer.experts.named_parameters(recurse=False))[part.name]
            behind = [_behind(part, own, e, size) for e in range(layer.num_experts)]
            self.starts.append([end + more for more in behind])
            end += -(-(size + max(behind)) // ALIGNED) * ALIGNED
        self.bytes = end
        self.stored_bytes = sum(torch.Size(part.shape).numel() * part.stored.itemsize for part in parts)

    def places(self, expert: int, slot: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """Parts and the bytes that hold them."""
        for part, starts, size in zip(self.parts, self.starts, self.sizes, strict=True):
            yield part, slot[starts[expert] : starts[expert] + size]

    def tensors(self, expert: int, slot: Tensor) -> dict[str, Tensor]:
        """One expert's parameters by name, where they lie."""
        return {part.name: room.view(self.dtype).view(part.shape) for part, room in self.places(expert, slot)}

    def read(self, disk: Disk, expert: int, slot: Tensor) -> None:
        for part, room in self.places(expert, slot):
            same = part.stored == self.dtype
            whole = room if same else torch.empty(sum(s.size for s in part.spans[expert]), dtype=torch.uint8)
            at, out = 0, whole.numpy()
            for span in part.spans[expert]:
                disk.read(span, out[at : at + span.size])
                at += span.size
            if not same:
                room.view(self.dtype).copy_(whole.view(part.stored))


def _behind(part: Part, own: Tensor, expert: int, size: int) -> int:
    """Bytes from a multiple of `ALIGNED` to where the untouched model has this expert's part in memory."""
    if not own.is_meta:
        start = own.data_ptr() + expert * size
    elif part.whole and part.stored == own.dtype:  # mapped by transformers where the file has it
        start = part.spans[expert][0].start
    else:
        start = expert * size
    return start % ALIGNED // own.itemsize * own.itemsize


def _run_expert(experts: Any, own: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Output of one expert, by its parameters, for rows of hidden states."""

    def linear(x: Tensor, name: str) -> Tensor:
        matrix = own[name] if experts.is_transposed else own[name].T
        output = x.to(matrix.dtype) @ matrix
        return output + own[f"{name}_bias"] if experts.has_bias else output

    if experts.has_gate:
        inner = experts._apply_gate(linear(rows, "gate_up_proj"))
    else:
        inner = experts.act_fn(linear(rows, "up_proj"))
    return linear(inner, "down_proj")


class _Config:
    """A model's configuration as its experts see it; its own stays as it is."""

    def __init__(self, config: Any) -> None:
        self._config, self._experts_implementation = config, NAME

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


@contextmanager
def _instead(offloading: Offloading) -> Iterator[None]:
    """While open, experts have no weights of their own, and run from slots."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, _run_offloaded)
    before = []
    try:
        for layer in offloading.layers:
            experts = layer.experts
            own = dict(experts._parameters)
            before.append((experts, experts.config, own))
            for name, value in own.items():
                if value is not None:
                    experts._parameters[name] = nn.Parameter(
                        torch.empty(value.shape, dtype=value.dtype, device="meta"), requires_grad=False
                    )
            vars(experts)["config"] = foreign(_Config(experts.config), experts.config)
            vars(experts)["_lynx_offload"] = foreign(_Place(offloading, layer.index))
        yield
    finally:
        for experts, config, own in before:
            experts._parameters.update(own)
            vars(experts)["config"] = config
            vars(experts).pop("_lynx_offload", None)


class _Place:
    """Where an experts module finds its store."""

    def __init__(self, offloading: Offloading, index: int) -> None:
        self.offloading, self.index = offloading, index


def _run_offloaded(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        raise ModelError("a model whose experts are offloaded cannot be compiled: detach first, or do not compile")
    place: _Place = vars(experts)["_lynx_offload"]
    with torch.no_grad():
        return place.offloading.run(place.index, experts, hidden, indices, weights)


def _check(layers: list[MoeLayer]) -> None:
    for layer in layers:
        if layer.device.type != "cpu":
            raise ModelError(f"experts can be offloaded on a CPU only, so far: the model is on {layer.device}")
        if not hasattr(vars(layer.experts).get("config"), "_experts_implementation"):
            raise ModelError(f"layer {layer.name} has experts that run in code of their own: they cannot be offloaded")


def offload_experts(
    model: str | nn.Module,
    fast_memory: float,
    store: str | None = None,
    eviction: Eviction | None = None,
    readers: int = 4,
    dtype: str = "auto",
) -> Offloading:
    """Run a model whose experts do not fit in memory, by reading them from its checkpoint when they are needed.

    Without skipping, what it computes is what the model computes by `grouped_mm`, transformers' default, bit for bit. The
    checkpoint is only read.

    Args:
        model: folder, Hub id or `reference-moe`, of which no expert is loaded; or a model that is loaded already, which
            keeps its own experts for when it is detached.
        fast_memory: bytes for experts in memory; a float up to 1 is a share of all experts.
        store: the checkpoint of a model that is loaded; by default where it says it came from.
        eviction: which expert makes room, by default `slots.LeastRecent`.
        readers: threads that read.
        dtype: of a model that is not loaded yet, as in `load_model`.

    Raises:
        ModelError: the model or its checkpoint cannot be used so, with the reason.
        OptionError: fast memory does not hold one token's experts of a layer.
    """
    if readers < 1:
        raise OptionError(f"readers {readers} is not usable: expected 1 or more")
    if isinstance(model, str):
        loaded, checkpoint = load_without_experts(model, "cpu", dtype, tokenizer=False)
        return Offloading(loaded.model, checkpoint, fast_memory, eviction, readers, loaded)
    place = store or getattr(unwrapped(model), "name_or_path", "")
    if not place:
        raise ModelError("the model does not say where its checkpoint is: give store=, its folder or Hub id")
    return Offloading(model, Checkpoint.open(str(place)), fast_memory, eviction, readers)
