"""Seeing the calls of a transformers model, and rewriting what an MoE block is about to do."""

import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .decision import Decision, Routing
from .families import MoeLayer

OnCall = Callable[[dict[str, Any] | None], None]
OnLayer = Callable[[MoeLayer, Routing], Decision | None]

# Sequences of a decode step that are looked at without making anything.
MOST_ROWS = 512
# Where a module keeps its hooks, by number, and what it notes of them by the same number.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OF_HOOKS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_REDUCE, _INSTEAD_OF = "__reduce_ex__", "_lynx_instead_of"


class _Held(threading.local):
    """What the hooks of one layer pass on within a call; each thread makes its own calls."""

    def __init__(self) -> None:
        self.logits: Tensor | None = None
        self.factor: Tensor | None = None
        self.addition: Tensor | None = None


class _UnderWay(threading.local):
    """Whether this thread's call of the model began when the hooks were on."""

    seen = False


@contextmanager
def intercept(
    model: nn.Module, layers: list[MoeLayer], on_layer: OnLayer, on_call: OnCall | None = None
) -> Iterator[None]:
    """While open, `on_call` sees each call of what holds the layers and `on_layer` each MoE block's routing.

    `on_call` is given the arguments by name, and None when the call has ended, also by an exception. The tokens of a
    call, of whatever sequences and positions, come to `on_layer` as one batch, without a leading dimension, in which all
    are active; it may rewrite the routing. Several threads may call the model at once; what is called runs in the thread of
    its call. A call that another thread is in the middle of when the context opens goes on as it began.
    Every hook is removed when the context ends, also by an exception.
    """
    handles: list[Any] = []
    under_way = None if on_call is None else _UnderWay()
    try:
        if on_call is not None and under_way is not None:
            handles += _hook_calls(owner_of(model, layers), on_call, under_way)
        for layer in layers:
            handles += _hook_layer(layer, on_layer, under_way)
        yield
    finally:
        for handle in handles:
            handle.remove()


def owner_of(model: nn.Module, layers: list[MoeLayer]) -> nn.Module:
    """The innermost module that holds all layers and is called with a cache: calls may come to it past the model."""
    owner = model
    while True:
        inner = next((c for c in owner.children() if all(_holds(c, layer) for layer in layers)), None)
        if inner is None or not _takes_cache(inner):
            return owner
        owner = inner


def _holds(module: nn.Module, layer: MoeLayer) -> bool:
    return any(part is layer.experts for part in module.modules())


def _takes_cache(module: nn.Module) -> bool:
    return "past_key_values" in inspect.signature(module.forward).parameters


def _hook_calls(owner: nn.Module, on_call: OnCall, under_way: _UnderWay) -> list[Any]:
    names = list(inspect.signature(owner.forward).parameters)

    def before_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        under_way.seen = True
        on_call({**dict(zip(names, args, strict=False)), **kwargs})

    def after_call(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        on_call(None)
        under_way.seen = False

    return [
        owner.register_forward_pre_hook(foreign(before_call), with_kwargs=True),
        owner.register_forward_hook(foreign(after_call), always_call=True),
    ]


def _hook_layer(layer: MoeLayer, on_layer: OnLayer, under_way: _UnderWay | None) -> list[Any]:
    held = _Held()
    everyone = _everyone(layer.device)  # before a graph is captured, in whose memory it must not lie

    def all_of(hidden: Tensor) -> Tensor:
        if len(hidden) <= len(everyone) and hidden.device == everyone.device:
            return everyone[: len(hidden)]
        return torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)

    def after_router(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        held.logits = layer.logits_of(output)

    def before_experts(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        values = list(args) + list(kwargs.values())
        hidden, indices, weights = values[:3]
        logits, held.logits, held.factor, held.addition = held.logits, None, None, None
        if logits is None and under_way is not None and not under_way.seen:
            return None
        if logits is None:  # compiled code that is left in the middle of a block does not keep what its router said
            raise ModelError(
                "an MoE block's experts ran without its router: a model that was compiled before attaching needs experts that "
                "compile; call model.set_experts_implementation('grouped_mm') first, or do not compile"
            )
        decision = on_layer(layer, Routing(hidden, logits, indices.long(), weights, all_of(hidden)))
        if decision is None:
            return None
        held.factor, held.addition = decision.factor, decision.addition
        return (hidden, decision.indices.to(indices.dtype), decision.weights.to(weights.dtype)), {}

    def after_experts(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        factor, addition, held.factor, held.addition = held.factor, held.addition, None, None
        if factor is not None:
            output = output * factor.to(output.dtype)
        if addition is not None:
            output = output + addition.to(output.dtype)
        return output

    return [
        layer.router.register_forward_hook(foreign(after_router)),
        layer.experts.register_forward_pre_hook(foreign(before_experts), with_kwargs=True),
        layer.experts.register_forward_hook(foreign(after_experts)),
    ]


@functools.cache
def _everyone(device: torch.device) -> Tensor:
    """All of a step's sequences, for as long as the process lives.

    At decode a step would launch it for each layer. Not made by hooks for themselves: a CUDA graph that was captured with
    them reads it where it lies, also after they are gone.
    """
    with torch.inference_mode(False):
        return torch.ones(MOST_ROWS, dtype=torch.bool, device=device)


@contextmanager
def left_out_of_copies(model: nn.Module, layers: list[MoeLayer]) -> Iterator[None]:
    """While open, what is put on `model` and its layers and is `foreign` is left out of their pickles and copies.

    A copy, or what another process loads, is as the model was before.
    """
    parts = {model, owner_of(model, layers)}.union(*((layer.router, layer.experts) for layer in layers))
    parts = {module for module in parts if _REDUCE not in vars(module)}  # another one is around this
    for module in parts:
        vars(module)[_REDUCE] = functools.partial(_reduced, module)
    try:
        yield
    finally:
        for module in parts:
            del vars(module)[_REDUCE]


def foreign(put_on: Any, instead_of: Any = None) -> Any:
    """Mark what is put on a module: a hook, or an attribute that stands where `instead_of` was, None: nothing."""
    setattr(put_on, _INSTEAD_OF, instead_of)
    return put_on


def _reduced(module: nn.Module, protocol: Any) -> Any:
    """As `object.__reduce_ex__`, without what is foreign; pickle and copy look for it on the object first."""
    made = type(module).__reduce_ex__(module, protocol)
    if not isinstance(made, tuple) or len(made) < 3 or not isinstance(made[2], dict):
        return made
    before = {name: getattr(value, _INSTEAD_OF, value) for name, value in made[2].items() if name != _REDUCE}
    state: dict[str, Any] = {
        name: value for name, value in before.items() if value is not None or made[2][name] is None
    }
    removed = {key for name in _HOOKS for key, hook in state[name].items() if hasattr(hook, _INSTEAD_OF)}
    for name in _HOOKS + _OF_HOOKS:
        state[name] = OrderedDict((key, value) for key, value in state[name].items() if key not in removed)
    return (*made[:2], state, *made[3:])
