"""Fast memory: experts of all layers in slots, what is missing read by threads, and what comes next read ahead.

What it is filled from is the checkpoint on disk or, for a model on a GPU, a copy of all experts in the host's memory.

The order of a layer is Klotski's (arXiv 2502.06888): what the router has chosen and fast memory lacks is requested at
once; experts that are there run while it is read, and the others in the order in which they arrive.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from ..checkpoint.disk import Disk
from ..checkpoint.experts import Part
from ..checkpoint.stored import Checkpoint
from ..errors import OptionError
from ..moe.families import MoeLayer
from .slots import Eviction, LeastRecent, Slots

# Some CPUs' BLAS rounds by where operands begin, up to multiples of this.
ALIGNED = 64
# A layer, and the experts that it is expected to need, likeliest first.
Foreseen = tuple[int, list[int]]


@dataclass
class OffloadStats:
    """What was read since the last `reset`.

    Attributes:
        bytes_read: of expert weights, from disk or the host's memory.
        prefetched_bytes, unused_bytes: of these, what was read ahead, and what of that its layer did not need then.
        wanted, hits: experts that layers ran, and how many of them lay in fast memory when the gate had chosen.
        wait_seconds: of each layer, for reads that nothing was left to be computed beside.
    """

    bytes_read: int = 0
    prefetched_bytes: int = 0
    unused_bytes: int = 0
    wanted: int = 0
    hits: int = 0
    wait_seconds: list[float] = field(default_factory=list)


class FastMemory:
    """Slots and what fills them. One caller at a time; its own threads only read.

    Args:
        parts: of each layer, see `checkpoint.experts.expert_parts`.
        fast_memory: bytes; a float up to 1 is a share of all experts.
        eviction: which expert makes room, by default `LeastRecent`.
        readers: threads that read.
        host: fill slots from the host's memory, which is filled from disk once; for layers on a GPU the only way.

    Raises:
        OptionError: it does not hold one token's experts of a layer.
    """

    def __init__(
        self,
        layers: Sequence[MoeLayer],
        parts: Sequence[list[Part]],
        fast_memory: float,
        eviction: Eviction | None,
        readers: int,
        host: bool = False,
    ) -> None:
        self.layers, self.readers, self.host, self.device = layers, readers, host, layers[0].device
        self.views = [_Views(layer, own) for layer, own in zip(layers, parts, strict=True)]
        self.slot_bytes = max(views.bytes for views in self.views)
        experts = max(layer.num_experts for layer in layers)
        self.slots = Slots(self._count(fast_memory, experts), len(layers), experts, eviction or LeastRecent())
        self.room = torch.empty(0, dtype=torch.uint8)
        self.ahead: dict[Future[None], tuple[int, int, int]] = {}
        """Layer, expert and slot of what is being read before its layer asks."""
        self.late: dict[Future[None], tuple[int, int, int]] = {}
        """The same of reads that were under way when their layer did not need them."""
        self.reset()

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

    @contextmanager
    def opened(self, checkpoint: Checkpoint) -> Iterator[None]:
        """While open, experts can be read from a checkpoint; all slots are empty at first.

        Raises:
            ModelError: its files cannot be opened, or read.
        """
        with ExitStack() as stack:
            self.disk = Disk(checkpoint.files)
            stack.callback(self.disk.close)
            self.copies = HostCopies(self.views, self.disk, self.slot_bytes, self.device) if self.host else None
            stack.callback(setattr, self, "copies", None)
            self.pool = stack.enter_context(ThreadPoolExecutor(self.readers, "lynx-read"))
            size = self.slots.count * self.slot_bytes + ALIGNED
            self.room = torch.empty(size, dtype=torch.uint8, device=self.device)
            stack.callback(self._give_back)
            yield

    def _give_back(self) -> None:
        self.forget_ahead()
        for slot in range(self.slots.count):
            self.slots.empty(slot)
        self.room = torch.empty(0, dtype=torch.uint8)

    def weights(self, index: int, expert: int, slot: int) -> dict[str, Tensor]:
        """Parameters by name of the expert of layer `index` that a slot holds."""
        return self.views[index].tensors(expert, self._slot(slot))

    def in_order(
        self, index: int, wanted: Sequence[int], foresee: Callable[[], Foreseen] | None = None
    ) -> Iterator[tuple[int, int]]:
        """Experts of layer `index` and their slots as they can run: what is held, then what arrives.

        Args:
            foresee: what the next layer will need; asked once nothing of this one is left to be requested, and read behind
                it. It takes no slot of what this layer still needs.

        Raises:
            ModelError: an expert cannot be read.
        """
        slots, stats = self.slots, self.stats
        reading = self._take_ahead(index, set(wanted))
        coming = {expert for expert, _ in reading.values()}
        held = deque((e, slots.pin(index, e)) for e in wanted if e not in coming and slots.where[index, e] >= 0)
        missing = deque(e for e in wanted if slots.where[index, e] < 0)
        stats.wanted += len(wanted)
        stats.hits += len(held)

        def request() -> None:
            nonlocal foresee
            while missing:
                slot = slots.claim(index, missing[0])
                if slot is None:
                    return
                e = missing.popleft()
                reading[self._submit(index, e, slot)] = e, slot
            if foresee is not None:
                foreseen, foresee = foresee(), None
                self._read_ahead(*foreseen)

        try:
            request()
            while held:
                yield held[0]
                slots.release(held.popleft()[1])
                if missing:
                    request()
            while reading or missing:
                if not reading:  # what is read ahead has all slots
                    self.forget_ahead()
                    request()
                start = perf_counter()
                done, _ = wait(reading, return_when=FIRST_COMPLETED)
                stats.wait_seconds[index] += perf_counter() - start
                for future in sorted(done, key=lambda future: reading[future]):
                    e, slot = reading[future]
                    future.result()
                    del reading[future]
                    self._count_read(index, ahead=e in coming)
                    yield e, slot
                    slots.release(slot)
                    if missing:
                        request()
        finally:  # after an error: nothing is on its way, and nothing half-filled counts as held
            if reading:
                self.forget_ahead()
            wait(reading)
            for _, slot in reading.values():
                slots.empty(slot)
            for _, slot in held:
                slots.release(slot)

    def _read_ahead(self, index: int, experts: list[int]) -> None:
        slots = self.slots
        # What is foreseen and there already makes no room for the rest.
        keep = [slot for slot in slots.where[index, experts] if slot >= 0 and not slots.pinned[slot]]
        slots.pinned[keep] = True
        for e in experts:
            if slots.where[index, e] < 0:
                slot = slots.claim(index, e)
                if slot is None:
                    break
                self.ahead[self._submit(index, e, slot)] = index, e, slot
        slots.pinned[keep] = False

    def _take_ahead(self, index: int, wanted: set[int]) -> dict[Future[None], tuple[int, int]]:
        """What was read ahead for a layer that is now known to need these: needed reads that are still under way."""
        coming: dict[Future[None], tuple[int, int]] = {}
        for future in [future for future, (layer, _, _) in self.ahead.items() if layer == index]:
            _, e, slot = self.ahead.pop(future)
            if future.done():
                self._settle(future, index, slot, e in wanted)
            elif e in wanted:
                coming[future] = e, slot
            elif future.cancel():
                self.slots.empty(slot)
            else:
                self.late[future] = index, e, slot
        for future, (layer, e, slot) in list(self.late.items()):
            needed = layer == index and e in wanted
            if not (needed or future.done()):
                continue
            del self.late[future]
            if future.done():
                self._settle(future, layer, slot, needed)
            else:  # foreseen in vain by an earlier step, and still under way
                coming[future] = e, slot
        return coming

    def _settle(self, future: Future[None], index: int, slot: int, used: bool) -> None:
        """A read ahead has ended. One that failed is tried again when it is needed."""
        if future.exception() is not None:
            self.slots.empty(slot)
            return
        self.slots.release(slot)
        self._count_read(index, ahead=True)
        self.stats.unused_bytes += 0 if used else self.views[index].stored_bytes

    def _count_read(self, index: int, ahead: bool) -> None:
        size = self.views[index].stored_bytes
        self.stats.bytes_read += size
        self.stats.prefetched_bytes += size if ahead else 0

    def forget_ahead(self) -> None:
        """Let nothing be read ahead any more."""
        for future, (index, _, slot) in [*self.ahead.items(), *self.late.items()]:
            if future.cancel():
                self.slots.empty(slot)
            else:
                wait([future])
                self._settle(future, index, slot, False)
        self.ahead, self.late = {}, {}

    def _slot(self, slot: int) -> Tensor:
        start = -self.room.data_ptr() % ALIGNED + slot * self.slot_bytes
        return self.room[start : start + self.slot_bytes]

    def _submit(self, index: int, expert: int, slot: int) -> Future[None]:
        """Let a thread fill a slot."""
        if self.copies is None:
            return self.pool.submit(self.views[index].read, self.disk, expert, self._slot(slot))
        return self.pool.submit(self.copies.read, index, expert, self._slot(slot), self.copies.now())


class HostCopies:
    """All experts in the host's memory, each laid out as in a slot; pinned where a GPU is to read them.

    Raises:
        ModelError: an expert cannot be read from disk.
    """

    def __init__(self, views: Sequence["_Views"], disk: Disk, slot_bytes: int, device: torch.device) -> None:
        self.device, on_gpu = device, device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        count = max(own.experts for own in views)
        self.room = torch.empty(len(views), count, slot_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        for index, own in enumerate(views):
            for expert in range(own.experts):
                own.read(disk, expert, self.room[index, expert])

    def now(self) -> "torch.cuda.Event | None":
        """When the device has done what it was given so far, and with it all that still reads a slot given away now."""
        return None if self.stream is None else torch.cuda.current_stream(self.device).record_event()

    def read(self, index: int, expert: int, slot: Tensor, free: "torch.cuda.Event | None") -> None:
        """Fill a slot, once `free` has come; returns when it is filled."""
        whole = self.room[index, expert]
        if self.stream is None or free is None:
            slot.copy_(whole)
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(free)
            slot.copy_(whole, non_blocking=True)
            done = self.stream.record_event()
        done.synchronize()


class _Views:
    """How one layer's experts lie in a slot: as far behind a multiple of `ALIGNED` as in the untouched model's memory."""

    def __init__(self, layer: MoeLayer, parts: list[Part]) -> None:
        self.parts, self.dtype, self.experts = parts, layer.dtype, layer.num_experts
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
            part.read(disk, expert, room, self.dtype)


def _behind(part: Part, own: Tensor, expert: int, size: int) -> int:
    """Bytes from a multiple of `ALIGNED` to where the untouched model has this expert's part in memory."""
    if not own.is_meta:
        start = own.data_ptr() + expert * size
    elif part.whole and part.stored == own.dtype:  # mapped by transformers where the file has it
        start = part.spans[expert][0].start
    else:
        start = expert * size
    return start % ALIGNED // own.itemsize * own.itemsize
