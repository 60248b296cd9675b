"""The trace directory: what `collect` writes and `train` reads.

    manifest.json            written last; its presence means the trace is complete
    options.json             written first; what an interrupted run must match to go on
    index/00000.safetensors  per shard: token, sequence, position, phase and source of each token; in its metadata the
                             checksums of the shard's other files, by which an interrupted run knows what is whole,
                             and how many of its tokens each expert has
    layer-00/00000.safetensors  per MoE layer and shard: hidden, logits, indices, weights; where hidden states are in eight
                             bits, also hidden_scale

Every file is written under a temporary name, flushed and renamed.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import TraceError
from ..files import MARK, PART, RunFolder, checksum, digest, read_object
from ..moe.identity import Identity, is_identity
from .packing import SCALE, SCALED, hidden_bytes, pack, unpack

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
# Of an index: the checksums of the shard's files, and the tokens of each expert by layer.
ABOUT = "shard"
PHASES = ("prompt", "generated", "teacher", "unknown")
LAYER_TENSORS = ("hidden", "logits", "indices", "weights")
INDEX_TENSORS = ("tokens", "sequence", "position", "phase", "source")


@dataclass(frozen=True, kw_only=True)
class TracedModel:
    """What a trace says of the model that it is of."""

    model: str
    revision: str
    model_type: str
    identity: Identity
    layers: tuple[str, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    expert_bytes: int
    dtype: str
    """Of the model's weights, and of the hidden states that a trace gives back."""


@dataclass(frozen=True, kw_only=True)
class TraceOptions(TracedModel):
    """Everything that decides a trace's content."""

    engine: str = "transformers"
    corpus: str
    split: str
    mode: str
    tokens: int
    """At most; 0 without a limit, which only a target can do without."""
    tokens_per_expert: int = 0
    """Target of every expert of every layer; 0 without one."""
    length: int
    prompt: int
    bos: str
    sequences_per_shard: int
    seed: int
    content: str = "whole"
    """What layers hold: whole, or routes: `indices` alone, see `routes`."""
    hidden_dtype: str = "auto"
    """What hidden states are stored in; auto: the model's."""
    format_version: int = FORMAT_VERSION

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all files, headers aside."""
        hidden = hidden_bytes(self.hidden_size, getattr(torch, self.dtype).itemsize, self.hidden_dtype)
        return bytes_per_token(len(self.layers), hidden, self.num_experts, self.top_k)


def bytes_per_token(layers: int, hidden: int, experts: int, top_k: int) -> int:
    """Bytes of one token in all files of a trace of a model of this shape, whose hidden states take so many bytes each."""
    return layers * (hidden + 4 * experts + top_k * (2 + 4)) + 4 + 4 + 4 + 1 + 2


def shard_names(layers: int, shard: int) -> list[str]:
    """Files of one shard in the order they are written: one for each layer, then the index."""
    file = f"{shard:05d}.safetensors"
    return [*(f"layer-{i:02d}/{file}" for i in range(layers)), f"index/{file}"]


class TraceWriter(RunFolder):
    """Writes shards into a folder, going on where an interrupted run with the same options stopped.

    Nothing is written before the first shard.

    Raises:
        OptionError: the folder holds something else, or cannot be written to.
    """

    def __init__(self, folder: Path, options: TraceOptions, by: str = "") -> None:
        super().__init__(folder, asdict(options), "a trace", by)
        self.options = options

    @property
    def complete(self) -> bool:
        return (self.folder / MANIFEST).exists()

    def written(self, shard: int) -> tuple[dict[str, Tensor], list[str]] | None:
        """The index of a shard whose files are all there, and the checksums that it was written with; else None."""
        *layers, index = (self.folder / name for name in shard_names(len(self.options.layers), shard))
        try:
            with safe_open(index, "pt") as file:
                sums = [str(value) for value in json.loads(file.metadata()[ABOUT])["sha256"]]
                tensors = {key: file.get_tensor(key) for key in INDEX_TENSORS}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        whole = len(sums) == len(layers) + 1 and all(path.is_file() for path in layers)
        return (tensors, sums) if whole else None

    def stored(self, shard: int) -> dict[str, Tensor] | None:
        """The index of a shard that is there whole, or None: a crash of the machine may have damaged any file."""
        if (there := self.written(shard)) is None:
            return None
        tensors, expected = there
        names = shard_names(len(self.options.layers), shard)[:-1]
        try:
            found = [*(checksum(self.folder / name) for name in names), digest(save(tensors))]
        except OSError:
            return None
        return tensors if found == expected else None

    def assigned(self, shard: int) -> Tensor | None:
        """Tokens of each expert `(layers, experts)` in a shard whose files are all there; else None."""
        return None if self.written(shard) is None else assigned(self.folder, shard)

    def last(self) -> int:
        """The highest number of the shards whose index is there; -1 where there is none."""
        return max((int(path.stem) for path in self.folder.glob("index/*.safetensors")), default=-1)

    def write(self, shard: int, layers: list[dict[str, Tensor]], index: dict[str, Tensor]) -> None:
        layers = [pack(tensors, self.options.hidden_dtype) for tensors in layers]
        files = [save({k: v.contiguous() for k, v in tensors.items()}) for tensors in (*layers, index)]
        assigned = [count_tokens(tensors["indices"], self.options.num_experts).tolist() for tensors in layers]
        # As one value: safetensors writes several in any order.
        about = json.dumps({"sha256": [digest(data) for data in files], "assigned": assigned})
        files[-1] = save({k: v.contiguous() for k, v in index.items()}, {ABOUT: about})
        for name, data in zip(shard_names(len(self.options.layers), shard), files, strict=True):
            self.put(name, data)

    def finish(self, shards: int, sources: list[str], phases: dict[str, int]) -> None:
        """Write the manifest, with the checksums that files were written with.

        Raises:
            TraceError: a shard is not there.
        """
        files: dict[str, str] = {}
        for shard in range(shards):
            *layers, index = shard_names(len(self.options.layers), shard)
            if (there := self.written(shard)) is None:
                raise TraceError(f"{self.folder / index} is not there whole: collect again with the same options")
            files |= {**dict(zip(layers, there[1][:-1], strict=True)), index: checksum(self.folder / index)}
        tokens = sum(phases.values())
        fewest = torch.stack([assigned(self.folder, shard) for shard in range(shards)]).sum(0).amin(-1).tolist()
        manifest = {
            **asdict(self.options),
            "shards": shards,
            "collected_tokens": tokens,
            **({"fewest": fewest} if self.options.tokens_per_expert else {}),
            "sources": sources,
            "phases": phases,
            "sha256": files,
        }
        self.put_json(MANIFEST, manifest)

    def trim(self) -> None:
        """Of a complete trace: remove shards that it does not have, made by a process that was ahead of the others."""
        end, own = int(read_object(self.folder / MANIFEST)["shards"]), f".safetensors{self.by}{PART}"
        for path in self.folder.glob("*/*"):
            number = path.name.lstrip(".").partition(".")[0]
            if number.isdigit() and int(number) >= end and (path.name[0] != "." or path.name.endswith(own)):
                path.unlink(missing_ok=True)


def count_tokens(indices: Tensor, experts: int) -> Tensor:
    """How many of the tokens `(tokens, top_k)` go to each expert; an index that is none is found when the trace is read."""
    known = indices[(indices >= 0) & (indices < experts)]
    return torch.bincount(known, minlength=experts)


def assigned(folder: Path, shard: int) -> Tensor:
    """Tokens of each expert `(layers, experts)` in a shard that is there."""
    with safe_open(folder / f"index/{shard:05d}.safetensors", "pt") as file:
        return torch.tensor(json.loads(file.metadata()[ABOUT])["assigned"])


class Trace:
    """A complete trace directory, read shard by shard from memory-mapped files."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.shards = int(manifest.pop("shards"))
        self.collected_tokens = int(manifest.pop("collected_tokens"))
        self.sources: list[str] = manifest.pop("sources")
        self.phases: dict[str, int] = manifest.pop("phases")
        self.fewest = [int(count) for count in manifest.pop("fewest", [])]
        """Of each layer the tokens of its rarest expert, where there was a target."""
        self.sha256: dict[str, str] = manifest.pop("sha256")
        self.options = TraceOptions(**{**manifest, "layers": tuple(manifest["layers"])})
        for field in fields(self.options):
            value = getattr(self.options, field.name)
            if field.type in (int, str) and type(value) is not field.type:
                raise TypeError(f"{field.name} is {value!r}")
        if not all(isinstance(name, str) for name in (*self.options.layers, *self.sources, *self.sha256)):
            raise TypeError("a layer, source or file has no name")

    @classmethod
    def open(cls, folder: str | os.PathLike[str], verify: bool = True, routes: bool = False) -> "Trace":
        """Open a trace and verify every file's checksum, or none: of one whose manifest has just been made, or see `verify`.

        Args:
            routes: one that holds routes alone will do.

        Raises:
            TraceError: it is missing, incomplete, of another format, holds routes alone, or a file is damaged; named.
        """
        path = Path(folder)
        if not (path / MANIFEST).exists():
            state = (
                "is not complete: run `lynx-learn collect` again with the same options"
                if (path / MARK).exists()
                else "holds no trace: `lynx-learn collect` writes one"
            )
            raise TraceError(f"{path} {state}")
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            if manifest.get("format_version") != FORMAT_VERSION:
                raise TraceError(
                    f"{path} has trace format {manifest.get('format_version')}, this package reads {FORMAT_VERSION}: collect again"
                )
            trace = cls(path, manifest)
            if trace.routes_only and not routes:
                raise TraceError(
                    f"{path} holds imported routes alone, without hidden states and logits: write a whole trace of "
                    f"{trace.options.model} with `lynx-learn collect`"
                )
            if not is_identity(trace.options.identity):
                raise ValueError("its identity is none")
            layers, listed = len(trace.options.layers), trace.sha256.keys()
            wanted = (name for shard in range(trace.shards) for name in shard_names(layers, shard))
            if len(listed) != trace.shards * (layers + 1) or any(name not in listed for name in wanted):
                raise ValueError("the files listed are not those of its shards and layers")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise TraceError(f"{path / MANIFEST} is damaged ({error}): collect again") from None
        if verify:
            trace.verify(range(layers))
        return trace

    def verify(self, layers: Iterable[int]) -> None:
        """Compare the checksums of these layers' files, and of the index, with the manifest.

        Raises:
            TraceError: a file is missing or damaged; named.
        """
        folders = {"index", *(f"layer-{layer:02d}" for layer in layers)}
        for name, expected in self.sha256.items():
            file = self.folder / name
            if name.partition("/")[0] in folders and (not file.exists() or checksum(file) != expected):
                state = "is damaged" if file.exists() else "is missing"
                raise TraceError(
                    f"{file} {state} (checksum differs from the manifest): remove {self.folder} and collect again"
                )

    def layer_shards(self, layer: int, keys: tuple[str, ...] = LAYER_TENSORS) -> Iterator[dict[str, Tensor]]:
        """The layer's tensors, or some of them, shard by shard; `indices` always, hidden states in the model's dtype.

        Raises:
            TraceError: a value is not finite, or an index is no expert.
        """
        for shard in range(self.shards):
            name = f"layer-{layer:02d}/{shard:05d}.safetensors"
            scaled = "hidden" in keys and self.options.hidden_dtype in SCALED
            tensors = self._load(name, (*keys, SCALE) if scaled else keys)
            if "hidden" in keys:
                tensors = unpack(tensors, getattr(torch, self.options.dtype))
            for key in {"hidden", "logits", "weights"} & tensors.keys():
                if not torch.isfinite(tensors[key]).all():
                    raise TraceError(
                        f"{self.folder / name}: {key} holds values that are not finite; the model overflowed: collect in --dtype float32"
                    )
            indices = tensors["indices"] = tensors["indices"].long()
            if int(indices.min()) < 0 or int(indices.max()) >= self.options.num_experts:
                raise TraceError(
                    f"{self.folder / name}: indices name experts outside 0 to {self.options.num_experts - 1}: collect again"
                )
            yield tensors

    @property
    def routes_only(self) -> bool:
        """Whether it says which experts were routed to, and nothing else."""
        return self.options.content == "routes"

    @property
    def reached(self) -> bool:
        """Whether every expert has as many tokens as it should."""
        return min(self.fewest, default=0) >= self.options.tokens_per_expert

    def assigned(self) -> Tensor:
        """Tokens of each expert `(layers, experts)`."""
        return torch.stack([assigned(self.folder, shard) for shard in range(self.shards)]).sum(0)

    def index(self) -> dict[str, Tensor]:
        """Token, sequence, position, phase and source of every token, each `(tokens,)`."""
        parts = [self._load(f"index/{shard:05d}.safetensors", INDEX_TENSORS) for shard in range(self.shards)]
        return {key: torch.cat([part[key] for part in parts]).long() for key in INDEX_TENSORS}

    def _load(self, name: str, keys: tuple[str, ...]) -> dict[str, Tensor]:
        try:
            with safe_open(self.folder / name, "pt") as file:
                return {key: file.get_tensor(key) for key in keys}
        except (OSError, SafetensorError) as error:
            raise TraceError(
                f"{self.folder / name} cannot be read ({error}): remove {self.folder} and collect again"
            ) from None
