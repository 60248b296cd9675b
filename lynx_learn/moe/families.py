"""What this package knows about the structure of transformers' MoE models.

Nothing here is keyed by a model's name. A block is found by its structure (`experts` beside `gate` or `router`), what it
gives its experts is seen by running it on random tokens, the scoring rule is the one of a small family of rules that
reproduces that from the router's logits, and a model that does not fit is refused with the reason.
"""

import inspect
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .fp8.scaled import computed_in, refuse_other_small, weights_of
from .loading import device_of, in_memory
from .routing_rules import ScoringRule, matching_rule

# Tokens in the probe that tells a router's scoring rule.
PROBE_TOKENS = 128


class Layer(Protocol):
    """What a selector needs of an MoE layer, whichever engine runs it."""

    @property
    def index(self) -> int:
        """Its place among the model's MoE layers."""

    @property
    def name(self) -> str:
        """Of its block, as transformers names it."""

    @property
    def router(self) -> nn.Module:
        """Whose parameters identify the model."""

    @property
    def num_experts(self) -> int: ...

    @property
    def top_k(self) -> int: ...

    @property
    def hidden_size(self) -> int:
        """Width of what enters and leaves its experts."""

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of what enters and leaves its experts."""


@dataclass(frozen=True)
class MoeLayer:
    """One MoE block of a model that can be acted on.

    `hidden_size` is the width of what enters and leaves the experts, which a projection around them can make another
    one than the model's. `logits_at` is the position of the logits in the router's output tuple, None where the output
    is the logits; `logits_are_probabilities` where their softmax stands there instead.
    """

    index: int
    name: str
    block: nn.Module = field(repr=False)
    router: nn.Module = field(repr=False)
    experts: nn.Module = field(repr=False)
    num_experts: int
    top_k: int
    hidden_size: int
    rule: ScoringRule = field(repr=False)
    logits_at: int | None
    logits_are_probabilities: bool = False

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""
        return sum(p.numel() * p.element_size() for p in self.experts.parameters()) // self.num_experts

    @property
    def device(self) -> torch.device:
        return device_of(self.router)

    @property
    def dtype(self) -> torch.dtype:
        return computed_in(self.experts)

    def logits_of(self, output: Any) -> Tensor:
        """Logits `(tokens, experts)` out of the router's output; of probabilities their logarithm, which does as well."""
        part: Tensor = output if self.logits_at is None else output[self.logits_at]
        return _log(part) if self.logits_are_probabilities else part

    def expert_weights(self) -> Iterator[tuple[str, Any]]:
        """All experts' weights by name, each as a tensor or as something with `numel()` and `at(places)` of its values."""
        # Those that are offloaded are not read for this.
        own = {name: value for name, value in self.experts.named_parameters() if not value.is_meta}
        return weights_of(own, getattr(self.experts, "block_size", None))

    @torch.no_grad()
    def expert_output(self, expert: int, hidden: Tensor) -> Tensor:
        """Output `(tokens, hidden)` of one expert with weight 1, by the model's own experts module."""
        tokens = hidden.shape[0]
        indices = torch.full((tokens, 1), expert, device=hidden.device)
        weights = torch.ones(tokens, 1, dtype=hidden.dtype, device=hidden.device)
        # Past the hooks: whoever asks may be deciding about this very call.
        return self.experts.forward(hidden, indices, weights)


def model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def find_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """All MoE blocks of `model`, each with its verified scoring rule.

    Raises:
        ModelError: the model has no MoE block, or any block of it cannot be acted on; named, with the reason.
    """
    _refuse_adapters(model)
    layers = [read_block(model, index, *block) for index, block in enumerate(moe_blocks(model))]
    check_structure(model)
    return layers


def read_block(model: nn.Module, index: int, name: str, module: nn.Module, experts: nn.Module) -> MoeLayer:
    """One of the `moe_blocks` of `model`, whose other weights need not be there.

    Raises:
        ModelError: it cannot be acted on; named, with the reason.
    """
    try:
        return _read_block(index, name, module, experts)
    except ModelError as error:
        kind = type(module).__name__
        raise ModelError(f"{_refusal(model)}block {name} ({kind}) {error}") from None


def _refusal(model: nn.Module) -> str:
    return f"model type {model_type(model)!r} is not supported: "


def check_structure(model: nn.Module) -> None:
    """Refuse a model, also one without weights, whose blocks are not all there is to its experts.

    Raises:
        ModelError: with the reason.
    """
    blocks = list(moe_blocks(model))
    if not blocks:
        raise ModelError(
            f"model type {model_type(model)!r} has no Mixture-of-Experts block of a known shape: expected modules "
            "with `experts` beside `gate` or `router`; `lynx-learn inspect MODEL` shows what is there"
        )
    known = {experts for _, _, experts in blocks}
    for name, module in model.named_modules():
        if len(_stacked(module)) > 1 and module not in known:
            raise ModelError(
                f"{_refusal(model)}{name} ({type(module).__name__}) holds experts outside of a known block"
            )
    siblings = Counter(name.rpartition(".")[0] for name, _, _ in blocks)
    for name, count in siblings.items():
        if count > 1 and not isinstance(model.get_submodule(name), nn.ModuleList):
            raise ModelError(
                f"{_refusal(model)}{name} has {count} MoE blocks, and which of them runs depends on the token"
            )


def _refuse_adapters(model: nn.Module) -> None:
    """Adapters change what the model computes, and are switched while it runs."""
    for module in model.modules():
        names = getattr(module, "active_adapters", None)
        if not hasattr(module, "base_layer") or not isinstance(names, list) or not names:
            continue
        if not getattr(module, "disable_adapters", False):
            raise ModelError(
                f"the model has an active adapter ({', '.join(map(str, names))}), which makes another model of it: merge it "
                "(merge_and_unload) and train a selector for the merged model, or disable it"
            )


def alike(layers: Sequence[Layer]) -> Layer:
    """The first of layers that all have its number of experts, top-k and width.

    Raises:
        ModelError: one has not.
    """
    first = layers[0]
    for layer in layers:
        if (layer.num_experts, layer.top_k, layer.hidden_size) != (first.num_experts, first.top_k, first.hidden_size):
            raise ModelError(
                f"layer {layer.name} has another number of experts, top-k or width than {first.name}: models with unequal layers cannot be collected"
            )
    return first


def moe_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Name, module and experts of whatever has the structure of an MoE block; also of a model without weights."""
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module) and not isinstance(module, nn.ModuleList):
            yield name, module, experts


def _stacked(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters that hold a matrix for each of several experts."""
    return [p for p in module.parameters(recurse=False) if p.ndim == 3 and p.shape[0] > 1]


def _read_block(index: int, name: str, block: nn.Module, experts: nn.Module) -> MoeLayer:
    router = getattr(block, "gate", None) or getattr(block, "router", None)
    if not isinstance(router, nn.Module):
        raise ModelError("has experts but no child `gate` or `router`")
    stacked = [p for p in experts.parameters(recurse=False) if p.ndim == 3]
    refuse_other_small(experts)
    if len(stacked) < 2:
        raise ModelError("does not keep its expert weights as stacked 3-D parameters")
    arguments = [p for p in inspect.signature(experts.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(arguments) < 3 and not any(
        p.kind is p.VAR_POSITIONAL for p in inspect.signature(experts.forward).parameters.values()
    ):
        raise ModelError("runs every expert for every token, so there is nothing to skip")
    num_experts = min(p.shape[0] for p in stacked)
    if num_experts < 2:
        raise ModelError("has a single expert, so there is nothing to skip")
    with in_memory(router), in_memory(block, recurse=False):
        seen, place = _read_router(block, router, experts, num_experts)
        rule = matching_rule(block, router, place.logits, seen.indices, seen.weights)
    if rule is None:
        raise ModelError(f"scores experts in an unknown way ({type(router).__name__}); no known rule gives its output")
    top_k, width = seen.indices.shape[1], seen.hidden.shape[1]
    return MoeLayer(
        index, name, block, router, experts, num_experts, top_k, width, rule, place.at, place.are_probabilities
    )


class _Seen(NamedTuple):
    """What a router returned for a probe, and what the experts were given: `(tokens, ...)` each."""

    output: Any
    hidden: Tensor
    indices: Tensor
    weights: Tensor


class _Place(NamedTuple):
    """Where a router's output has its logits, and the logits of the probe, `(tokens, experts)`."""

    at: int | None
    are_probabilities: bool
    logits: Tensor


class _Reached(Exception):
    """The block has come to its experts: a probe needs nothing beyond."""


@torch.no_grad()
def _read_router(block: nn.Module, router: nn.Module, experts: nn.Module, num_experts: int) -> tuple[_Seen, _Place]:
    """Run the block on random tokens, as far as its experts."""
    weight = next((p for p in router.parameters() if p.ndim == 2), None)
    if weight is None:
        raise ModelError("has a router without a weight matrix")
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(PROBE_TOKENS, weight.shape[1], generator=generator)
    probe = probe.to(device_of(router), computed_in(experts))
    place = _find_logits(_run(block, router, experts, probe), num_experts)
    # Large enough for logits to spread, whatever the scale the weights were initialised with.
    spread = place.logits.float().std(dim=0).mean().clamp_min(1e-6)
    seen = _run(block, router, experts, probe * (2.0 / spread).to(probe))
    return seen, _find_logits(seen, num_experts)


def _run(block: nn.Module, router: nn.Module, experts: nn.Module, hidden: Tensor) -> _Seen:
    output: list[Any] = []
    call: list[Any] = []
    own = threading.get_ident()  # other threads may be running the model meanwhile

    def after_router(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if threading.get_ident() == own:
            output.append(result)

    def before_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != own:
            return
        call.extend([*args, *kwargs.values()])
        raise _Reached

    handles = [
        router.register_forward_hook(after_router),
        experts.register_forward_pre_hook(before_experts, with_kwargs=True, prepend=True),
    ]
    try:
        block(hidden.unsqueeze(0))
    except _Reached:
        pass
    except (
        Exception
    ) as error:  # a block that is a whole decoder layer needs more than hidden states; its router may not
        call = _call_of(router, hidden, error)
    finally:
        for handle in handles:
            handle.remove()
    tokens = hidden.shape[0]
    tensors = [part for part in call[:3] if isinstance(part, Tensor) and part.ndim == 2 and part.shape[0] == tokens]
    if not output or len(tensors) < 3 or tensors[1].is_floating_point() or tensors[1].shape != tensors[2].shape:
        raise ModelError("does not call its experts with hidden states, indices and weights")
    return _Seen(output[-1], *tensors)


def _call_of(router: nn.Module, hidden: Tensor, reason: Exception) -> list[Any]:
    """What a router that is called with hidden states alone says the experts are to be given."""
    more = [p for p in list(inspect.signature(router.forward).parameters.values())[1:] if p.default is p.empty]
    needed = ", ".join(p.name for p in more if p.kind is p.POSITIONAL_OR_KEYWORD)
    if needed:
        raise ModelError(f"has a router that needs more than hidden states: {needed}")
    try:
        output = router(hidden)
    except Exception:  # then the block did not get as far as that
        said = (str(reason).strip().splitlines() or [""])[0]
        raise ModelError(f"cannot be run on hidden states only ({type(reason).__name__}: {said})") from reason
    parts = [p for p in output if isinstance(p, Tensor)] if isinstance(output, tuple | list) else []
    indices = next((p for p in parts if not p.is_floating_point() and p.ndim == 2), None)
    weights = next(
        (p for p in parts if indices is not None and p.is_floating_point() and p.shape == indices.shape), None
    )
    if indices is None or weights is None:
        raise ModelError("has a router that does not return logits, weights and indices")
    return [hidden, indices, weights]


def _find_logits(seen: _Seen, num_experts: int) -> _Place:
    """The part of a router's output with one value per expert; a rule has yet to show that these are logits."""
    whole = isinstance(seen.output, Tensor)
    parts = [seen.output] if whole else list(seen.output)
    tokens = seen.hidden.shape[0]
    for at, part in enumerate(parts):
        if not isinstance(part, Tensor) or not part.is_floating_point() or part.ndim != 2 or part.shape[0] != tokens:
            continue
        if part.shape[1] == num_experts:
            total = part.float().sum(-1)
            are_probabilities = bool((part >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-2)
            return _Place(None if whole else at, are_probabilities, _log(part) if are_probabilities else part)
        if part.shape[1] > num_experts:
            raise ModelError(f"chooses among {part.shape[1]}, but only {num_experts} of them are experts with weights")
    raise ModelError("has a router that does not return its logits")


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.float().clamp_min(torch.finfo(torch.float32).tiny).log()
