"""Experts whose time follows the distinct experts that are loaded."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .families import MoeLayer
from .fp8.scaled import SCALE
from .hooks import foreign

BY_DISTINCT = "lynx_grouped_mm"


def runs_alone(experts: nn.Module) -> bool:
    """Whether `run_expert` can run one of these: they are transformers' own, and no code of theirs is passed over."""
    return hasattr(vars(experts).get("config"), "_experts_implementation")


def run_expert(experts: Any, own: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Output `(rows, hidden)` of one expert, by its parameters, for rows of hidden states; bit for bit that of `grouped_mm`."""

    def linear(x: Tensor, name: str) -> Tensor:
        matrix = own[name] if experts.is_transposed else own[name].T
        output = x.to(matrix.dtype) @ matrix
        return output + own[f"{name}_bias"] if experts.has_bias else output

    if experts.has_gate:
        inner = experts._apply_gate(linear(rows, "gate_up_proj"))
    else:
        inner = experts.act_fn(linear(rows, "up_proj"))
    return linear(inner, "down_proj")


def _by_distinct(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """As transformers' `grouped_mm`, but assignments whose weight is 0 are not run.

    What is left out points at an expert that stays, with weight 0; its rows would be multiplied for nothing.
    Arguments as those of an experts module.
    """
    if torch.compiler.is_compiling() or hidden.device.type != "cpu":
        return _in_groups(experts, hidden, indices, weights)
    if int(weights.count_nonzero()) < weights.numel():
        output = _in_one_call(experts, hidden, indices, weights)
        return _one_by_one(experts, hidden, indices, weights) if output is None else output
    # `grouped_mm` is a loop over all experts, used or not.
    many = weights.numel() >= experts.num_experts
    return (_untouched() if many else _one_by_one)(experts, hidden, indices, weights)


def _in_groups(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """By products of groups of rows, an expert's each: off the CPU, and experts in float8 wherever they run."""
    kernels = None if torch.compiler.is_compiling() else _kernels(hidden.device)
    able = kernels is not None and kernels.takes(hidden, indices, weights)
    return (partial(_in_kernels, kernels) if able else _grouped)(experts, hidden, indices, weights)


def _untouched() -> Any:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS["grouped_mm"]


def _in_one_call(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor | None:
    """By a compiled function; None where it was not written for these experts or so many rows, or numba is not there."""
    compiled = _compiled()
    if compiled is None or not _is_gated(experts) or torch.is_grad_enabled():
        return None
    parts = (hidden, weights, experts.gate_up_proj, experts.down_proj)
    if not all(map(_is_plain, parts)) or not indices.is_contiguous():
        return None
    output = torch.empty_like(hidden)
    hidden_, weights_, gate_up, down, output_ = (part.detach().numpy() for part in (*parts, output))
    return output if compiled(hidden_, indices.numpy(), weights_, gate_up, down, output_) else None


def _is_gated(experts: Any) -> bool:
    """Whether these are silu(gate) · up and nothing else."""
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import _default_apply_gate

    plain = experts.has_gate and not experts.has_bias and not experts.is_transposed
    return (
        plain
        and isinstance(getattr(experts, "act_fn", None), (nn.SiLU, SiLUActivation))
        and not getattr(experts, "_is_expert_parallel", False)
        and getattr(experts._apply_gate, "__func__", None) is _default_apply_gate
    )


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.is_contiguous()


@cache
def _compiled() -> Any:
    """The compiled function, or None where numba is not installed."""
    try:
        from .kernels.arithmetic import compiling

        with compiling():
            from .kernels.gated import run_experts
    except ImportError:
        return None
    return run_experts


def _one_by_one(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """A product for each expert in use, where their number is known without waiting."""
    count, top_k = experts.num_experts, indices.shape[-1]
    expert, order = indices.masked_fill(weights == 0, count).flatten().sort()
    rows = torch.bincount(expert, minlength=count + 1)[:count].tolist()
    used, sizes = [e for e in range(count) if rows[e]], [n for n in rows if n]
    order = order[: sum(sizes)]
    token = order // top_k
    if not used:
        return torch.zeros_like(hidden)

    def linear(x: Tensor, name: str) -> Tensor:
        matrices = getattr(experts, name)
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


def _grouped(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """One grouped product; assignments whose weight is 0 are sorted behind the last expert and belong to no group.

    Where nothing is left out, the sums are those of `grouped_mm`, bit for bit.
    """
    count, top_k = experts.num_experts, indices.shape[-1]
    expert, order = indices.masked_fill(weights == 0, count).flatten().sort()
    ends = torch.searchsorted(expert, torch.arange(count, device=expert.device), right=True, out_int32=True)
    named = expert.clamp_max(count - 1) if experts.has_bias else expert
    rows = _products(experts, hidden[order // top_k], named, ends)
    output = rows * weights.flatten()[order].unsqueeze(-1)
    # Rows behind the last expert are left as they were in memory.
    output = output.masked_fill_((expert == count).unsqueeze(-1), 0.0)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return output[back].unflatten(0, (-1, top_k)).sum(1).to(hidden.dtype)


def _in_kernels(kernels: Any, experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """As `_grouped`, with one kernel before the products and one behind them; a token's sum may be in another order."""
    groups = kernels.group(indices, weights, experts.num_experts)
    rows = _products(experts, hidden.index_select(0, groups.token), groups.expert, groups.ends)
    output: Tensor = kernels.combine(rows, groups, weights, hidden.dtype)
    return output


def _products(experts: Any, rows: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
    """What experts make of rows that are in their order, without the weights; those behind the last end are undefined.

    Args:
        rows: what enters the experts `(rows, hidden)`.
        expert: of each row `(rows,)`.
        ends: where each expert's rows end `(experts,)`.
    """
    from transformers.integrations.moe import _grouped_linear

    if hasattr(experts, f"down_proj{SCALE}"):
        return _fp8_products(experts, rows, ends)

    def linear(x: Tensor, name: str) -> Tensor:
        bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
        return _grouped_linear(x, getattr(experts, name), ends, bias=bias, is_transposed=experts.is_transposed)

    if experts.has_gate:
        inner = experts._apply_gate(linear(rows, "gate_up_proj"))
    else:
        inner = experts.act_fn(linear(rows, "up_proj"))
    return linear(inner, "down_proj")


def _fp8_products(experts: Any, rows: Tensor, ends: Tensor) -> Tensor:
    """As `_products` of experts in float8, by the kernels that transformers multiplies them with."""
    from transformers.integrations.finegrained_fp8 import load_finegrained_fp8_kernel

    multiply = load_finegrained_fp8_kernel().grouped_matmul
    counts = functional.pad(ends, (1, 0)).diff().int()

    def linear(x: Tensor, name: str) -> Tensor:
        weight, scale = getattr(experts, name), getattr(experts, f"{name}{SCALE}")
        product: Tensor = multiply(
            x, weight, scale, offsets=ends, tokens_per_expert=counts, block_size=experts.block_size
        )
        return product

    if experts.has_gate:
        return linear(experts._apply_gate(linear(rows, "gate_up_proj")), "down_proj")
    return linear(experts.act_fn(linear(rows, "up_proj")), "down_proj")


@cache
def _kernels(device: torch.device) -> Any:
    """The Triton kernels, or None where they do not run on this device."""
    if device.type != "cuda":
        return None
    try:
        from .kernels import grouping

        one = torch.zeros(1, 1, device=device)
        grouping.combine(one, grouping.group(one.long(), one, 1), one, one.dtype)
    except ImportError:
        return None
    except Exception as error:
        # A model must run on a machine where only the kernels do not, e.g. because there is no C compiler.
        reason = (str(error).strip().splitlines() or [""])[0]
        warnings.warn(f"experts run without Triton kernels: {type(error).__name__}: {reason}", stacklevel=2)
        return None
    return grouping


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
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(BY_DISTINCT, _by_distinct)
    ALL_FP8_EXPERTS_FUNCTIONS.register(BY_DISTINCT, _in_groups)
    _compiled()  # compiled, where nobody has yet, before a step waits for it
    for device in {layer.device for layer in layers}:
        _kernels(device)
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
