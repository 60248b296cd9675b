"""Which experts lie in fast memory, and which one makes room for the next."""

from typing import Any, Protocol

import numpy as np


class Eviction(Protocol):
    """Chooses the slot that is filled next."""

    name: str

    def pick(self, slots: "Slots", layer: int) -> int | None:
        """A slot that is not in use; None: wait until one in use has become free."""


class Slots:
    """A fixed number of slots for experts of all layers. What is pinned is in use or on its way, and stays.

    Args:
        count: slots.
        layers, experts: of the model.
        rule: of eviction.
    """

    def __init__(self, count: int, layers: int, experts: int, rule: Eviction) -> None:
        self.count, self.rule = count, rule
        self.shape = (layers, experts)
        self.where = np.full((layers, experts), -1)
        """Slot of each expert; below 0: not held."""
        self.owner = np.full((count, 2), -1)
        """Layer and expert of each slot."""
        self.last = np.full(count, -1)
        """When each slot was used last; below 0: it is empty."""
        self.pinned = np.zeros(count, np.bool_)
        self.now = 0

    def share(self, layer: int) -> slice:
        """The slots of one layer where each has as many, give or take one; all where there are fewer than layers."""
        layers = self.shape[0]
        if self.count < layers:
            return slice(0, self.count)
        return slice(layer * self.count // layers, (layer + 1) * self.count // layers)

    def held(self, layer: int) -> Any:
        """`(experts,)` bool."""
        return self.where[layer] >= 0

    def pin(self, layer: int, expert: int) -> int:
        """Use an expert that is held; its slot."""
        slot = int(self.where[layer, expert])
        self.pinned[slot] = True
        self._touch(slot)
        return slot

    def claim(self, layer: int, expert: int) -> int | None:
        """A slot for an expert that is not held, pinned; None: wait."""
        slot = self.rule.pick(self, layer)
        if slot is None:
            return None
        self.empty(slot)
        self.where[layer, expert], self.owner[slot] = slot, (layer, expert)
        self.pinned[slot] = True
        self._touch(slot)
        return slot

    def release(self, slot: int) -> None:
        self.pinned[slot] = False

    def empty(self, slot: int) -> None:
        """Forget what a slot holds, or was to hold."""
        layer, expert = self.owner[slot]
        if layer >= 0:
            self.where[layer, expert] = -1
        self.owner[slot], self.last[slot], self.pinned[slot] = -1, -1, False

    def _touch(self, slot: int) -> None:
        self.last[slot] = self.now
        self.now += 1


class LeastRecent:
    """The expert that was used longest ago goes, among those of its layer: over all layers, which run in a circle, it would
    always be one that comes next. This is what `prices.Residency` simulates."""

    name = "lru"

    def pick(self, slots: Slots, layer: int) -> int | None:
        own = slots.share(layer)
        slot = own.start + int(slots.last[own].argmin())
        return None if slots.pinned[slot] else slot


class LeastExpected:
    """The expert that a step uses least often goes, of whichever layer.

    Args:
        rates: how often a step uses each expert `(layers, experts)`, such as `replay.rates` of a trace.
    """

    name = "expected"

    def __init__(self, rates: Any) -> None:
        self.rates = np.asarray(rates, dtype=np.float64)

    def pick(self, slots: Slots, layer: int) -> int | None:
        empty = slots.owner[:, 0] < 0
        value = np.where(empty, -1.0, self.rates[slots.owner[:, 0], slots.owner[:, 1]])
        value[slots.pinned] = np.inf
        slot = int(value.argmin())
        return None if slots.pinned[slot] else slot
