"""Decode steps of a trace, and what a selector leaves of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..moe.decision import Routing
from ..offload.replay import read_steps
from ..selector.config import by_active
from ..selector.layer import LayerSelector
from ..selector.prices import Pricing, Uniform, check_prices
from ..selector.selector import LynxSelector
from ..traces.format import Trace

# Halvings of a threshold's logarithm, and its range as multiples of the calibrated threshold.
HALVINGS, SMALLEST, LARGEST = 40, 1e-6, 1e6


@dataclass(frozen=True)
class Traffic:
    """Decode steps, as routed.

    Attributes:
        indices: experts `(steps, layers, sequences, top_k)`.
        weights: their weights, of the same shape; zeros without a selector.
        costs: nats that leaving each assignment out is predicted to cost, of the same shape; zeros without a selector.
        active: tokens that a layer runs in a step `(steps, layers, sequences)`, bool.
        experts: how many a layer has.
        tokens: how many have gone through all layers.
    """

    indices: Tensor
    weights: Tensor
    costs: Tensor
    active: Tensor
    experts: int
    tokens: int

    def sums(self, values: Tensor, where: Tensor | None = None) -> Tensor:
        """Sum of the assignments' values for each expert `(steps, layers, experts)`; of the sequences `where` (bool), or all."""
        counted = self.active if where is None else self.active & where
        values = torch.where(counted.unsqueeze(-1), values, 0.0).flatten(-2)
        zeros = torch.zeros(*self.indices.shape[:2], self.experts, dtype=values.dtype)
        return zeros.scatter_add(-1, self.indices.flatten(-2), values)

    def counts(self, where: Tensor | None = None) -> Tensor:
        """Tokens of each expert, as `sums`."""
        return self.sums(torch.ones_like(self.weights), where)

    def loss(self, keep: Tensor) -> float:
        """Nats for a token that leaving out all but `keep` `(steps, layers, experts)` is predicted to cost."""
        return float((self.sums(self.costs) * ~keep).sum()) / self.tokens


@dataclass(frozen=True)
class Source:
    """A trace in memory: what `Traffic` is made from."""

    trace: Trace
    rows: Tensor
    """Tokens that are replayed."""
    routed: list[Tensor]
    weights: list[Tensor]
    costs: list[Tensor]
    popular: Any
    """Assignments of each expert among the other tokens `(layers, experts)`."""

    @classmethod
    def read(cls, trace: Trace, fitted: Tensor, rows: Tensor, selector: LynxSelector | None) -> "Source":
        """Args:
        fitted: tokens that popularity is counted of.
        rows: tokens that are replayed.
        """
        routed, weights, costs = [], [], []
        for number in range(len(trace.options.layers)):
            keys = ("hidden", "logits", "indices", "weights") if selector else ("indices",)
            shards = list(trace.layer_shards(number, keys))
            parts = {key: torch.cat([shard[key] for shard in shards]) for key in keys}
            routed.append(parts["indices"])
            weights.append(parts["weights"].float() if selector else torch.zeros(routed[-1].shape))
            if selector is None:
                costs.append(torch.zeros_like(weights[-1]))
            else:
                own: LayerSelector = selector.layers[number]  # type: ignore[assignment]
                active = torch.ones(len(routed[-1]), dtype=torch.bool)
                costs.append(own.costs(Routing(**parts, active=active)))
        popular = np.stack([np.bincount(own[fitted].flatten(), minlength=trace.options.num_experts) for own in routed])
        return cls(trace, rows, routed, weights, costs, popular)

    def traffic(self, size: int, most: int) -> Traffic:
        """Steps of `size` sequences, at most so many.

        Raises:
            TraceError: there are too few sequences.
        """
        tokens = read_steps(self.trace, size, most, self.rows, self.routed).tokens
        indices, weights, costs = (
            torch.stack([own[tokens] for own in name], dim=1) for name in (self.routed, self.weights, self.costs)
        )
        active = torch.ones(indices.shape[:-1], dtype=torch.bool)
        return Traffic(indices, weights, costs, active, self.trace.options.num_experts, tokens.numel())

    def groups(self, size: int, most: int) -> list[Tensor]:
        """Tokens of the same steps, each group `(size, positions)` from its sequences' first position on.

        Raises:
            TraceError: there are too few sequences.
        """
        index = self.trace.index()
        rows = read_steps(self.trace, size, most, self.rows, self.routed).tokens
        position = index["position"][rows[:, 0]]
        starts = (position == position[0]).nonzero().flatten().tolist()
        found = index["tokens"][rows].long().tensor_split(starts[1:])
        return [own.T for own in found if len(own) > self.trace.options.prompt + 1]


@dataclass(frozen=True)
class Selection:
    """A selector at one of its calibrated budgets."""

    selector: LynxSelector
    thresholds: Tensor
    """By the number of active tokens."""

    @classmethod
    def at(cls, selector: LynxSelector, budget: float) -> "Selection":
        """Raises:
        OptionError: it is not calibrated for this budget.
        SelectorError: it is, but with other prices than one for all.
        """
        thresholds = selector.config.calibrated(budget)
        check_prices(Uniform(), selector.config.calibration.get("kl", {}))
        return cls(selector, torch.tensor(by_active(thresholds)))

    def keep(self, traffic: Traffic, prices: Sequence[Pricing | None] | None = None, scale: float = 1.0) -> Tensor:
        """Experts that run `(steps, layers, experts)`.

        Args:
            prices: of each layer; None: 1.
            scale: thresholds are those calibrated, times this.
        """
        totals, found = traffic.sums(traffic.costs), []
        for number, own in enumerate(self.selector.layers):
            total, active = totals[:, number], traffic.active[:, number]
            thresholds = self.thresholds[active.sum(-1).clamp_max(len(self.thresholds) - 1)] * scale
            weights = traffic.weights[:, number]
            # Costs are known already, so nothing looks at hidden states or logits.
            routing = Routing(weights, total, traffic.indices[:, number], weights, active)
            found.append(own.keep(routing, total, thresholds, prices[number] if prices else None)[1])  # type: ignore[operator]
        return torch.stack(found, dim=1) & (traffic.counts() > 0)

    def at_loss(self, traffic: Traffic, prices: Sequence[Pricing | None]) -> Tensor:
        """As `keep`, the thresholds scaled so that no more is predicted to be lost than with the price 1 for all."""
        return largest(lambda scale: self.keep(traffic, prices, scale), traffic.loss, traffic.loss(self.keep(traffic)))


def largest(choose: Callable[[float], Tensor], loss: Callable[[Tensor], float], limit: float) -> Tensor:
    """The choice at the largest scale whose loss, which grows with it, is within a limit; that at the smallest scale if none is."""
    low, high, best = np.log(SMALLEST), np.log(LARGEST), choose(SMALLEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = choose(float(np.exp(middle)))
        if loss(found) <= limit:
            low, best = middle, found
        else:
            high = middle
    return best


def buffered(traffic: Traffic, slack: float) -> Traffic:
    """Requests that would load an expert for themselves alone wait for company (token buffering of arXiv 2603.27624).

    A request that no other one shares an expert with stops before that layer, and goes on from there in the next step. It
    gets `slack` credits for each of its tokens, and a pause costs one. It does not pause twice at the same place.

    Returns:
        The steps until the first request has no token left.
    """
    steps, layers, requests, _ = traffic.indices.shape
    number, indices = np.arange(requests), traffic.indices.numpy()
    # Of each request: the step of the trace it is at, the layer it goes on from, whether it paused there, its credits.
    at, begin = np.zeros(requests, int), np.zeros(requests, int)
    paused, credit = np.zeros(requests, bool), np.zeros(requests)
    places, ran = [], []
    while at.max() < steps:
        active, waits = np.zeros((layers, requests), bool), np.zeros(requests, bool)
        for layer in range(layers):
            here = ~waits & (begin <= layer)
            chosen = indices[at, layer, number]
            count = np.bincount(chosen[here].flatten(), minlength=traffic.experts)
            for request in np.flatnonzero(here & (credit >= 1) & ~(paused & (begin == layer))):
                if here.sum() > 1 and (count[chosen[request]] == 1).any():
                    count[chosen[request]] -= 1
                    here[request], waits[request], begin[request] = False, True, layer
                    credit[request] -= 1
            active[layer] = here
        places.append(at.copy())
        ran.append(active)
        paused, begin = waits, np.where(waits, begin, 0)
        at, credit = at + ~waits, credit + slack * ~waits
    where = torch.from_numpy(np.stack(places))
    parts = {
        name: getattr(traffic, name)[where.unsqueeze(1), torch.arange(layers)[:, None], torch.from_numpy(number)]
        for name in ("indices", "weights", "costs")
    }
    return replace(traffic, **parts, active=torch.from_numpy(np.stack(ran)), tokens=int(at.sum()))
