"""Expert parallelism: a layer takes as long as the device that has most to read or to compute."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor

from ..selector.prices import Price, level_prices
from .described import Devices
from .traffic import Selection, Source, Traffic, largest


def blocks(experts: int, count: int) -> Tensor:
    """The device of each expert `(experts,)` where they lie in blocks of equal size."""
    return torch.arange(experts) * count // experts


@dataclass(frozen=True)
class Load:
    """What devices do in each layer of each step.

    Attributes:
        experts: that each device reads `(steps, layers, devices)`.
        tokens: that each computes, counted once for each of their experts, of the same shape.
    """

    experts: Any
    tokens: Any


def fixed(counts: Tensor, devices: Tensor) -> Load:
    """The load where every expert lies on one device.

    Args:
        counts: tokens of each expert that runs `(steps, layers, experts)`; 0: it does not run.
        devices: device of each expert, broadcast to the shape of `counts`.
    """
    where = devices.expand(counts.shape)
    zeros = torch.zeros(*counts.shape[:2], int(devices.max()) + 1)
    return Load(*(zeros.scatter_add(-1, where, part).numpy() for part in ((counts > 0).float(), counts)))


def replicate(popular: Any, devices: Tensor, count: int, spare: int) -> Any:
    """Which device holds which expert `(layers, experts, devices)`, bool: each its own, and replicas in its spare room.

    One after the other, the expert with most tokens for each replica gets one more, on the device with the least load of
    those that have room and lack it.

    Args:
        popular: tokens of each expert `(layers, experts)`.
        devices: whose own each expert is `(experts,)`.
    """
    found = np.zeros((*popular.shape, count), bool)
    found[:, np.arange(len(devices)), devices] = True
    for own, tokens in zip(found, popular, strict=True):
        room = np.full(count, spare)
        for _ in range(spare * count):
            each = tokens / own.sum(1)
            load = each @ own
            free = (room > 0) & ~own
            if not free.any():
                break
            expert = max(np.flatnonzero(free.any(1)), key=lambda e: each[e])
            device = min(np.flatnonzero(free[expert]), key=lambda d: load[d])
            own[expert, device] = True
            room[device] -= 1
    return found


def balance_tokens(counts: Any, holds: Any) -> Any:
    """Tokens `(experts, devices)` where each token goes to whichever replica's device has the fewest: what EPLB is for.

    Args:
        counts: tokens of each expert `(experts,)`.
        holds: `(experts, devices)`, bool.
    """
    found = np.where((holds.sum(1) == 1)[:, None], holds * counts[:, None], 0).astype(int)
    load = found.sum(0)
    for expert in np.flatnonzero(holds.sum(1) > 1):
        held = np.flatnonzero(holds[expert])
        for _ in range(int(counts[expert])):
            device = held[load[held].argmin()]
            found[expert, device] += 1
            load[device] += 1
    return found


def balance_experts(counts: Any, holds: Any) -> Any:
    """As `balance_tokens`, but all tokens of an expert go to one replica, so that the largest number of experts on a device
    is as small as it can be: the aim of METRO (arXiv 2512.09277), whose own algorithm comes near it."""
    used = np.flatnonzero(counts)
    found, devices = np.zeros(holds.shape, int), holds.shape[1]
    most = -(-len(used) // devices)
    while len(used):
        # Each device has so many places.
        places = csr_array(np.repeat(holds[used], most, axis=1))
        matched = maximum_bipartite_matching(places, perm_type="column")
        if (matched >= 0).all():
            found[used, matched // most] = counts[used]
            break
        most += 1
    return found


def chosen(counts: Tensor, holds: Any, choose: Any) -> tuple[Load, Tensor]:
    """The load with replicas, and the device that has most of each expert's tokens `(steps, layers, experts)`."""
    steps = [[choose(own, held) for own, held in zip(step, holds, strict=True)] for step in counts.int().numpy()]
    tokens = np.array(steps)
    return Load((tokens > 0).sum(2), tokens.sum(2)), torch.from_numpy(tokens.argmax(-1))


def caee(benefit: Tensor, cost: Tensor, devices: Tensor, limit: float) -> Tensor:
    """Experts that run `(..., experts)` by CAEE's rule (arXiv 2606.29982), for whole experts of a batch: on the slowest
    device the expert with least gate for its cost is left out first, until that device has none below the limit.

    Args:
        benefit: sum of the gates `(..., experts)`; 0: not used.
        cost: seconds of each.
        devices: device of each `(experts,)`.
        limit: of gate for a second.
    """
    ratio, used = benefit / cost, benefit > 0
    stays = used & (ratio >= limit)
    beside = devices == devices.unsqueeze(-1)
    place = torch.arange(len(devices))
    own, other = ratio.unsqueeze(-1), ratio.unsqueeze(-2)
    before = (other > own) | ((other == own) & (place < place.unsqueeze(-1)))
    level = (before & beside).sum(-1)
    highest = (stays.unsqueeze(-2) & beside).sum(-1).amax(-1, keepdim=True).clamp_min(1)
    return used & (level < highest)


def rules(
    hardware: Devices, source: Source, traffic: Traffic, selection: Selection | None, expert_weights: int
) -> Iterator[dict[str, Any]]:
    """Each way of running the steps: name, what is predicted to be lost, and its load.

    Args:
        expert_weights: how many an expert has.
    """
    count, experts = hardware.devices, traffic.experts
    devices, counts = blocks(experts, count), traffic.counts()
    holds = replicate(source.popular, devices, count, hardware.spare)
    read = expert_weights * hardware.weight_bytes / hardware.read
    compute = expert_weights / hardware.macs

    def row(rule: str, load: Load, keep: Tensor | None = None) -> dict[str, Any]:
        seconds = np.maximum(load.experts * read, load.tokens * compute).max(-1)
        return {
            "rule": rule,
            "busiest": float(load.experts.max(-1).mean()),
            "mean": float(load.experts.mean()),
            "bytes": float(load.experts.max(-1).mean()) * expert_weights * hardware.weight_bytes,
            "seconds": float(seconds.mean()),
            "loss": 0.0 if keep is None else traffic.loss(keep),
        }

    yield row("EP", fixed(counts, devices))
    yield row("EP, replicas, tokens balanced", chosen(counts, holds, balance_tokens)[0])
    metro, where = chosen(counts, holds, balance_experts)
    yield row("EP, replicas, METRO", metro)
    if selection is None:
        return
    same = selection.keep(traffic)
    benefit, cost = traffic.sums(traffic.weights), read + counts * compute
    keep = largest(lambda limit: caee(benefit, cost, devices, limit / read), traffic.loss, traffic.loss(same))
    yield row("EP, CAEE", fixed(counts * keep, devices), keep)
    yield row("EP, selection", fixed(counts * same, devices), same)
    layers = range(counts.shape[1])
    keep = selection.at_loss(traffic, [Price(devices=devices) for _ in layers])
    yield row("EP, selection by device load", fixed(counts * keep, devices), keep)
    yield row("METRO, selection", chosen(counts * same, holds, balance_experts)[0], same)
    totals = traffic.sums(traffic.costs)
    where = torch.where(counts > 0, where, devices)
    levels = [
        torch.stack([level_prices(*pair) for pair in zip(totals[:, i], where[:, i], strict=True)]) for i in layers
    ]
    keep = selection.at_loss(traffic, [Price(each) for each in levels])
    yield row("METRO, selection by device load", chosen(counts * keep, holds, balance_experts)[0], keep)
