"""Models of known shapes and selectors for them, both with random weights: for timing, where only the sizes count."""

from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..moe.families import find_moe_layers, model_type
from ..moe.identity import identify
from ..selector.config import SelectorConfig
from ..selector.selector import LynxSelector
from ..selector.surrogates import rank_for

# Shape -> model type and the sizes of its published configuration; `layers` is the depth of the whole model.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b": (
        "qwen3_moe",
        {
            "num_hidden_layers": 48,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
            "norm_topk_prob": True,
        },
    ),
    "olmoe-7b": (
        "olmoe",
        {
            "num_hidden_layers": 16,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 50304,
        },
    ),
    "mixtral-8x7b": (
        "mixtral",
        {
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
        },
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {
            "num_hidden_layers": 24,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 201088,
        },
    ),
    # No published model: Qwen3-30B-A3B with half the width and half the experts, which a machine of a few GB can hold.
    "qwen3-half": (
        "qwen3_moe",
        {
            "num_hidden_layers": 48,
            "hidden_size": 1024,
            "moe_intermediate_size": 768,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "vocab_size": 151936,
            "norm_topk_prob": True,
        },
    ),
}


def shaped_model(shape: str, layers: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A model of `layers` layers of a shape, with random weights.

    The vocabulary shrinks with the depth, so that embedding and head keep the share of a step that they have in the
    whole model.

    Raises:
        ModelError: the shape is not known, or has fewer layers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if shape not in SHAPES:
        raise ModelError(f"shape {shape!r} is not known: expected one of {', '.join(SHAPES)}")
    kind, sizes = SHAPES[shape]
    whole = sizes["num_hidden_layers"]
    if not 1 <= layers <= whole:
        raise ModelError(f"--layers {layers} is not usable: expected 1 to {whole} for {shape}")
    vocabulary = max(sizes["vocab_size"] * layers // whole, 256)
    config = AutoConfig.for_model(kind, **{**sizes, "num_hidden_layers": layers, "vocab_size": vocabulary})
    with torch.random.fork_rng(), device:
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


@torch.no_grad()
def random_selector(model: nn.Module, surrogate_share: float, seed: int = 0) -> LynxSelector:
    """A selector with random parameters for the MoE layers of `model`; what it leaves out means nothing."""
    layers = find_moe_layers(model)
    first = layers[0]
    config = SelectorConfig(
        base_model="random weights",
        base_revision="",
        model_type=model_type(model),
        identity=identify(layers),
        layers=tuple(layer.name for layer in layers),
        num_experts=first.num_experts,
        top_k=first.top_k,
        hidden_size=first.hidden_size,
        expert_bytes=first.expert_bytes,
        scorer="mlp",
        rank=rank_for(surrogate_share, first.expert_bytes / first.dtype.itemsize, first.hidden_size),
        keep_top1=False,
    )
    selector = LynxSelector(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in selector.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return selector
