"""Everything this package knows about transformers models: MoE blocks, scoring rules, and the calls that reach them.

Nothing here is keyed by a model's name. A block is found by its structure (`experts` beside `gate` or `router`), the
router's scoring rule is the one of a small family of rules that reproduces the router's own output, and a model that
does not fit is refused with the reason.
"""

import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import ModelError

Activation = Literal["softmax", "sigmoid", "topk_softmax"]
# Tokens in the probe that tells a router's scoring rule, and the share of them a rule may miss through ties in
# low-precision logits. A wrong rule misses nearly all.
PROBE_TOKENS, PROBE_MISSES = 128, 0.03


@dataclass(frozen=True)
class ScoringRule:
    """How a router turns logits into `top_k` experts and their weights.

    Attributes:
        activation: `softmax` or `sigmoid` of all logits, or `topk_softmax`, the softmax of the chosen ones.
        normalise: divide the chosen weights by their sum.
        scale: factor on the weights.
        bias: added to the scores for the choice alone (DeepSeek-V3, arXiv 2412.19437), `(experts,)`.
        groups, top_groups: the choice is limited to the `top_groups` groups with the largest sum of two best scores.
    """

    activation: Activation
    top_k: int
    normalise: bool = False
    scale: float = 1.0
    bias: Tensor | None = None
    groups: int = 1
    top_groups: int = 1

    def scores(self, logits: Tensor) -> Tensor:
        """Scores `(..., experts)` in float32 before the choice; comparable between the experts of a token."""
        logits = logits.float()
        return logits.sigmoid() if self.activation == "sigmoid" else logits.softmax(-1)

    def route(self, logits: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts for logits `(..., experts)`: indices and float32 weights, both `(..., top_k)`.

        With `allowed`, a boolean mask that broadcasts to the logits, other experts count as absent. Where fewer
        than `top_k` are allowed, the surplus assignments repeat an allowed expert with weight 0.
        """
        logits = logits.float()
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        scores = self.scores(logits)
        choice = scores if self.activation != "topk_softmax" else logits
        if self.bias is not None:
            choice = choice + self.bias.to(choice)
        if allowed is not None:
            choice = choice.masked_fill(~allowed, float("-inf"))
        if self.groups > 1:
            choice = choice.masked_fill(~self._open_groups(choice), float("-inf"))
        values, indices = choice.topk(self.top_k, dim=-1)
        weights = values.softmax(-1) if self.activation == "topk_softmax" else scores.gather(-1, indices)
        if allowed is not None:
            absent = values == float("-inf")
            indices = torch.where(absent, indices[..., :1], indices)
            weights = weights.masked_fill(absent, 0.0)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return indices, weights * self.scale

    def _open_groups(self, choice: Tensor) -> Tensor:
        grouped = choice.unflatten(-1, (self.groups, -1))
        first, second = grouped.topk(2, dim=-1).values.unbind(-1)
        # An absent second adds nothing, so a group with one expert left can open, and one with none cannot be best.
        strength = first + second.masked_fill(second == float("-inf"), 0.0)
        best = strength.topk(self.top_groups, dim=-1).indices
        open_groups = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=choice.device).scatter(-1, best, True)
        return open_groups.unsqueeze(-1).expand_as(grouped).flatten(-2)

    def describe(self) -> str:
        """One phrase for people, e.g. `sigmoid, choice bias, 2 of 4 groups, normalised, scaled by 2.5`."""
        parts = [{"topk_softmax": "softmax of the top-k"}.get(self.activation, self.activation)]
        parts += ["choice bias"] if self.bias is not None else []
        parts += [f"{self.top_groups} of {self.groups} groups"] if self.groups > 1 else []
        parts += ["normalised"] if self.normalise else []
        parts += [f"scaled by {self.scale:g}"] if self.scale != 1.0 else []
        return ", ".join(parts)


@dataclass(frozen=True)
class MoeLayer:
    """One MoE block of a model that can be acted on.

    `logits_at` is the position of the logits in the router's output tuple.
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
    logits_at: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""
        return sum(p.numel() * p.element_size() for p in self.experts.parameters()) // self.num_experts

    @property
    def device(self) -> torch.device:
        return next(self.router.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.experts.parameters()).dtype

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
    layers: list[MoeLayer] = []
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.Module) or isinstance(module, nn.ModuleList):
            continue
        try:
            layers.append(_read_block(len(layers), name, module, experts))
        except ModelError as error:
            kind = type(module).__name__
            raise ModelError(
                f"model type {model_type(model)!r} is not supported: block {name} ({kind}) {error}"
            ) from None
    if not layers:
        raise ModelError(
            f"model type {model_type(model)!r} has no Mixture-of-Experts block of a known shape: expected modules "
            "with `experts` beside `gate` or `router`; `lynx-learn inspect MODEL` shows what is there"
        )
    return layers


def _read_block(index: int, name: str, block: nn.Module, experts: nn.Module) -> MoeLayer:
    router = getattr(block, "gate", None) or getattr(block, "router", None)
    if not isinstance(router, nn.Module):
        raise ModelError("has experts but no child `gate` or `router`")
    stacked = [p for p in experts.parameters(recurse=False) if p.ndim == 3]
    if len(stacked) < 2:
        raise ModelError("does not keep its expert weights as stacked 3-D parameters")
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[0] != stacked[0].shape[0]:
        raise ModelError("has a router without a weight of shape (experts, hidden)")
    arguments = [p for p in inspect.signature(experts.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(arguments) < 3 and not any(
        p.kind is p.VAR_POSITIONAL for p in inspect.signature(experts.forward).parameters.values()
    ):
        raise ModelError("runs every expert for every token, so there is nothing to skip")
    num_experts, hidden_size = weight.shape
    if num_experts < 2:
        raise ModelError("has a single expert, so there is nothing to skip")
    rule, logits_at, top_k = _read_router(router, num_experts, hidden_size)
    return MoeLayer(index, name, block, router, experts, num_experts, top_k, hidden_size, rule, logits_at)


@torch.no_grad()
def _read_router(router: nn.Module, experts: int, hidden: int) -> tuple[ScoringRule, int, int]:
    """Run the router on random tokens and find the rule that gives its indices and weights from its logits."""
    weight: Tensor = router.weight  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(PROBE_TOKENS, hidden, generator=generator)
    # Large enough for logits to spread, whatever the scale the weights were initialised with.
    spread = weight.float().norm(dim=1).mean().clamp_min(1e-6).item()
    probe = (probe * (2.0 / spread)).to(weight)
    try:
        out = router(probe)
    except Exception as error:
        raise ModelError(
            f"has a router that cannot be called with hidden states alone ({type(error).__name__})"
        ) from None
    parts = [part for part in out if isinstance(part, Tensor)] if isinstance(out, tuple | list) else []
    indices = next((p for p in parts if not p.is_floating_point() and p.ndim == 2), None)
    floats = {i: p for i, p in enumerate(out) if isinstance(p, Tensor) and p.is_floating_point()} if parts else {}
    bias = getattr(router, "bias", None)
    logits = functional.linear(probe.float(), weight.float(), bias.float() if isinstance(bias, Tensor) else None)
    if indices is None or len(floats) < 2:
        raise ModelError("has a router that does not return logits, weights and indices")
    top_k = indices.shape[1]
    close = [i for i, p in floats.items() if p.shape == logits.shape and _close(p, logits)]
    if not close:
        raise ModelError("has a router that does not return its logits")
    weights = next((p for i, p in floats.items() if i != close[0] and p.shape == indices.shape), None)
    if weights is None:
        raise ModelError("has a router that does not return one weight per assignment")
    wanted = _dense(indices, weights, experts)
    for rule in _candidate_rules(router, top_k):
        given = _dense(*rule.route(floats[close[0]]), experts)
        agree = torch.isclose(given, wanted, rtol=2e-2, atol=1e-3).all(dim=-1).float().mean()
        if agree >= 1.0 - PROBE_MISSES:
            return rule, close[0], top_k
    raise ModelError(f"scores experts in an unknown way ({type(router).__name__}); no known rule gives its output")


def _close(given: Tensor, wanted: Tensor) -> bool:
    return bool(torch.isclose(given.float(), wanted, rtol=2e-2, atol=5e-2).float().mean() > 0.99)


def _dense(indices: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Weights by expert `(tokens, experts)`, so that the order of the assignments does not matter."""
    zeros = torch.zeros(indices.shape[0], experts, device=indices.device)
    return zeros.scatter_add(1, indices.long(), weights.float())


def _candidate_rules(router: nn.Module, top_k: int) -> Iterator[ScoringRule]:
    """The rules this router could follow, by the attributes it has."""
    bias = getattr(router, "e_score_correction_bias", None)
    groups = next((g for a in ("num_group", "n_group") if (g := getattr(router, a, None))), 1)
    scale = float(getattr(router, "routed_scaling_factor", 1.0) or 1.0)
    rest: dict[str, Any] = {
        "bias": bias.detach() if isinstance(bias, Tensor) else None,
        "groups": int(groups),
        "top_groups": int(getattr(router, "topk_group", None) or 1),
    }
    activations: tuple[Activation, ...] = ("softmax", "sigmoid", "topk_softmax")
    for factor in dict.fromkeys((scale, 1.0)):
        for activation, normalise in itertools.product(activations, (True, False)):
            yield ScoringRule(activation, top_k, normalise, factor, **rest)


def router_fingerprint(layers: list[MoeLayer]) -> str:
    """SHA-256 over all router weights and biases, rounded to bfloat16 so that the dtype a model is loaded in does not matter."""
    digest = hashlib.sha256()
    for layer in layers:
        for key, tensor in sorted(layer.router.state_dict().items()):
            digest.update(f"{layer.name}.{key}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


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

    def after_router(module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        held["logits"] = output[layer.logits_at]

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
    if not isinstance(tokens, Tensor) or tokens.shape[1] != 1 or cache is None or not int(cache.get_seq_length()):
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


@contextmanager
def experts_by_distinct(model: nn.Module) -> Iterator[None]:
    """While open, the experts run by an implementation whose time follows the distinct experts.

    `batched_mm` reads one expert per assignment, so skipping would save nothing; off the CPU `generate()` switches
    `grouped_mm` to it for decode. Under a name of its own `grouped_mm` is not switched.
    """
    config = getattr(model, "config", None)
    current = getattr(config, "_experts_implementation", None)
    on_cpu = next(model.parameters()).device.type == "cpu"
    if current == "batched_mm" or (current == "grouped_mm" and not on_cpu):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register("lynx_grouped_mm", ALL_EXPERTS_FUNCTIONS["grouped_mm"])
        model.set_experts_implementation("lynx_grouped_mm")  # type: ignore[operator]
        try:
            yield
        finally:
            model.set_experts_implementation(current)  # type: ignore[operator]
    else:
        yield
