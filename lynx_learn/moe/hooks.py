"""The calls of a transformers model: which of them are decode steps, and rewriting what an MoE block is about to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
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


class DecodeCall(NamedTuple):
    """A call of the model that decodes one token per sequence."""

    active: Tensor | None
    """(sequences,) True where a sequence still runs; None: all do."""


def read_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DecodeCall | None:
    """Tell a decode step from anything else (prefill, training, chunks), and which of its sequences still run.

    A decode step brings one token per sequence and a cache that already holds some. A sequence has ended when its
    token is the padding token; without one, the first end token, which `generate` then pads with. Rows whose attention
    mask ends in 0 do not run either.
    """
    ids = kwargs.get("input_ids", args[0] if args else None)
    tokens = ids if isinstance(ids, Tensor) else kwargs.get("inputs_embeds")
    cache = kwargs.get("past_key_values")
    if not isinstance(tokens, Tensor) or tokens.shape[1] != 1 or cache is None or not _holds_tokens(cache):
        return None
    active: Tensor | None = None
    generation = getattr(model, "generation_config", None)
    pad = getattr(generation, "pad_token_id", None)
    if pad is None:
        ends = getattr(generation, "eos_token_id", None)
        pad = ends[0] if isinstance(ends, list) and ends else ends
    if isinstance(ids, Tensor) and isinstance(pad, int):
        active = ids[:, -1] != pad
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        present = mask[:, -1].bool()
        active = present if active is None else active & present
    return DecodeCall(active)


def _holds_tokens(cache: Any) -> bool:
    """Whether any layer has seen tokens: those of linear attention, which may come first, do not count them."""
    layers = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length")]
    return any(map(_is_filled, layers or [cache]))


def _is_filled(part: Any) -> bool:
    length = part.get_seq_length()
    # Static caches count on the device, and asking would wait for it; they are laid out when the first tokens come.
    return bool(part.is_initialized) if isinstance(length, Tensor) else length > 0


BY_DISTINCT = "lynx_grouped_mm"


def _grouped_by_distinct(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """As transformers' `grouped_mm`, but assignments whose weight is 0 are not run.

    What is left out points at an expert that stays, with weight 0; its rows would be multiplied for nothing. Sorted
    behind the last expert they belong to no group. Arguments as those of an experts module.
    """
    from transformers.integrations.moe import _grouped_linear

    count, top_k = experts.num_experts, indices.shape[-1]
    expert, order = indices.masked_fill(weights == 0, count).flatten().sort()
    ends = torch.searchsorted(expert, torch.arange(count, device=expert.device), right=True, out_int32=True)

    def linear(rows: Tensor, name: str) -> Tensor:
        bias = getattr(experts, f"{name}_bias")[expert.clamp_max(count - 1)] if experts.has_bias else None
        return _grouped_linear(rows, getattr(experts, name), ends, bias=bias, is_transposed=experts.is_transposed)

    if experts.has_gate:
        inner = experts._apply_gate(linear(hidden[order // top_k], "gate_up_proj"))
    else:
        inner = experts.act_fn(linear(hidden[order // top_k], "up_proj"))
    output = linear(inner, "down_proj") * weights.flatten()[order].unsqueeze(-1)
    # Rows behind the last group are left as they were in memory.
    output = output.masked_fill_((expert == count).unsqueeze(-1), 0.0)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return output[back].unflatten(0, (-1, top_k)).sum(1).to(hidden.dtype)


@contextmanager
def experts_by_distinct(model: nn.Module) -> Iterator[None]:
    """While open, experts that would run as `grouped_mm` or `batched_mm` run so that time follows the distinct experts.

    `batched_mm` reads one expert per assignment, so skipping would save nothing; off the CPU `generate()` switches
    `grouped_mm` to it for decode, but no implementation of another name. Other implementations (`eager`, kernels of
    other libraries) stay what they are.
    """
    if not hasattr(model, "get_experts_implementation"):
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(BY_DISTINCT, _grouped_by_distinct)
    before: dict[str, str | None] = model.get_experts_implementation()  # type: ignore[operator]
    during = {part: BY_DISTINCT if own in ("grouped_mm", "batched_mm") else own for part, own in before.items()}
    if during == before:
        yield
        return
    model.set_experts_implementation(during)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_experts_implementation(before)  # type: ignore[operator]
