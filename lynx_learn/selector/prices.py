"""What reading an expert costs, in units of one ordinary expert.

An expert is left out when what that costs the predictions is below threshold × price. Where all experts lie in one memory
each has the price 1, which is the default and changes nothing. Elsewhere reading them is not equally dear: experts may
differ in bytes, lie in fast or slow memory, or on devices of which the busiest one counts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import OptionError, SelectorError
from ..moe.families import Layer

SOURCES = "uniform, bytes, residency:SHARE (of the experts in fast memory), devices:COUNT"
# A store's share may be so much below the calibrated one: slots are whole experts.
CLOSE = 0.02


class Offer(NamedTuple):
    """What G decode batches of one layer may leave out."""

    total: Tensor
    """Cost of leaving out each expert `(G, experts)`, 0 where no active token uses it."""
    thresholds: Tensor
    """(G,)."""
    must: Tensor
    """(G, experts) True where an expert stays whatever it costs."""


class Pricing(Protocol):
    """One layer's prices at this moment."""

    def of(self, offer: Offer) -> Tensor:
        """Price of each expert, `(experts,)` or `(G, experts)`."""


class Price(NamedTuple):
    """Prices that compiled decisions know how to read."""

    each: Tensor | None = None
    """(experts,), float32; None: 1."""
    devices: Tensor | None = None
    """(experts,), int64: the device that each expert lies on, from 0; None: all on one."""

    def of(self, offer: Offer) -> Tensor:
        by_level = None if self.devices is None else level_prices(offer.total, self.devices)
        if by_level is None or self.each is None:
            found = self.each if by_level is None else by_level
            return torch.ones_like(offer.total) if found is None else found
        return by_level * self.each


def level_prices(total: Tensor, devices: Tensor) -> Tensor:
    """Prices `(..., experts)` where devices read side by side, so that a step waits for the one with most experts.

    On each device the dearest expert stands at level 1, the next at level 2, and so on: a step takes as long as the
    highest level that is left on any of them. A level is as dear as one expert on every device, and worth leaving out
    when its experts together cost less than that; so each of them carries its part of the level's price. Levels cost
    less and less going up, so what is left out minimises its cost + threshold × devices × the largest number of experts
    on a device, with no search. On one device every price is 1.

    Args:
        total: cost of leaving out each expert `(..., experts)`; 0 where none uses it: that one stands on no level.
        devices: as in `Price`.
    """
    place = torch.arange(len(devices), device=devices.device)
    own, other = total.unsqueeze(-1), total.unsqueeze(-2)
    before = (other > own) | ((other == own) & (place < place.unsqueeze(-1)))
    level = (before & (devices == devices.unsqueeze(-1))).sum(-1)
    beside = level.unsqueeze(-1) == level.unsqueeze(-2)
    together = torch.where(beside, other, 0.0).sum(-1)
    return torch.where(total > 0, (devices.max() + 1) * total / together, 1.0)


class Prices(Protocol):
    """Where prices come from. What thresholds are found with is what they must be used with."""

    source: str

    def bind(self, layers: Sequence[Layer]) -> None:
        """Make what these layers need on their devices, and forget what was read so far."""

    def of(self, layer: Layer) -> Pricing | None:
        """The prices of a layer that is about to run; None: all are 1."""

    def describe(self) -> dict[str, Any]:
        """What a calibration records: `source`, and what it depends on."""


class Uniform:
    """Every expert has the price 1."""

    source = "uniform"

    def bind(self, layers: Sequence[Layer]) -> None:
        pass

    def of(self, layer: Layer) -> Pricing | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"source": self.source}


class Bytes(Uniform):
    """By an expert's bytes, relative to the mean over all layers."""

    source = "bytes"

    def bind(self, layers: Sequence[Layer]) -> None:
        mean = sum(layer.expert_bytes for layer in layers) / len(layers)
        self.prices = {
            layer.index: Price(torch.full((layer.num_experts,), layer.expert_bytes / mean, device=layer.device))
            for layer in layers
        }

    def of(self, layer: Layer) -> Pricing:
        return self.prices[layer.index]


class Devices(Uniform):
    """By device load: experts lie on devices that read side by side, in blocks of equal size; see `level_prices`."""

    source = "devices"

    def __init__(self, count: int) -> None:
        if count < 1:
            raise OptionError(f"prices devices:{count} are not usable: expected 1 device or more")
        self.count = count

    def bind(self, layers: Sequence[Layer]) -> None:
        if (fewest := min(layer.num_experts for layer in layers)) < self.count:
            raise OptionError(f"prices devices:{self.count} are not usable: the model has {fewest} experts in a layer")
        self.prices = {
            layer.index: Price(
                devices=torch.arange(layer.num_experts, device=layer.device) * self.count // layer.num_experts
            )
            for layer in layers
        }

    def of(self, layer: Layer) -> Pricing:
        return self.prices[layer.index]

    def describe(self) -> dict[str, Any]:
        return {"source": self.source, "devices": self.count}


class Residency(Uniform):
    """An expert in fast memory is free, and one that is not has the price 1: fast memory as a store would fill it.

    Each layer has the same share of its experts' number as slots, which hold those used last; they are empty at first.
    Groups of a simulated decode each begin so; a real decode goes on where the step before stopped.
    """

    source = "residency"

    def __init__(self, share: float) -> None:
        if not 0 < share <= 1:
            raise OptionError(f"prices residency:{share:g} are not usable: expected a share above 0, at most 1")
        self.share = share

    def bind(self, layers: Sequence[Layer]) -> None:
        self.slots = {
            layer.index: Recent(layer.num_experts, max(int(self.share * layer.num_experts), 1)) for layer in layers
        }

    def of(self, layer: Layer) -> Pricing:
        return self.slots[layer.index]

    def describe(self) -> dict[str, Any]:
        return {"source": self.source, "share": self.share}


class Recent:
    """Slots that hold the experts of one layer that were used last."""

    def __init__(self, experts: int, slots: int) -> None:
        self.slots = slots
        self.last = np.full(experts, -1)
        """When each was used last; below 0: not held."""
        self.now = 0

    @property
    def held(self) -> Any:
        """(experts,) bool."""
        return self.last >= 0

    def use(self, experts: Any) -> None:
        """A batch has used these `(experts,)`: first what is held, then what is not, so the latter is younger."""
        for group in (experts & self.held, experts & ~self.held):
            places = np.flatnonzero(group)
            self.last[places] = self.now + np.arange(len(places))
            self.now += len(places)
        if (over := np.count_nonzero(self.held) - self.slots) > 0:
            held = np.flatnonzero(self.held)
            self.last[held[np.argsort(self.last[held])[:over]]] = -1

    def of(self, offer: Offer) -> Tensor:
        total, must = offer.total.detach().cpu().numpy(), offer.must.cpu().numpy()
        limits = offer.thresholds.cpu().numpy()
        slots = self if len(total) == 1 else Recent(total.shape[1], self.slots)
        prices = np.empty(total.shape, np.float32)
        for batch, price in enumerate(prices):
            price[:] = ~slots.held
            slots.use((total[batch] != 0) & (must[batch] | ~(total[batch] < limits[batch] * price)))
        return torch.from_numpy(prices).to(offer.total.device)


RESIDENT: WeakKeyDictionary[nn.Module, Prices] = WeakKeyDictionary()
"""Prices of fast memory that is managed, by the experts modules that run from it."""


def read_prices(text: str) -> Prices:
    """The source that a text names, one of SOURCES.

    Raises:
        OptionError: there is no such source.
    """
    source, colon, number = text.partition(":")
    made: dict[str, Any] = {"uniform": Uniform, "bytes": Bytes}
    counted: dict[str, Any] = {"residency": (Residency, float), "devices": (Devices, int)}
    try:
        if source in made and not colon:
            return made[source]()
        kind, read = counted[source]
        return kind(read(number))
    except (KeyError, ValueError):
        raise OptionError(f"prices {text!r} are unknown: expected one of {SOURCES}") from None


def check_prices(prices: Prices, recorded: dict[str, Any]) -> None:
    """Refuse prices that thresholds were not found with.

    More fast memory than recorded is no fault: less is left out then, and nothing else changes.

    Args:
        prices: what is to be used.
        recorded: what `SelectorConfig.calibration` says of the metric.

    Raises:
        SelectorError: with what was recorded.
    """
    wanted, found = recorded.get("prices", Uniform().describe()), prices.describe()
    if found.get("share", 0.0) > wanted.get("share", 1.0) - CLOSE:
        found = {**found, "share": wanted["share"]}
    if found != wanted:
        raise SelectorError(
            f"the selector was calibrated with prices {named(wanted)}, not {named(found)}: use those, or run `lynx-learn "
            f"calibrate --prices {named(found)}`"
        )


def named(described: dict[str, Any]) -> str:
    """As `read_prices` reads it."""
    return ":".join(f"{value:g}" if isinstance(value, float) else str(value) for value in described.values())
