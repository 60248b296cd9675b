"""What this package knows about the structure of vLLM's MoE layers, which of them are refused, and how they are wrapped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SelectorError
from ...moe.identity import Passing
from ...selector.config import SelectorConfig
from .settings import UnsupportedError

# Routers that turn logits into experts of the model and nothing else; others simulate, or add experts of their own.
ROUTERS = ("CPURouter", "FusedTopKRouter", "FusedTopKBiasRouter", "GroupedTopKRouter", "CustomRoutingRouter")
# Kernels off the CPU that treat each assignment by itself: what is left out names an expert that the token may have
# already. Others take it that a token's experts are distinct, and some of those then read memory that is not theirs.
KERNELS = ("TritonExperts", "TritonWNA16Experts", "MarlinExperts")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Wrapping:
    """Wraps methods of instances, never of classes: another model in the same process stays as it is."""

    def __init__(self) -> None:
        self.undo: list[Callable[[], None]] = []

    def replace(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Have `wrapper` called instead of the method, with the method as its first argument."""
        own = getattr(owner, name)
        # Where the instance has one of its own already, somebody else's wrapper perhaps, that is put back.
        undo = partial(setattr, owner, name, own) if name in vars(owner) else partial(delattr, owner, name)

        @wraps(own)
        def call(*args: Any, **kwargs: Any) -> Any:
            return wrapper(own, *args, **kwargs)

        setattr(owner, name, call)
        self.undo.append(undo)

    def give(self, owner: Any, name: str, value: object) -> None:
        """Set an attribute that the instance does not have."""
        setattr(owner, name, value)
        self.undo.append(partial(delattr, owner, name))

    def detach(self) -> None:
        """Take everything off again."""
        for undo in reversed(self.undo):
            undo()
        self.undo.clear()


def passing_of(num_experts: int, model: Any) -> Passing:
    """What sketches the weights of a model of this engine configuration while they are read."""
    quantization = getattr(getattr(model, "hf_config", None), "quantization_config", None)
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    return Passing(num_experts, model.hf_text_config.num_hidden_layers, block)


@contextmanager
def looking(passing: Passing, model_config: Any) -> Iterator[None]:
    """Have the weights of this model's checkpoint that vLLM reads meanwhile looked at, and not those of one that drafts."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    own = DefaultModelLoader.get_all_weights

    @wraps(own)
    def get_all_weights(loader: Any, of: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        for name, value in own(loader, of, *args, **kwargs):
            if of is model_config:
                passing.see(name, value)
            yield name, value

    DefaultModelLoader.get_all_weights = get_all_weights
    try:
        yield
    finally:
        DefaultModelLoader.get_all_weights = own


@contextmanager
def steering() -> Iterator[None]:
    """Where vLLM chooses the kernel of a model that is built meanwhile, have it choose one that can be acted on.

    Of kernels off the CPU it takes the first that says that it fits; others than `KERNELS`, monolithic ones among them,
    say no. A kernel that was asked for by name is left to `check_layer`.
    """
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        yield
        return
    own = FusedMoEExperts.is_supported_config

    # Kernels that override it call this one with their class.
    def is_supported_config(kernel: type, config: Any, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        if config.moe_backend == "auto" and kernel.__name__ not in KERNELS:
            return False, "lynx-learn cannot skip experts in it"
        return own(kernel, config, *args, **kwargs)

    FusedMoEExperts.is_supported_config = staticmethod(is_supported_config)
    try:
        yield
    finally:
        FusedMoEExperts.is_supported_config = staticmethod(own)


@dataclass(frozen=True)
class EngineLayer:
    """One MoE layer of a vLLM model: a `Layer`.

    `name` is the selector's: vLLM renames blocks, so they are matched by order, and their routers tell whether they
    are the same.
    """

    index: int
    name: str
    router: nn.Module = field(repr=False)
    runner: Any = field(repr=False)
    num_experts: int
    top_k: int
    hidden_size: int
    expert_bytes: int
    device: torch.device
    dtype: torch.dtype


def find_layers(model: nn.Module, names: tuple[str, ...], expert_bytes: int) -> list[EngineLayer]:
    """The MoE layers of a vLLM model, under the names that transformers gives their blocks.

    Raises:
        UnsupportedError: there is none, or one of them cannot be acted on.
    """
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, MoERunner)]
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no MoE layer that can be acted on: load a Mixture-of-Experts model"
        )
    layers = []
    for index, (path, runner) in enumerate(found):
        block = model.get_submodule(path.rpartition(".")[0])
        gate = getattr(block, "gate", None) or getattr(block, "router", None)
        if not isinstance(gate, nn.Module) or not isinstance(getattr(gate, "weight", None), Tensor):
            raise UnsupportedError(f"layer {path} has no gate whose weight can be compared with the selector's")
        router = read_gate(path, gate)
        device = router["weight"].device
        check_layer(path, runner, device)
        num_experts, hidden_size = router["weight"].shape
        layers.append(
            EngineLayer(
                index,
                names[index] if len(names) == len(found) else path,
                router,
                runner,
                num_experts,
                runner.router.top_k,
                hidden_size,
                expert_bytes,
                device,
                runner.moe_config.in_dtype,
            )
        )
    return layers


@torch.inference_mode()
def read_gate(path: str, gate: nn.Module) -> nn.ParameterDict:
    """Weight, bias and correction bias of a gate, under the names that transformers gives them too.

    On the CPU vLLM packs the weight and leaves an empty one behind. What the gate makes of unit vectors are then the
    weight's columns, exactly: every sum has one term that is not zero. The kernel takes it that both are of one type.

    Raises:
        UnsupportedError: the gate is quantized.
    """
    state: dict[str, Tensor] = dict(gate.state_dict())
    if state["weight"].dtype not in FLOATS:
        kind = str(state["weight"].dtype).removeprefix("torch.")
        raise UnsupportedError(f"layer {path} has a quantized gate ({kind}): leave gates out of the quantization")
    if not state["weight"].numel():
        units = torch.eye(int(gate.input_size), dtype=state["weight"].dtype)  # type: ignore[arg-type]
        state["weight"] = gate.quant_method.apply(gate, units, None).T.contiguous()  # type: ignore[union-attr,operator,call-arg]
    return nn.ParameterDict({key: nn.Parameter(value, requires_grad=False) for key, value in state.items()})


def check_layer(path: str, runner: Any, device: torch.device) -> None:
    """Refuse a layer whose routing or output is not the plain one.

    Raises:
        UnsupportedError: with the reason.
    """
    method = runner.routed_experts.quant_method
    backends = "choose --moe-backend triton, or marlin for quantized experts"
    if runner.is_monolithic:
        raise UnsupportedError(
            f"layer {path} runs a monolithic kernel ({type(method).__name__}) that routes by itself: {backends}"
        )
    kernel = type(getattr(method.moe_kernel, "fused_experts", method)).__name__
    if device.type != "cpu" and kernel not in KERNELS:
        raise UnsupportedError(
            f"layer {path} runs {kernel}, which may not be given an expert twice for one token: {backends}"
        )
    if type(runner).__name__ == "TransformersMoERunner":
        raise UnsupportedError(
            f"layer {path} is routed by the model's own code, of which the engine knows no logits: leave --model-impl out"
        )
    if type(runner.router).__name__ not in ROUTERS:
        raise UnsupportedError(f"layer {path} routes with {type(runner.router).__name__}, which is not supported")
    reasons = {
        "is split over the sequence": runner.moe_config.is_sequence_parallel,
        "routes a projection of its input": runner.routed_input_transform is not None,
        "runs shared experts in the routed kernel": runner._fse_fuse_gate,
        "weights what enters its experts": runner.routed_experts.apply_router_weight_on_input,
        "leaves its output unfinished for a later kernel": runner.moe_config.use_deferred_moe_finalize,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedError(f"layer {path} {reason}, which is not supported")


def check_shape(layers: list[EngineLayer], config: SelectorConfig) -> None:
    """Refuse a model that is plainly another one than the selector's, which comparing routers could only say less clearly.

    Raises:
        SelectorError: with both shapes.
    """
    for layer in layers:
        if (layer.num_experts, layer.top_k, layer.hidden_size) != (
            config.num_experts,
            config.top_k,
            config.hidden_size,
        ):
            raise SelectorError(
                f"the selector is for {config.top_k} of {config.num_experts} experts of width {config.hidden_size} "
                f"({config.base_model}), layer {layer.name} has {layer.top_k} of {layer.num_experts} of width {layer.hidden_size}: "
                "load the model it was trained for"
            )
