"""What this package knows about the structure of transformers' MoE models.

Nothing here is keyed by a model's name. A block is found by its structure (`experts` beside `gate` or `router`), the
router's scoring rule is the one of a small family of rules that reproduces the router's own output, and a model that
does not fit is refused with the reason.
"""

import hashlib
import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .errors import ModelError
from .scoring import ScoringRule, read_router


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
    rule, logits_at, top_k = read_router(router, num_experts, hidden_size)
    return MoeLayer(index, name, block, router, experts, num_experts, top_k, hidden_size, rule, logits_at)


def router_fingerprint(layers: list[MoeLayer]) -> str:
    """SHA-256 over all router weights and biases, rounded to bfloat16 so that the dtype a model is loaded in does not matter."""
    digest = hashlib.sha256()
    for layer in layers:
        for key, tensor in sorted(layer.router.state_dict().items()):
            digest.update(f"{layer.name}.{key}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
