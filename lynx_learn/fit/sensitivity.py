"""How much a layer's cost hurts: nats of KL per unit of predicted cost, measured one layer at a time."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..decode.simulate import compare
from ..moe.decision import Decision, Routing
from ..moe.families import MoeLayer
from ..selector.layer import LayerSelector
from ..selector.selector import LynxSelector
from ..show.progress import track

# Nats per token at which predicted costs are made to sum to the loss, and the step between the thresholds it is sought at.
LEVEL, STEP = 0.01, 2.0


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

    def own_bytes(self, layer: MoeLayer, skipped: Tensor, batches: int) -> float:
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


class Summed:
    """A selector at one threshold that sums what it predicts to lose, in all layers or in one that alone skips."""

    def __init__(self, selector: LynxSelector, threshold: float, only: int | None = None) -> None:
        self.selector, self.threshold, self.only = selector, threshold, only
        self.name, self.setting = "predicted", f"tau={threshold:.3g}"
        self.cost, self.tokens = 0.0, 0

    def bind(self, layers: list[MoeLayer]) -> None:
        self.selector.check(layers)
        for layer, own in zip(layers, self.selector.layers, strict=True):
            own.to(layer.device).surrogates.to(layer.dtype)

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        if layer.index == 0:
            self.tokens += int(routing.active.sum())
        if self.only not in (None, layer.index):
            return Decision(routing.indices, routing.weights)
        own: LayerSelector = self.selector.layers[layer.index]  # type: ignore[assignment]
        costs = own.costs(routing)
        decision = own.decide(routing, costs.new_full(costs.shape[:1], self.threshold), costs)
        left_out = (decision.weights == 0) & (routing.weights != 0) & routing.active.unsqueeze(-1)
        self.cost += float(costs[left_out].sum())
        return decision

    def own_bytes(self, layer: MoeLayer, skipped: Tensor, batches: int) -> float:
        return 0.0

    @property
    def predicted(self) -> float:
        """Nats per token."""
        return self.cost / max(self.tokens, 1)


def scale_to_nats(
    model: nn.Module,
    layers: list[MoeLayer],
    selector: LynxSelector,
    groups: Sequence[tuple[Tensor, list[str]]],
    prompt: int,
) -> dict[str, Any]:
    """Scale all sensitivities by one factor so that predicted costs of what is left out sum to the loss they cause.

    Tuning changes costs for the sake of decisions, and what is left out in one layer is felt in the next, so the sum has
    to be measured again. One factor for all layers changes no decision, when thresholds are scaled with it. It is right
    at LEVEL; the curve shows how far off sums are at other losses.

    Returns:
        `factor`; `curve`, thresholds with the `predicted` and the `measured` loss; `layers`, the same of each layer when it
        alone skips, at the threshold that loses LEVEL in all.
    """
    size = groups[0][0].shape[0]
    taus = [2 * LEVEL * size**0.5 * STEP**k for k in range(-6, 3)]
    probes = [Summed(selector, tau) for tau in taus]
    losses = [result.mean("kl") for result in compare(model, layers, groups, probes, prompt)]
    points = [
        (p.threshold, p.predicted, loss) for p, loss in zip(probes, losses, strict=True) if p.cost > 0 and loss > 0
    ]
    if not points:
        return {"factor": 1.0, "curve": [], "layers": []}
    tau, predicted = (_read_off([(p[2], p[place]) for p in points]) for place in (0, 1))
    factor = _read_off([(p[2], p[2]) for p in points]) / predicted
    alone = [Summed(selector, tau, layer.index) for layer in layers]
    single = [result.mean("kl") for result in compare(model, layers, groups, alone, prompt)]
    for own in selector.layers:
        own.sensitivity.mul_(factor)  # type: ignore[operator]
    return {
        "factor": factor,
        "curve": [{"threshold": t * factor, "predicted": p * factor, "measured": loss} for t, p, loss in points],
        "layers": [
            {"name": layer.name, "predicted": probe.predicted * factor, "measured": loss}
            for layer, probe, loss in zip(layers, alone, single, strict=True)
        ],
    }


def _read_off(points: list[tuple[float, float]]) -> float:
    """The second value where the first one, which rises, is LEVEL, on logarithms; the nearest end beyond them."""
    points = sorted(points)
    below, above = [p for p in points if p[0] <= LEVEL], [p for p in points if p[0] > LEVEL]
    if not below or not above:
        return (below or above[:1])[-1][1]
    (x0, y0), (x1, y1) = below[-1], above[0]
    share = math.log(LEVEL / x0) / math.log(x1 / x0)
    return math.exp(math.log(y0) + share * math.log(y1 / y0))
