"""How much a layer's cost hurts: nats of KL per unit of predicted cost, measured one layer at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..decode.simulate import compare
from ..moe.decision import Decision, Routing
from ..moe.families import MoeLayer
from ..selector.layer import LayerSelector
from ..selector.selector import LynxSelector
from ..show.progress import track


class HalfOfOneLayer:
    """Skips the cheaper half of the experts that each batch loads, in one layer, and sums the predicted cost of it."""

    name = "probe"

    def __init__(self, selector: LynxSelector, layer: int) -> None:
        self.selector, self.layer = selector, layer
        self.setting = f"layer={layer}"
        self.cost, self.tokens = 0.0, 0

    def bind(self, layers: list[MoeLayer]) -> None:
        self.selector.check(layers)
        own = self.selector.layers[self.layer].to(layers[self.layer].device)
        own.surrogates.to(layers[self.layer].dtype)

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        if layer.index != self.layer:
            return Decision(routing.indices, routing.weights)
        own: LayerSelector = self.selector.layers[self.layer]  # type: ignore[assignment]
        costs = own.costs(routing)
        total = own.totals(routing, costs)
        loaded = torch.where(total > 0, total, torch.full_like(total, float("nan")))
        decision = own.decide(routing, loaded.nanmedian(-1).values, costs)
        self.cost += float(costs[decision.weights == 0].sum())
        self.tokens += routing.active.numel()
        return decision

    def surrogate_bytes(self, layer: MoeLayer, skipped: float, batches: int) -> float:
        return 0.0


def measure_sensitivities(
    model: nn.Module,
    layers: list[MoeLayer],
    selector: LynxSelector,
    groups: Sequence[tuple[Tensor, list[str]]],
    prompt: int,
) -> list[float]:
    """Set and return each layer's sensitivity, so that predicted costs come out in nats of KL per token."""
    probes = [HalfOfOneLayer(selector, layer.index) for layer in layers]
    for probe in probes:
        selector.layers[probe.layer].sensitivity.fill_(1.0)  # type: ignore[operator]
    measured = compare(
        model, layers, groups, probes, prompt, lambda steps: track(steps, "sensitivities", len(groups), unit="groups")
    )
    found = []
    for probe, result in zip(probes, measured, strict=True):
        per_token = probe.cost / max(probe.tokens, 1)
        found.append(max(result.mean("kl"), 1e-9) / max(per_token, 1e-30))
        selector.layers[probe.layer].sensitivity.fill_(found[-1])  # type: ignore[operator]
    return found
