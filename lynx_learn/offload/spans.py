"""Where each expert's weights lie in a checkpoint, as spans of bytes in its files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoint.stored import Checkpoint, Span, sources
from ..errors import ModelError
from ..moe.families import MoeLayer

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Part:
    """One parameter of every expert of a layer.

    `spans[expert]` hold its values one after the other, in `stored` precision; `shape` is that of one expert. `whole`: all
    experts' are one tensor of the file.
    """

    name: str
    shape: tuple[int, ...]
    stored: torch.dtype
    spans: list[list[Span]]
    whole: bool


def expert_parts(model: nn.Module, layers: Sequence[MoeLayer], checkpoint: Checkpoint) -> list[list[Part]]:
    """The parts of each layer's experts, in the order of the experts module's parameters.

    Names are mapped as transformers does when it loads.

    Raises:
        ModelError: the checkpoint is of another model, or keeps its experts in a layout that has to be computed with.
    """
    names = {module: name for name, module in model.named_modules()}
    known = sources(model, checkpoint)
    found = []
    for layer in layers:
        prefix = names[layer.experts]
        parts = []
        for name, parameter in layer.experts.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            parts.append(_part(f"{prefix}.{name}", name, shape, known.get(f"{prefix}.{name}", {}), checkpoint))
        found.append(parts)
    return found


def _part(full: str, name: str, shape: tuple[int, ...], sources: dict[Any, list[str]], checkpoint: Checkpoint) -> Part:
    experts, folder = shape[0], checkpoint.folder
    if not sources:
        raise ModelError(f"checkpoint {folder} has no weights for {full}: it is of another model")
    keys = [key for part in sources.values() for key in part]
    stored = [checkpoint.tensors[key] for key in keys]
    dtypes = {tensor.dtype for tensor in stored}
    if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
        raise ModelError(
            f"checkpoint {folder} keeps {full} as {', '.join(sorted(dtypes))}: expected one of {', '.join(DTYPES)}"
        )
    converter: Any = next((place[0] for place in sources if place is not None), None)
    steps = [re.sub(r"[^\w]", "", type(step).__name__) for step in converter.operations] if converter else []
    stacked = not steps and len(keys) == 1 and stored[0].shape == shape
    if stacked:
        whole, size = stored[0].span, stored[0].span.size // experts
        spans = [[whole._replace(start=whole.start + e * size, size=size)] for e in range(experts)]
    elif steps in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and _stacks(converter.operations):
        # Of each source pattern one tensor for every expert, whose rows come one after the other.
        ordered = [
            sources[converter, pattern] for pattern in converter.source_patterns if (converter, pattern) in sources
        ]
        if any(len(part) != experts for part in ordered):
            raise ModelError(f"checkpoint {folder} does not have {experts} experts for {full}: it is of another model")
        spans = [[checkpoint.tensors[part[e]].span for part in ordered] for e in range(experts)]
    else:
        done = ", ".join(steps) or f"shape {stored[0].shape}"
        raise ModelError(
            f"checkpoint {folder} keeps {full} in a layout that transformers converts when it loads ({done}), so that no "
            "expert can be read on its own: save the loaded model again with save_pretrained(save_original_format=False)"
        )
    dtype = DTYPES[stored[0].dtype]
    wanted = torch.Size(shape[1:]).numel() * dtype.itemsize
    if any(sum(span.size for span in own) != wanted for own in spans):
        raise ModelError(f"checkpoint {folder} has {full} in another size than the model: it is of another model")
    return Part(name, shape[1:], dtype, spans, stacked)


def _stacks(operations: Sequence[Any]) -> bool:
    """Whether the steps put matrices of one expert below each other, and experts one after the other."""
    return [step.dim for step in operations] in ([0], [0, 1])
