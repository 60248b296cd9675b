"""Experts whose time follows the distinct experts that are loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .families import MoeLayer
from .hooks import foreign

BY_DISTINCT = "lynx_grouped_mm"
# Up to so many rows an expert, on average, its product is not BLAS's.
FEW_ROWS = 6


def _by_distinct(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """As transformers' `grouped_mm`, but assignments whose weight is 0 are not run.

    What is left out points at an expert that stays, with weight 0; its rows would be multiplied for nothing.
    Arguments as those of an experts module.
    """
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        return _one_by_one(experts, hidden, indices, weights)
    return _grouped(experts, hidden, indices, weights)


def _one_by_one(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """A product for each expert in use, where their number is known without waiting.

    On a CPU `grouped_mm` is such a loop too, but one over all experts, used or not.
    """
    count, top_k = experts.num_experts, indices.shape[-1]
    expert, order = indices.masked_fill(weights == 0, count).flatten().sort()
    by_expert = torch.bincount(expert, minlength=count + 1)[:count]
    rows = by_expert.tolist()
    used, sizes = [e for e in range(count) if rows[e]], [n for n in rows if n]
    order = order[: sum(sizes)]
    token = order // top_k
    if not used:
        return torch.zeros_like(hidden)
    multiply = None if experts.is_transposed or torch.is_grad_enabled() else _multiply_few()
    # Where nothing is left out, the sums are those of `grouped_mm`, bit for bit.
    few = len(token) <= FEW_ROWS * len(used) and len(token) < indices.numel()

    def linear(x: Tensor, name: str) -> Tensor:
        matrices = getattr(experts, name)
        if multiply is not None and few and not experts.has_bias and _is_plain(x) and _is_plain(matrices):
            product = x.new_empty(len(x), matrices.shape[1])
            multiply(x.numpy(), by_expert.numpy(), matrices.detach().numpy(), product.numpy())
            return product
        matrices = (matrices if experts.is_transposed else matrices.transpose(1, 2)).unbind(0)
        output = torch.cat([part @ matrices[e] for e, part in zip(used, x.split(sizes), strict=True)])
        return output + getattr(experts, f"{name}_bias")[expert[: len(x)]] if experts.has_bias else output

    if experts.has_gate:
        inner = experts._apply_gate(linear(hidden.index_select(0, token), "gate_up_proj"))
    else:
        inner = experts.act_fn(linear(hidden.index_select(0, token), "up_proj"))
    output = linear(inner, "down_proj") * weights.flatten().index_select(0, order).unsqueeze(-1)
    by_slot = output.new_zeros(indices.numel(), output.shape[1]).index_copy(0, order, output)
    return by_slot.unflatten(0, (-1, top_k)).sum(1).to(hidden.dtype)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.is_contiguous()


@cache
def _multiply_few() -> Any:
    """The compiled product, or None where numba is not installed."""
    try:
        from .kernels.products import multiply
    except ImportError:
        return None
    return multiply


def _grouped(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """One grouped product; assignments whose weight is 0 are sorted behind the last expert and belong to no group."""
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
    # Rows behind the last expert are left as they were in memory.
    output = output.masked_fill_((expert == count).unsqueeze(-1), 0.0)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return output[back].unflatten(0, (-1, top_k)).sum(1).to(hidden.dtype)


class _ByDistinct:
    """A model's configuration as its experts see it: an implementation whose time follows the distinct experts.

    The model's own configuration stays as it is, for whoever saves it or reads it meanwhile.
    """

    def __init__(self, config: Any) -> None:
        self._config = config

    @property
    def _experts_implementation(self) -> str | None:
        own: str | None = self._config._experts_implementation
        return BY_DISTINCT if own in ("grouped_mm", "batched_mm") else own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


@contextmanager
def experts_by_distinct(layers: list[MoeLayer]) -> Iterator[None]:
    """While open, experts that would run as `grouped_mm` or `batched_mm` run so that time follows the distinct experts.

    `batched_mm` reads one expert per assignment, so skipping would save nothing; off the CPU `generate()` switches
    `grouped_mm` to it for decode. Other implementations (`eager`, kernels of other libraries) stay what they are.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(BY_DISTINCT, _by_distinct)
    _multiply_few()  # compiled, where nobody has yet, before a step waits for it
    chosen = [
        layer.experts for layer in layers if hasattr(vars(layer.experts).get("config"), "_experts_implementation")
    ]
    for experts in chosen:
        vars(experts)["config"] = foreign(_ByDistinct(experts.config), experts.config)
    try:
        yield
    finally:
        for experts in chosen:
            vars(experts)["config"] = experts.config._config  # type: ignore[union-attr]
