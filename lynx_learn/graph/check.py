"""Does onnxruntime decide as PyTorch does?"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LynxError
from ..moe.decision import Routing, usable_experts, used_experts
from ..selector.layer import LayerSelector
from ..selector.selector import LynxSelector
from .graph import Answer, random_batch
from .onnx_runtime import OnnxSelector

# Costs may differ by so much, relatively: float32 in another order, then the exponential. Bits this close to the
# threshold may differ. Below the floor, far from any threshold, a cost is as good as nothing.
TOLERANCE, FLOOR = 1e-3, 1e-30

CHECKED_TOKENS = (1, 16, 512)


def middle(totals: Tensor) -> float:
    """A threshold that half of the experts in use stay below, between two of their totals `(experts,)`."""
    rising = totals[totals > 0].sort().values
    half = len(rising) // 2
    return float(rising[max(half - 1, 0) : half + 1].mean())


@dataclass(frozen=True)
class Parity:
    """How far onnxruntime is from PyTorch."""

    layers: int
    tokens: tuple[int, ...]
    absolute: float
    """Largest difference of two costs, in nats."""
    relative: float
    """Largest difference of two costs, relative to PyTorch's."""
    bits: int
    """Keep bits compared."""
    differing: int
    """Of these differ; each within rounding of the threshold."""


def check(selector: LynxSelector, runner: OnnxSelector, sizes: tuple[int, ...] = CHECKED_TOKENS) -> Parity:
    """Compare onnxruntime with PyTorch, on random batches of every layer.

    PyTorch runs the scorers as they are trained, not as they are folded, so this checks the folding too.

    Raises:
        LynxError: they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(1)
    found = []
    for layer, own in enumerate(selector.layers):
        for tokens in sizes:
            routing = random_batch(selector, layer, tokens, generator)
            found.append(compare(own, runner, layer, routing))  # type: ignore[arg-type]
    absolute, relative, bits, differing = zip(*found, strict=True)
    return Parity(len(selector.layers), sizes, max(absolute), max(relative), sum(bits), sum(differing))


@torch.no_grad()
def compare(
    own: LayerSelector, runner: OnnxSelector, layer: int, routing: Routing, threshold: float | None = None
) -> tuple[float, float, int, int]:
    """Of one batch: the largest absolute and relative difference of costs, keep bits, and those that differ.

    `routing` without its leading dimension; the threshold is by default `middle`.

    Raises:
        LynxError: the two differ by more than rounding.
    """
    one = Routing(*(part.unsqueeze(0) for part in routing))
    costs = own.costs(one)
    total = own.totals(one, costs)
    tau = middle(total) if threshold is None else threshold
    keep = own.keep(one, total, torch.tensor([tau]))[1].squeeze(0)
    costs, total = costs.squeeze(0), total.squeeze(0)
    answer = runner.run(layer, routing.logits, routing.indices, routing.weights, tau, routing.hidden, routing.active)
    got = Answer(*(None if part is None else torch.from_numpy(part) for part in answer))  # type: ignore[arg-type]

    difference = torch.where(got.costs == costs, 0.0, (got.costs - costs).abs())
    relative = float((difference / costs.clamp_min(FLOOR)).max())
    differing = got.keep != keep
    # Rounding may carry a total over the threshold, or make another expert the dearest one, which stays.
    dearest = float(total.max())
    unsure = _close(total, tau) | _close(total, dearest)
    used = used_experts(routing.indices, routing.active, len(keep))
    kept = (got.keep & usable_experts(used))[routing.indices]
    stand_in = got.run_indices[~kept]
    faults = {
        "costs": not relative <= TOLERANCE,
        "keep bits": bool((differing & ~unsure).any()),
        "weights": not torch.equal(got.run_weights, routing.weights.float() * kept),
        "indices": not (
            torch.equal(got.run_indices[kept], routing.indices[kept])
            and bool((got.keep[stand_in] & _close(total[stand_in], dearest)).all())
        ),
    }
    if got.addition is not None:
        # By what onnxruntime has left out: that differs where a total lies at the threshold.
        left = torch.where(got.run_weights == routing.weights, 0.0, routing.weights)
        by_expert = torch.zeros_like(routing.logits).scatter_add(-1, routing.indices, left)
        wanted = own.surrogates(routing.hidden, by_expert)
        faults["what surrogates answer"] = not torch.allclose(
            got.addition, wanted, rtol=TOLERANCE, atol=TOLERANCE * float(wanted.abs().max())
        )
    if any(faults.values()):
        wrong = ", ".join(name for name, fault in faults.items() if fault)
        raise LynxError(
            f"onnxruntime does not compute what PyTorch does ({wrong} of layer {layer}, {len(routing.active)} tokens, costs "
            f"apart by {relative:.1e} relatively): nothing was written; take the versions in constraints.txt"
        )
    return float(difference.max()), relative, differing.numel(), int(differing.sum())


def _close(totals: Tensor, value: float) -> Tensor:
    return (totals - value).abs() <= TOLERANCE * totals.clamp_min(abs(value))
