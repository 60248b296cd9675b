"""`lynx-learn inspect`: what a model is made of, and whether this package can act on it."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .errors import ModelError
from .moe.families import find_moe_layers, model_type
from .moe.identity import describe
from .moe.loading import load_model
from .show.tables import Table, show


@dataclass(frozen=True)
class InspectOptions:
    """Show what a model is made of, and whether it is supported."""

    model: str
    """folder or Hub id, or reference-moe"""
    device: str = "auto"
    """where the model runs: cpu, cuda, cuda:1, …; auto takes a GPU where there is one"""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: what the checkpoint holds, but float32 on a CPU without native bfloat16"""


def inspect_model(options: InspectOptions) -> dict[str, Any]:
    """Print the MoE layers of a model; raises ModelError, with the reason, when it is not supported."""
    loaded = load_model(options.model, options.device, options.dtype, tokenizer=False)
    layers = find_moe_layers(loaded.model)
    if not layers:
        raise ModelError(f"{options.model} has no MoE layer")
    rows = [
        [la.name, f"{la.top_k} of {la.num_experts}", str(la.hidden_size), f"{la.expert_bytes / 1e6:.2f} MB"]
        for la in layers
    ]
    ways = Counter(f"{type(la.router).__name__}: {describe(la)}" for la in layers)
    show(
        Table(
            f"{options.model} ({model_type(loaded.model)}): supported",
            ["MoE block", "experts per token", "width", "bytes of an expert"],
            rows,
        ),
        *(f"{count} routers {way}" for way, count in ways.items()),
        f"revision {loaded.revision}",
    )
    return {"model_type": model_type(loaded.model), "layers": len(layers), "revision": loaded.revision}
