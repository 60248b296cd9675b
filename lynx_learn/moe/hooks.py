"""The calls of a transformers model: which of them are decode steps, and rewriting what an MoE block is about to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from .families import MoeLayer


class Routing(NamedTuple):
    """What one MoE block is about to do with N tokens."""

    hidden: Tensor
    """(N, hidden), entering the block."""
    logits: Tensor
    """(N, experts), before the activation."""
    indices: Tensor
    """(N, top_k)."""
    weights: Tensor
    """(N, top_k)."""


class Rewrite(NamedTuple):
    """What it shall do instead."""

    indices: Tensor
    weights: Tensor
    addition: Tensor | None
    """(N, hidden), added to the routed experts' output."""


OnCall = Callable[[tuple[Any, ...], dict[str, Any]], None]
OnLayer = Callable[[MoeLayer, Routing], Rewrite | None]


@contextmanager
def intercept(
    model: nn.Module, layers: list[MoeLayer], on_layer: OnLayer, on_call: OnCall | None = None
) -> Iterator[None]:
    """While open, `on_call` sees each call of the model and `on_layer` each MoE block's routing, and may rewrite it.

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
        rewrite = on_layer(layer, Routing(hidden, logits, indices, weights))
        held["addition"] = rewrite.addition if rewrite is not None else None
        if rewrite is None:
            return None
        return (hidden, rewrite.indices.to(indices.dtype), rewrite.weights.to(weights.dtype)), {}

    def after_experts(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        addition = held.pop("addition", None)
        return None if addition is None else output + addition.to(output.dtype)

    return [
        layer.router.register_forward_hook(after_router),
        layer.experts.register_forward_pre_hook(before_experts, with_kwargs=True),
        layer.experts.register_forward_hook(after_experts),
    ]
