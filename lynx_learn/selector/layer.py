"""What one MoE layer needs to decide, as it is learned and as decode runs it."""

import copy
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..moe.decision import Decision, Routing, usable_experts, used_experts
from ..moe.families import Layer
from .config import SelectorConfig
from .features import assignment_features, feature_parts
from .prices import Offer, Pricing
from .scorers import SCORERS, Folded
from .surrogates import Surrogates


def run_instead(routing: Routing, anchor: Tensor, keep: Tensor, used: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices and weights to run, and which assignments are kept, all `(..., T, top_k)`; the others point at `anchor`.

    Arguments as `LayerSelector.keep` takes and gives them, and the experts `(..., experts)` that active tokens load.
    """
    usable = keep & usable_experts(used)
    kept = usable.gather(-1, routing.indices.flatten(-2)).view_as(routing.indices)
    return torch.where(kept, routing.indices, anchor.unsqueeze(-1)), routing.weights * kept, kept


def sum_in_order(places: Tensor, values: Tensor, count: int) -> Tensor:
    """Sums `(..., count)` of the values `(..., N)` that go to each place `(..., N)`, always in the same order.

    A GPU's `scatter_add` adds in whatever order it comes to; workers that share a layer's experts must decide alike.
    """
    here = places.unsqueeze(-1) == torch.arange(count, device=places.device)
    return torch.where(here, values.unsqueeze(-1), 0.0).sum(-2)


class LayerSelector(nn.Module):
    """What one MoE layer needs to decide: predicted costs in nats of KL, and the surrogates' answers."""

    sensitivity: Tensor

    def __init__(self, config: SelectorConfig) -> None:
        super().__init__()
        self.keep_top1 = config.keep_top1
        self.scorer = SCORERS[config.scorer](config.num_experts, config.hidden_size)
        self.surrogates = Surrogates(config.num_experts, config.hidden_size, config.rank)
        self.register_buffer("sensitivity", torch.ones(()))

    def costs(self, routing: Routing) -> Tensor:
        """Predicted cost in nats of leaving out each assignment `(G, T, top_k)`."""
        features = assignment_features(routing.logits, routing.indices, routing.weights)
        return self.scorer(features, routing.indices, routing.hidden).exp() * self.sensitivity

    @staticmethod
    def totals(routing: Routing, costs: Tensor) -> Tensor:
        """Cost of leaving out each expert `(G, experts)`: the sum over the active tokens' assignments."""
        counted = torch.where(routing.active.unsqueeze(-1), costs, 0.0)
        flat, values, experts = routing.indices.flatten(-2), counted.flatten(-2), routing.logits.shape[-1]
        if costs.is_cuda:
            return sum_in_order(flat, values, experts)
        zeros = torch.zeros(*flat.shape[:-1], experts, dtype=costs.dtype, device=costs.device)
        return zeros.scatter_add(-1, flat, values)

    def keep(
        self, routing: Routing, total: Tensor, thresholds: Tensor, pricing: Pricing | None = None
    ) -> tuple[Tensor, Tensor]:
        """The dearest expert `(G, 1)`, which always stays, and which experts stay `(G, experts)`."""
        anchor = total.argmax(-1, keepdim=True)
        must = torch.zeros_like(total, dtype=torch.bool).scatter(-1, anchor, True)
        if self.keep_top1:
            first = (routing.weights == routing.weights.amax(-1, keepdim=True)) & routing.active.unsqueeze(-1)
            flat = routing.indices.flatten(-2)
            must = must | (torch.zeros_like(total).scatter_add(-1, flat, first.flatten(-2).float()) > 0)
        limits = thresholds.unsqueeze(-1)
        if pricing is not None:
            limits = limits * pricing.of(Offer(total, thresholds, must))
        return anchor, must | ~(total < limits)  # a cost that is NaN keeps its expert

    def decide(self, routing: Routing, thresholds: Tensor, costs: Tensor | None = None) -> Decision:
        """Leave out every expert whose assignments cost less than the batch's threshold `(G,)` together.

        The expert with the largest cost stays, so that what is left out has a loaded expert to point at.
        """
        return self.answer(routing, self.rewrite(routing, thresholds, self.costs(routing) if costs is None else costs))

    def rewrite(self, routing: Routing, thresholds: Tensor, costs: Tensor, pricing: Pricing | None = None) -> Decision:
        """The decision without what surrogates answer; without prices each expert has the price 1."""
        anchor, keep = self.keep(routing, self.totals(routing, costs), thresholds, pricing)
        used = used_experts(routing.indices, routing.active, keep.shape[-1])
        indices, weights, kept = run_instead(routing, anchor, keep, used)
        dropped = ~kept if self.surrogates.rank else None
        return Decision(indices, weights, answered=dropped, loads=(used, used & keep))

    def answer(self, routing: Routing, decision: Decision) -> Decision:
        """With what surrogates answer."""
        if decision.answered is None:
            return decision
        weights = routing.weights * decision.answered
        return decision._replace(addition=self.surrogates.answer(routing.hidden, routing.indices, weights))


@dataclass(frozen=True)
class Replica:
    """A layer's selector as decode runs it, on the layer's device, the surrogates in the experts' precision.

    One serves all thresholds, and is made again only when the selector has changed or is bound to another kind of layer.
    """

    selector: LayerSelector
    folded: Folded
    place: tuple[torch.device, torch.dtype, int]
    parts: list[tuple[Tensor, int]] | None
    """What it was made from, each with its changes in place until then; None: in inference mode, which does not count."""

    @classmethod
    def on(cls, layer: Layer, own: LayerSelector) -> "Replica":
        """Of `own` beside this layer: the one that is there, or a new one."""
        place, parts = (layer.device, layer.dtype, layer.expert_bytes), _parts(own)
        held = _replicas.get(own)
        if held is None or held.place != place or not _same(held.parts, parts):
            made = copy.deepcopy(own).to(layer.device)
            made.surrogates.to(layer.dtype).choose(layer.expert_bytes)
            held = _replicas[own] = cls(made, made.scorer.fold(made.sensitivity), place, parts)
        return held


_replicas: WeakKeyDictionary[LayerSelector, Replica] = WeakKeyDictionary()


def _parts(own: LayerSelector) -> list[tuple[Tensor, int]] | None:
    tensors = own.state_dict(keep_vars=True).values()
    if torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in tensors):
        return None
    # The alias keeps the memory, so that other values cannot come to lie at the same address.
    return [(tensor.data, tensor._version) for tensor in tensors]


def _same(before: list[tuple[Tensor, int]] | None, now: list[tuple[Tensor, int]] | None) -> bool:
    """Whether these are the same tensors, and unchanged."""
    if before is None or now is None:
        return False
    return [(t.data_ptr(), t.dtype, count) for t, count in before] == [
        (t.data_ptr(), t.dtype, count) for t, count in now
    ]


@dataclass(frozen=True)
class Ready:
    """One layer's selector with thresholds by batch size; what does not depend on these is shared, see `Replica`."""

    selector: LayerSelector
    folded: Folded
    thresholds: Tensor
    """By the number of active tokens, as `by_active` gives them."""

    @classmethod
    def on(cls, layer: Layer, own: LayerSelector, thresholds: Tensor) -> "Ready":
        shared = Replica.on(layer, own)
        return cls(shared.selector, shared.folded, thresholds.to(layer.device))

    def threshold(self, active: Tensor) -> Tensor:
        """The threshold `(G,)` for the number of active tokens `(G, T)`."""
        return self.thresholds[active.sum(-1).clamp_max(len(self.thresholds) - 1)]

    def costs(self, routing: Routing) -> Tensor:
        """As `LayerSelector.costs`, from the folded scorer."""
        return self.folded.costs(
            feature_parts(routing.logits, routing.indices, routing.weights), routing.indices, routing.hidden
        )

    def rewrite(
        self,
        routing: Routing,
        scale: Tensor | None = None,
        pricing: Pricing | None = None,
        costs: Tensor | None = None,
    ) -> Decision:
        """As `LayerSelector.rewrite`, by these or its own costs; `scale` as in `ThresholdPolicy.decide`."""
        costs, counted = self.costs(routing) if costs is None else costs, routing.active
        if scale is not None:
            costs, counted = costs * scale.unsqueeze(-1), counted & scale.isfinite()
        return self.selector.rewrite(routing, self.threshold(counted), costs, pricing)
