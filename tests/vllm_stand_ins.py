"""As much of vLLM's workers, routers and experts as is looked at or wrapped, without vLLM."""

from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from tiny import EXPERTS, HIDDEN, TOP_K
from torch import Tensor


class CUDAGraphMode(Enum):
    """As vLLM's, which is false where there are no graphs."""

    NONE = 0
    FULL = 2

    def __bool__(self) -> bool:
        return self is not CUDAGraphMode.NONE


def engine_config(**changes: Any) -> Any:
    """As much of a vLLM configuration as is looked at, of an engine that can be acted on; `changes` by dotted names' last part."""
    parallel = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "use_ubatching": False,
        "enable_eplb": False,
    }
    compilation = {"mode": 0, "cudagraph_mode": CUDAGraphMode.NONE, "max_cudagraph_capture_size": 512}
    scheduler = {"max_num_batched_tokens": 64}
    config = {"speculative_config": None, "lora_config": None, "use_v2_model_runner": False}
    config |= {"model_config": None, "additional_config": {}, "kv_transfer_config": None}
    for part in (parallel, compilation, scheduler, config):
        part.update({key: changes.pop(key) for key in part if key in changes})
    assert not changes
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        compilation_config=SimpleNamespace(**compilation),
        scheduler_config=SimpleNamespace(**scheduler),
        **config,
    )


def model_config(**changes: Any) -> Any:
    """As much of vLLM's description of a model as is looked at: the tiny model's."""
    plain = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "runner_type": "generate",
        "is_diffusion": False,
        "get_num_experts": lambda: EXPERTS,
        "get_hidden_size": lambda: HIDDEN,
        "using_transformers_backend": lambda: False,
        "model_impl": "auto",
        "quantization": None,
        "has_inner_state": False,
        "model": "/models--some--Tiny/snapshots/1",
        "hf_config": SimpleNamespace(),
    }
    assert not changes.keys() - plain.keys()
    return SimpleNamespace(**{**plain, **changes})


class CPURouter:
    """Named as one of vLLM's."""

    top_k = TOP_K

    def __init__(self, route: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None) -> None:
        self.rule = route

    def _compute_routing(self, hidden: Tensor, logits: Tensor, dtype: Any = None) -> tuple[Tensor, Tensor]:
        assert self.rule is not None
        indices, weights = self.rule(logits)
        return weights, indices.int()


class Experts:
    """Keeps what it is called with."""

    def __init__(self) -> None:
        self.quant_method, self.apply_router_weight_on_input = SimpleNamespace(moe_kernel=None), False
        self.called: dict[str, Tensor] = {}

    def forward_modular(self, **called: Tensor) -> Tensor:
        self.called = called
        return run_experts(called["topk_weights"], called["topk_ids"])


def run_experts(weights: Tensor, ids: Tensor) -> Tensor:
    """What the stand-in's experts return: expert e answers e + 1, whatever it is given."""
    return (weights * (ids + 1)).sum(-1, keepdim=True).expand(-1, HIDDEN)


def engine_runner(**changes: Any) -> Any:
    """As much of a vLLM MoE runner as is looked at or wrapped."""
    moe_config = {"is_sequence_parallel": False, "use_deferred_moe_finalize": False, "in_dtype": torch.float32}
    moe_config |= {key: changes.pop(key) for key in list(changes) if key in moe_config}
    plain = {
        "layer_name": "model.layers.0.mlp.experts",
        "router": CPURouter(),
        "routed_experts": Experts(),
        "is_monolithic": False,
        "routed_input_transform": None,
        "routed_scaling_factor": 1.0,
        "_fse_fuse_gate": False,
        "_fused_output_is_reduced": False,
    }
    assert not changes.keys() - plain.keys()
    return SimpleNamespace(moe_config=SimpleNamespace(**moe_config), **{**plain, **changes})
