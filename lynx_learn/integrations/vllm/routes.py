"""`lynx-learn import-routes`: which experts an engine has routed tokens to, as it says so itself, made into a trace.

vLLM returns them where it is started with `enable_return_routed_experts`: of each request the experts of its tokens, without
logits or hidden states. That is enough for what counts experts, and for nothing that learns.
"""

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from ...errors import TraceError
from ...files import check_empty, staged
from ...moe.loading import model_path
from ...traces.format import PHASES, Trace, TraceOptions, TraceWriter
from .collect import Structure, read_structure

KINDS = (".npy", ".npz", ".safetensors")
REQUESTS_PER_SHARD = 64


@dataclass(frozen=True)
class ImportRoutesOptions:
    """Make a trace for replay and simulate of the experts that vLLM returns with its requests."""

    files: str
    """.npy, .npz or .safetensors file, or a folder of them: each array the experts of a request (tokens, layers, top-k)"""
    model: str
    """folder, Hub id or file of the configuration of the model that was served, or reference-moe; no weights are read"""
    out: str
    """folder for the trace"""


def import_routes(options: ImportRoutesOptions) -> Trace:
    """Write the trace directory `options.out`, and return it opened.

    Arrays have as many layers as the model has MoE layers, or as it has decoder layers: vLLM returns rows for all of them,
    with nothing in those that have no experts.

    Raises:
        ModelError: there is no configuration of an MoE model.
        OptionError: the folder holds something, or cannot be written into.
        TraceError: a file cannot be read, or an array is not what the model has routed; nothing is written.
    """
    out, path = Path(options.out), Path(options.files)
    check_empty(out)
    model = read_structure(options.model, model_path(options.model))
    requests = (_routes(array, name, model) for name, array in read_arrays(path))
    first = next(requests, None)
    if first is None:
        raise TraceError(f"{path} holds no arrays: expected one for each request")
    with staged(out) as part:
        writer = TraceWriter(part, _describe(options, model, first.shape[-1]))
        shards, sequences, tokens = 0, 0, 0
        whole = chain([first], requests)
        while chunk := list(islice(whole, REQUESTS_PER_SHARD)):
            if any(own.shape[-1] != first.shape[-1] for own in chunk):
                raise TraceError(f"{path} has requests of several top-k: expected those of one model")
            joined = torch.cat(chunk, dim=1)
            writer.write(shards, [{"indices": own} for own in joined.to(torch.int16)], _index(chunk, sequences))
            shards, sequences, tokens = shards + 1, sequences + len(chunk), tokens + joined.shape[1]
        writer.finish(shards, [path.name], {"unknown": tokens})
    return Trace.open(out, verify=False, routes=True)


def _describe(options: ImportRoutesOptions, model: Structure, top_k: int) -> TraceOptions:
    text = model.config.get_text_config()
    dtype = text.dtype if isinstance(text.dtype, torch.dtype) else torch.bfloat16
    return TraceOptions(
        model=options.model,
        revision="",
        model_type=str(model.config.model_type),
        identity={"routers": []},
        layers=model.blocks,
        num_experts=model.experts,
        top_k=top_k,
        hidden_size=text.hidden_size,
        expert_bytes=model.expert_numbers * dtype.itemsize,
        dtype=str(dtype).removeprefix("torch."),
        engine="vllm",
        corpus=Path(options.files).name,
        split="",
        mode="",
        tokens=0,
        length=0,
        prompt=0,
        bos="",
        sequences_per_shard=REQUESTS_PER_SHARD,
        seed=0,
        content="routes",
    )


def read_arrays(path: Path) -> Iterator[tuple[str, Any]]:
    """Arrays of a file or of a folder's files, each with the name by which errors call it.

    Raises:
        TraceError: there is no such file, or it cannot be read.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in KINDS) if path.is_dir() else [path]
    if not files or not files[0].is_file() or files[0].suffix not in KINDS:
        raise TraceError(f"{path} holds no routes: expected a {', '.join(KINDS)} file, or a folder of them")
    for file in files:
        try:
            if file.suffix == ".safetensors":
                found: Any = load_file(file)
            else:
                found = np.load(file, allow_pickle=False)
            if file.suffix == ".npy":
                yield str(file), found
            else:
                for name in found:
                    yield f"{file}, {name}", found[name]
        except (OSError, ValueError, EOFError, KeyError, SyntaxError, zipfile.BadZipFile, SafetensorError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise TraceError(f"{file} cannot be read ({reason}): save arrays of numbers, without pickle") from None


def _routes(array: Any, name: str, model: Structure) -> Tensor:
    """Experts `(layers, tokens, top_k)` of the MoE layers.

    Raises:
        TraceError: the array is not what the model has routed.
    """
    blocks = len(model.blocks)
    layers = sorted({blocks, model.config.get_text_config().num_hidden_layers})
    if array.ndim != 3 or array.shape[1] not in layers or not array.size:
        wanted = f"(tokens, {' or '.join(map(str, layers))}, top-k)"
        raise TraceError(f"{name} has the shape {tuple(array.shape)}: expected {wanted}, as the model has it")
    if array.dtype.kind not in "iu":
        raise TraceError(f"{name} holds {array.dtype}: expected whole numbers, the experts")
    routed = torch.from_numpy(array.astype(np.int64)).transpose(0, 1)
    if array.shape[1] != blocks:
        # The first number in a block's name is its decoder layer's.
        routed = routed[[int(re.findall(r"\d+", block)[0]) for block in model.blocks]]
    if int(routed.min()) < 0 or int(routed.max()) >= model.experts:
        raise TraceError(f"{name} names experts outside 0 to {model.experts - 1}: give the routes of this model")
    ranked = routed.sort(-1).values
    if (ranked[..., 1:] == ranked[..., :-1]).any():
        raise TraceError(f"{name} routes a token to one expert twice: tokens that were not run must be left out")
    return routed


def _index(requests: list[Tensor], first: int) -> dict[str, Tensor]:
    """Of a shard whose text is not known."""
    lengths = torch.tensor([routed.shape[1] for routed in requests])
    count = int(lengths.sum())
    return {
        "tokens": torch.full((count,), -1, dtype=torch.int32),
        "sequence": torch.arange(first, first + len(requests), dtype=torch.int32).repeat_interleave(lengths),
        "position": torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths.tolist()]),
        "phase": torch.full((count,), PHASES.index("unknown"), dtype=torch.uint8),
        "source": torch.zeros(count, dtype=torch.int16),
    }
