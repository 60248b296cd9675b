"""Where each expert's weights lie in a checkpoint, as spans of bytes in its safetensors files."""

import json
import re
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import ModelError
from ..moe.families import MoeLayer
from ..moe.loading import hub_commit, model_path

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Span(NamedTuple):
    """Bytes of a file."""

    file: int
    start: int
    size: int


class Stored(NamedTuple):
    """A tensor in a file."""

    span: Span
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a model, and what lies where in them."""

    folder: Path
    files: list[Path]
    tensors: dict[str, Stored]

    @classmethod
    def open(cls, name: str, revision: str | None = None) -> "Checkpoint":
        """Of a folder, a Hub id or `reference-moe`; reads headers only.

        Raises:
            ModelError: it has no safetensors files, or one of them is damaged.
        """
        path = model_path(name)
        folder = Path(path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            commit = hub_commit(path, revision)
            folder = Path(snapshot_download(path, revision=commit, allow_patterns=["*.safetensors", "*.json"]))
        files = _files(folder)
        tensors: dict[str, Stored] = {}
        for number, file in enumerate(files):
            tensors |= _header(number, file)
        return cls(folder, files, tensors)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    try:
        if not index.is_file():
            names = {SINGLE} if (folder / SINGLE).is_file() else set()
        else:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} cannot be read ({error}): copy the checkpoint again") from None
    if not names:
        others = sorted(path.name for path in folder.glob("*.bin"))
        found = f"it has {others[0]}" if others else "none is there"
        raise ModelError(
            f"checkpoint {folder} has no {SINGLE} or {INDEX} ({found}): experts are read from safetensors only; save the "
            "model again with save_pretrained"
        )
    return [folder / name for name in sorted(names)]


def _header(number: int, file: Path) -> dict[str, Stored]:
    """Tensors of a file by name (format: an 8-byte length, JSON, then the data that the offsets in it count from)."""
    try:
        with safe_open(file, "pt"):  # which checks that header and size belong together
            pass
        with open(file, "rb") as data:
            (length,) = struct.unpack("<Q", data.read(8))
            header: dict[str, Any] = json.loads(data.read(length))
    except (OSError, SafetensorError, ValueError, struct.error) as error:
        raise ModelError(f"{file} cannot be read ({error}): copy the checkpoint again") from None
    found = {}
    for name, part in header.items():
        if name != "__metadata__":
            start, end = part["data_offsets"]
            found[name] = Stored(Span(number, 8 + length + start, end - start), part["dtype"], tuple(part["shape"]))
    return found


@dataclass(frozen=True)
class Part:
    """One parameter of every expert of a layer.

    `spans[expert]` hold its values one after the other, in `stored` precision; `shape` is that of one expert.
    """

    name: str
    shape: tuple[int, ...]
    stored: torch.dtype
    spans: list[list[Span]]


def expert_parts(model: nn.Module, layers: Sequence[MoeLayer], checkpoint: Checkpoint) -> list[list[Part]]:
    """The parts of each layer's experts, in the order of the experts module's parameters.

    Names are mapped as transformers does when it loads.

    Raises:
        ModelError: the checkpoint is of another model, or keeps its experts in a layout that has to be computed with.
    """
    names = {module: name for name, module in model.named_modules()}
    sources = _sources(model, checkpoint)
    found = []
    for layer in layers:
        prefix = names[layer.experts]
        parts = []
        for name, parameter in layer.experts.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            parts.append(_part(f"{prefix}.{name}", name, shape, sources.get(f"{prefix}.{name}", {}), checkpoint))
        found.append(parts)
    return found


def _sources(model: nn.Module, checkpoint: Checkpoint) -> dict[str, dict[Any, list[str]]]:
    """Names in the checkpoint of each parameter, by the converter and pattern that they come through (None: by name)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), str(model.base_model_prefix)
    found: dict[str, dict[Any, list[str]]] = defaultdict(dict)
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        place = None if pattern is None else (by_pattern[pattern], pattern)
        found[name].setdefault(place, []).append(key)
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
    if not steps and len(keys) == 1 and stored[0].shape == shape:
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
    return Part(name, shape[1:], dtype, spans)


def _stacks(operations: Sequence[Any]) -> bool:
    """Whether the steps put matrices of one expert below each other, and experts one after the other."""
    return [step.dim for step in operations] in ([0], [0, 1])
