"""The calls of a transformers model: which of them are decode steps, and rewriting what an MoE block is about to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .decision import Decision, Routing
from .families import MoeLayer

OnCall = Callable[[tuple[Any, ...], dict[str, Any]], None]
OnLayer = Callable[[MoeLayer, Routing], Decision | None]


@contextmanager
def intercept(
    model: nn.Module, layers: list[MoeLayer], on_layer: OnLayer, on_call: OnCall | None = None
) -> Iterator[None]:
    """While open, `on_call` sees each call of the model and `on_layer` each MoE block's routing, and may rewrite it.

    The tokens of a call, of whatever sequences and positions, come as one batch in which all are active.
    When a call has ended, also by an exception, `on_call` sees an empty one.
    Every hook is removed when the context ends, also by an exception.
    """
    handles: list[Any] = []
    try:
        if on_call is not None:

            def before_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                on_call(args, kwargs)

            def after_call(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                on_call((), {})

            handles.append(model.register_forward_pre_hook(before_call, with_kwargs=True))
            handles.append(model.register_forward_hook(after_call, always_call=True))
        for layer in layers:
            handles += _hook_layer(layer, on_layer)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook_layer(layer: MoeLayer, on_layer: OnLayer) -> list[Any]:
    held: dict[str, Tensor | None] = {}

    def after_router(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        held["logits"] = layer.logits_of(output)

    def before_experts(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        values = list(args) + list(kwargs.values())
        hidden, indices, weights = values[:3]
        logits = held.pop("logits")
        assert logits is not None
        active = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        parts = (hidden, logits, indices.long(), weights, active)
        decision = on_layer(layer, Routing(*(part.unsqueeze(0) for part in parts)))
        held["addition"] = None if decision is None else decision.addition
        if decision is None:
            return None
        return (hidden, decision.indices[0].to(indices.dtype), decision.weights[0].to(weights.dtype)), {}

    def after_experts(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        addition = held.pop("addition", None)
        return None if addition is None else output + addition[0].to(output.dtype)

    return [
        layer.router.register_forward_hook(after_router),
        layer.experts.register_forward_pre_hook(before_experts, with_kwargs=True),
        layer.experts.register_forward_hook(after_experts),
    ]
