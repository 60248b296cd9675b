"""Fit one layer of a large model's shape: random weights in real shards on disk, random tokens; peak memory and time.

python docs/one_layer.py --shape deepseek-v3 --experts 64 --tokens 20000 --out runs/one-layer

Nothing is learned from random tokens; memory and time do not depend on what they hold. The fit is a process of its own, in
which one expert is read at a time. `held` is what it has at its worst beside files that are mapped into memory, which the
system takes back when it needs room; `layer` what all experts would take.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from safetensors.torch import save_file

from lynx_learn.checkpoint.blocks import StoredLayers, without_weights
from lynx_learn.fit.layer import fit_layer
from lynx_learn.fit.scorer import ScorerOptions
from lynx_learn.fit.train import TrainOptions, _config
from lynx_learn.moe.identity import identify
from lynx_learn.selector.layer import LayerSelector
from lynx_learn.selector.surrogates import rank_for
from lynx_learn.traces.format import Trace, TraceOptions, TraceWriter

# What decides the size of a layer; the rest of a model is small or not there.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v3": (
        "deepseek_v3",
        {
            "hidden_size": 7168,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 0,
            "n_group": 8,
            "topk_group": 4,
        },
    ),
    "qwen3-30b": (
        "qwen3_moe",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    ),
}
COUNTS = {"deepseek_v3": "n_routed_experts", "qwen3_moe": "num_experts"}
EXPERTS_OF_A_SHARD, TOKENS_OF_A_SHARD, TOKENS_OF_A_SEQUENCE = 16, 4096, 256
SCALE = 0.02


def write_model(folder: Path, shape: str, experts: int | None) -> None:
    """A model of one layer, as checkpoints are: a tensor for each matrix of each expert, in several files.

    Args:
        experts: fewer than the shape has, where that is too much.
    """
    from transformers import AutoConfig

    kind, sizes = SHAPES[shape]
    sizes = {**sizes, COUNTS[kind]: experts or sizes[COUNTS[kind]]}
    config = AutoConfig.for_model(
        kind, **sizes, num_hidden_layers=1, vocab_size=256, intermediate_size=256, num_attention_heads=16
    )
    config.dtype, config.architectures = torch.bfloat16, ["whatever reads it"]
    config.save_pretrained(folder)
    hidden, inner, count = sizes["hidden_size"], sizes["moe_intermediate_size"], sizes[COUNTS[kind]]
    names = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    prefix, places = "model.layers.0.mlp", {}
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * SCALE).to(torch.bfloat16)

    # Without biases on the choice of experts: those of a trained router even the load, random ones do the opposite.
    rest = {
        name: random(*value.shape).to(value.dtype) * (not name.endswith("bias"))
        for name, value in without_weights(config, torch.bfloat16).state_dict().items()
        if ".experts." not in name
    }
    files = [rest]
    for start in range(0, count, EXPERTS_OF_A_SHARD):
        own = range(start, min(start + EXPERTS_OF_A_SHARD, count))
        file = f"model-{start // EXPERTS_OF_A_SHARD + 1:05d}.safetensors"
        tensors = {f"{prefix}.experts.{e}.{name}.weight": random(*size) for e in own for name, size in names.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    save_file(files[0], folder / "model-00000.safetensors", {"format": "pt"})
    places |= dict.fromkeys(rest, "model-00000.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@torch.no_grad()
def write_trace(model: Path, folder: Path, tokens: int) -> None:
    """A trace of random hidden states, routed by the layer's own router."""
    layers = StoredLayers(str(model), "cpu", "bfloat16")
    with layers.layer(0) as layer:
        options = TraceOptions(
            model=str(model),
            revision="local",
            model_type="random",
            identity=identify([layer]),
            layers=layers.names,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            hidden_size=layer.hidden_size,
            expert_bytes=layer.expert_bytes,
            dtype="bfloat16",
            corpus="random",
            split="fit",
            mode="teacher",
            tokens=tokens,
            length=TOKENS_OF_A_SEQUENCE,
            prompt=0,
            bos="no",
            sequences_per_shard=TOKENS_OF_A_SHARD // TOKENS_OF_A_SEQUENCE,
            seed=0,
        )
        writer = TraceWriter(folder, options)
        generator = torch.Generator().manual_seed(1)
        shards = -(-tokens // TOKENS_OF_A_SHARD)
        for shard in range(shards):
            hidden = torch.randn(TOKENS_OF_A_SHARD, layer.hidden_size, generator=generator).to(torch.bfloat16)
            logits = layer.logits_of(layer.router(hidden)).float()
            indices, weights = layer.rule.route(logits)
            own = {"hidden": hidden, "logits": logits, "indices": indices.to(torch.int16), "weights": weights}
            place = torch.arange(shard * TOKENS_OF_A_SHARD, (shard + 1) * TOKENS_OF_A_SHARD)
            index = {
                "tokens": torch.zeros(len(place), dtype=torch.int32),
                "sequence": (place // TOKENS_OF_A_SEQUENCE).to(torch.int32),
                "position": (place % TOKENS_OF_A_SEQUENCE).to(torch.int32),
                "phase": torch.full((len(place),), 2, dtype=torch.uint8),
                "source": torch.zeros(len(place), dtype=torch.int16),
            }
            writer.write(shard, [own], index)
        writer.finish(shards, ["random"], {"teacher": shards * TOKENS_OF_A_SHARD})


def held_bytes() -> int:
    """Of this process, without what is mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def fit(model: str, trace: str, share: float) -> dict[str, float]:
    """Fit the layer as `lynx-learn train` does; its bytes, the most that is held, and seconds, also of all threads together."""
    before, most, end = held_bytes(), [0], threading.Event()

    def watch() -> None:
        while not end.wait(0.05):
            most[0] = max(most[0], held_bytes())

    threading.Thread(target=watch, daemon=True).start()
    opened = Trace.open(trace, verify=False)
    layers, options = StoredLayers(model, "cpu"), opened.options
    rank = rank_for(share, options.expert_bytes / 2, options.hidden_size)
    start = time.monotonic()
    with layers.layer(0) as layer, tempfile.TemporaryDirectory(dir=trace) as logs:
        read, used = time.monotonic(), time.process_time()
        own = LayerSelector(_config(TrainOptions(trace, ""), opened, options.identity, rank))
        scorer = ScorerOptions("mlp", TrainOptions.epochs, TrainOptions.batch, TrainOptions.rate, TrainOptions.seed)
        fit_layer(layer, own, opened, opened.index()["sequence"] % 10, scorer, False, Path(logs))
        weights = layer.num_experts * layer.expert_bytes
    end.set()
    return {
        "layer": weights / 1e9,
        "libraries": before / 1e9,
        "held": most[0] / 1e9,
        "read_s": read - start,
        "fit_s": time.monotonic() - read,
        "fit_cpu_s": time.process_time() - used,
    }


def main(
    out: str,
    shape: Literal["deepseek-v3", "qwen3-30b"] = "deepseek-v3",
    experts: int | None = None,
    tokens: int = 20_000,
    share: float = 0.08,
    workers: int = 1,
    fitting: bool = False,
) -> None:
    """Write what is not there yet, fit in a process of its own, and print GB and seconds.

    Args:
        out: folder for the model and the trace; what is there is used again.
        shape: whose layer.
        experts: fewer than the shape has: a layer of DeepSeek-V3 takes 22.5 GB of disk, and the fit as much again.
        tokens: of the trace.
        share: size of the surrogates, as in `lynx-learn train`.
        workers: fit so many layers at once, all the same, as `lynx-learn train --workers` does; then a layer takes its share of
            the longest one's seconds.
        fitting: be that process.
    """
    folder = Path(out)
    model, trace = folder / f"{shape}-{experts or 'all'}", folder / f"{shape}-{experts or 'all'}-{tokens}"
    if fitting:
        print(json.dumps({name: round(value, 2) for name, value in fit(str(model), str(trace), share).items()}))
        return
    if not (model / "model.safetensors.index.json").exists():
        model.mkdir(parents=True, exist_ok=True)
        write_model(model, shape, experts)
    if not (trace / "manifest.json").exists():
        write_trace(model, trace, tokens)
    words = [sys.executable, __file__, *sys.argv[1:], "--fitting", "true"]
    alone = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))} if workers > 1 else {}
    running = [
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **alone}) for _ in range(workers)
    ]
    results = [process.communicate()[0].strip() for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a fit failed: see above")
    for result in results:
        print(f"{shape}, {experts or 'all'} experts, {tokens:,} tokens (GB, seconds): {result}")
    if workers > 1:
        each = max(json.loads(result)["fit_s"] for result in results) / workers
        print(f"{workers} layers at once: {each:.1f} seconds a layer")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
