"""Single experts of a checkpoint: where each one's weights lie, as spans of bytes in its files, and how they are read."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..moe.families import MoeLayer
from ..moe.fp8.scaled import KIND, SCALE
from .disk import Disk
from .stored import Checkpoint, Span, Stored, sources

# Bytes between values that are read together, and how many are read at a time.
NEAR, AT_A_TIME = 2**16, 2**24
EIGHT_BITS = {"F8_E4M3": KIND}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Part:
    """One parameter of every expert of a layer.

    `spans[expert]` hold its values one after the other, in `stored` precision; `shape` is that of one expert. `whole`: all
    experts' are one tensor of the file. `scales[expert]`: for each of its spans those of the blocks of its values, if these are
    in float8.
    """

    name: str
    shape: tuple[int, ...]
    stored: torch.dtype
    spans: list[list[Span]]
    whole: bool
    scales: list[list[Stored]] | None = None

    def read(self, disk: Disk, expert: int, room: Tensor, dtype: torch.dtype) -> None:
        """Fill the bytes `room` of one expert's values in precision `dtype`.

        Raises:
            ModelError: they cannot be read.
        """
        same = self.stored == dtype
        whole = room if same else torch.empty(sum(span.size for span in self.spans[expert]), dtype=torch.uint8)
        at, out = 0, whole.numpy()
        for span in self.spans[expert]:
            disk.read(span, out[at : at + span.size])
            at += span.size
        if same:
            return
        values, into = whole.view(self.stored), room.view(dtype)
        if self.scales is None:
            into.copy_(values)
            return
        at = 0
        for number, span in enumerate(self.spans[expert]):
            scale = self._scale(disk, expert, number)
            blocks = values[at : at + span.size].view(
                scale.shape[0], -1, scale.shape[1], self.shape[-1] // scale.shape[1]
            )
            into[at : at + span.size] = (blocks.float() * scale[:, None, :, None]).flatten()
            at += span.size

    def _scale(self, disk: Disk, expert: int, number: int) -> Tensor:
        """Of the blocks of one span `(rows of blocks, columns of blocks)`, float32."""
        assert self.scales is not None
        stored = self.scales[expert][number]
        room = np.empty(stored.span.size, np.uint8)
        disk.read(stored.span, room)
        return torch.from_numpy(room).view(DTYPES[stored.dtype]).view(stored.shape).float()

    def sample(self, disk: Disk, places: Any) -> Tensor:
        """Values `(places,)` at places, rising, in the flattened tensor of all experts; in `stored` precision, or float32
        where they have scales.

        Raises:
            ModelError: they cannot be read.
        """
        located = [self._place(int(place)) for place in places]
        item = self.stored.itemsize
        found = [(span.file, span.start + behind) for span, _, _, behind in located]
        values = np.empty((len(found), item), np.uint8)
        first = 0
        for last in range(1, len(found) + 1):
            (file, start), (_, end) = found[first], found[last - 1]
            if last < len(found):
                next_file, following = found[last]
                if next_file == file and 0 <= following - end <= NEAR and following - start <= AT_A_TIME:
                    continue
            near = np.empty(end + item - start, np.uint8)
            disk.read(Span(file, start, len(near)), near)
            for row in range(first, last):
                values[row] = near[found[row][1] - start :][:item]
            first = last
        whole = torch.from_numpy(values).view(self.stored).flatten()
        return whole if self.scales is None else whole.float() * self._scales_at(disk, located)

    def _scales_at(self, disk: Disk, located: Sequence[tuple[Span, int, int, int]]) -> Tensor:
        """Of the blocks of values that `_place` has found."""
        columns, factors = self.shape[-1], []
        for (expert, number), own in groupby(located, lambda place: place[1:3]):
            scale = self._scale(disk, expert, number)
            rows, columns_of_blocks = scale.shape
            high, wide = self.spans[expert][number].size // columns // rows, columns // columns_of_blocks
            factors += [scale[behind // columns // high, behind % columns // wide] for *_, behind in own]
        return torch.stack(factors)

    def _place(self, place: int) -> tuple[Span, int, int, int]:
        """The span of a value, its expert, the number of the span there, and the bytes before it in it."""
        expert, number = divmod(place, torch.Size(self.shape).numel())
        behind = number * self.stored.itemsize
        for which, span in enumerate(self.spans[expert]):
            if behind < span.size:
                return span, expert, which, behind
            behind -= span.size
        raise AssertionError(f"{self.name} has no place {place}")


def expert_parts(model: nn.Module, layers: Sequence[MoeLayer], checkpoint: Checkpoint) -> list[list[Part]]:
    """The parts of each layer's experts, in the order of the experts module's parameters.

    Names are mapped as transformers does when it loads.

    Raises:
        ModelError: the checkpoint is of another model, or keeps its experts in a layout that has to be computed with.
    """
    names = {module: name for name, module in model.named_modules()}
    known = sources(model, checkpoint)
    return [parts_of(names[layer.experts], layer.experts, known, checkpoint) for layer in layers]


def parts_of(
    prefix: str, experts: nn.Module, known: Mapping[str, dict[Any, list[str]]], checkpoint: Checkpoint
) -> list[Part]:
    """The same of one experts module by its name, and what `stored.sources` says of the model.

    Raises:
        ModelError: as `expert_parts`.
    """
    return [
        _part(f"{prefix}.{name}", name, tuple(value.shape), known.get(f"{prefix}.{name}", {}), checkpoint)
        for name, value in experts.named_parameters(recurse=False)
    ]


def _part(full: str, name: str, shape: tuple[int, ...], sources: dict[Any, list[str]], checkpoint: Checkpoint) -> Part:
    experts, folder, tensors = shape[0], checkpoint.folder, checkpoint.tensors
    # The scales of blocks come through patterns of their own.
    plain = {place: keys for place, own in sources.items() if (keys := [key for key in own if not key.endswith(SCALE)])}
    if not plain:
        raise ModelError(f"checkpoint {folder} has no weights for {full}: it is of another model")
    keys = [key for part in plain.values() for key in part]
    dtypes = {tensors[key].dtype for key in keys}
    scaled = any(len(own) for place, own in sources.items() if place not in plain)
    if len(dtypes) > 1 or not dtypes <= (EIGHT_BITS if scaled else DTYPES).keys():
        raise ModelError(
            f"checkpoint {folder} keeps {full} as {', '.join(sorted(dtypes))}: expected one of {', '.join(DTYPES)}"
        )
    converter: Any = next((place[0] for place in plain if place is not None), None)
    # What multiplies with scales comes first, and leaves alone what has none.
    operations = [step for step in converter.operations if type(step).__name__ != "Fp8Dequantize"] if converter else []
    steps = [re.sub(r"[^\w]", "", type(step).__name__) for step in operations]
    stacked = not steps and len(keys) == 1 and tensors[keys[0]].shape == shape and not scaled
    scales: list[list[Stored]] | None = None
    if stacked:
        whole, size = tensors[keys[0]].span, tensors[keys[0]].span.size // experts
        spans = [[whole._replace(start=whole.start + e * size, size=size)] for e in range(experts)]
    elif steps in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and _stacks(operations):
        # Of each source pattern one tensor for every expert, whose rows come one after the other.
        ordered = [plain[converter, pattern] for pattern in converter.source_patterns if (converter, pattern) in plain]
        if any(len(part) != experts for part in ordered):
            raise ModelError(f"checkpoint {folder} does not have {experts} experts for {full}: it is of another model")
        spans = [[tensors[part[e]].span for part in ordered] for e in range(experts)]
        if scaled:
            scales = [[_scales(part[e], full, checkpoint) for part in ordered] for e in range(experts)]
    else:
        done = ", ".join(steps) or f"shape {tensors[keys[0]].shape}"
        raise ModelError(
            f"checkpoint {folder} keeps {full} in a layout that transformers converts when it loads ({done}), so that no "
            "expert can be read on its own: save the loaded model again with save_pretrained(save_original_format=False)"
        )
    dtype = (EIGHT_BITS if scaled else DTYPES)[tensors[keys[0]].dtype]
    wanted = torch.Size(shape[1:]).numel() * dtype.itemsize
    if any(sum(span.size for span in own) != wanted for own in spans):
        raise ModelError(f"checkpoint {folder} has {full} in another size than the model: it is of another model")
    return Part(name, shape[1:], dtype, spans, stacked, scales)


def _scales(key: str, full: str, checkpoint: Checkpoint) -> Stored:
    """Of the blocks of a weight in float8, which are as many as fit it.

    Raises:
        ModelError: there are none, or others.
    """
    found, weight = checkpoint.tensors.get(f"{key}{SCALE}"), checkpoint.tensors[key]
    if found is None or found.dtype not in DTYPES or len(found.shape) != 2 or len(weight.shape) != 2:
        raise ModelError(f"checkpoint {checkpoint.folder} keeps {full} in float8 without scales of its blocks")
    if any(side % count for side, count in zip(weight.shape, found.shape, strict=True)):
        raise ModelError(f"checkpoint {checkpoint.folder} keeps {full} in float8 with blocks that do not fill it")
    return found


def _stacks(operations: Sequence[Any]) -> bool:
    """Whether the steps put matrices of one expert below each other, and experts one after the other."""
    return [step.dim for step in operations] in ([0], [0, 1])


class OneExpert:
    """Experts of a layer, of which the one that was read last is in memory.

    Args:
        parts: as `expert_parts` gives them.
        disk: its files, open.
        dtype, device: of the weights that are given.
    """

    def __init__(self, parts: Sequence[Part], disk: Disk, dtype: torch.dtype, device: torch.device) -> None:
        self.parts, self.disk, self.dtype, self.device = parts, disk, dtype, device
        self.held: tuple[int, dict[str, Tensor]] | None = None

    def weights(self, expert: int) -> dict[str, Tensor]:
        """Parameters by name.

        Raises:
            ModelError: they cannot be read.
        """
        if self.held is None or self.held[0] != expert:
            self.held = None  # before there is another
            self.held = expert, {part.name: self._read(part, expert) for part in self.parts}
        return self.held[1]

    def samples(self) -> Iterator[tuple[str, "Sampled"]]:
        """All experts' values by name, of which those that are asked for are read."""
        for part in self.parts:
            yield part.name, Sampled(part, self.disk, self.dtype)

    def _read(self, part: Part, expert: int) -> Tensor:
        whole = torch.empty(part.shape, dtype=self.dtype)
        part.read(self.disk, expert, whole.flatten().view(torch.uint8), self.dtype)
        return whole.to(self.device)


class Sampled:
    """One parameter of all experts `(experts, *shape)`, whose values are read where they are asked for."""

    def __init__(self, part: Part, disk: Disk, dtype: torch.dtype) -> None:
        self.part, self.disk, self.dtype = part, disk, dtype

    def numel(self) -> int:
        return len(self.part.spans) * torch.Size(self.part.shape).numel()

    def at(self, places: Any) -> Tensor:
        """Values at places, rising, in the flattened tensor, as they are in `dtype`; float32.

        Raises:
            ModelError: they cannot be read.
        """
        return self.part.sample(self.disk, places).to(self.dtype).float()
