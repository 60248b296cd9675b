"""What lies where in the safetensors files of a model, and which of its parameters each tensor is for."""

import json
import struct
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import ModelError
from ..moe.loading import hub_commit, model_path

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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
            f"checkpoint {folder} has no {SINGLE} or {INDEX} ({found}): weights are read from safetensors only; save the "
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


def sources(model: nn.Module, checkpoint: Checkpoint, quantizer: Any = None) -> dict[str, dict[Any, list[str]]]:
    """Names in the checkpoint of each parameter, by the converter and pattern that they come through (None: by name).

    Names are mapped as transformers does when it loads, by a quantizer as well if the checkpoint needs one; the model needs
    no weights.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)  # type: ignore[arg-type]
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
