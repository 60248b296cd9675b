"""Wireless helpers: sending a token to the helper that holds its expert takes energy, the more the worse the channel."""

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from ..rules.expert_stats import ExpertStats
from .described import Helpers
from .devices import blocks
from .traffic import Selection, Traffic, largest

# A token's choices are tried one and all: 2 to the power of its experts.
MOST_EXPERTS = 8


class Channels(NamedTuple):
    """What a token takes to reach each helper in each step `(steps, helpers)`."""

    joules: Tensor
    """There and back; for a helper out of reach, at the most power, in vain."""
    reached: Tensor
    """bool: whether the most power is enough."""


def channels(hardware: Helpers, steps: int, batch: int, hidden: int, seed: int) -> Channels:
    """Channels with path loss by distance, helpers at equal distances from each other, and Rayleigh fading by step.

    A sender takes the least power with which the token is there in half the delay: P = N·B/g · (2^(bits / (B·t)) - 1), by
    Shannon's capacity. B is the token's share of the bandwidth. The answer takes the same way with as many bits.
    """
    metres = torch.linspace(hardware.nearest, hardware.farthest, hardware.helpers, dtype=torch.float64)
    loss = hardware.loss_at_km + hardware.loss_per_decade * (metres / 1000).log10()
    generator = torch.Generator().manual_seed(seed)
    fading = -torch.rand(steps, hardware.helpers, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
    gain = 10 ** (-loss / 10) * fading
    band, bits, half = hardware.bandwidth / batch, hidden * hardware.value_bits, hardware.delay / 2
    noise = 10 ** ((hardware.noise - 30) / 10) * band
    most = 10 ** ((hardware.most_power - 30) / 10)
    power = noise / gain * math.expm1(min(bits / (band * half) * math.log(2), 700.0))
    return Channels(2 * half * power.clamp_max(most), power <= most)


class Choices(NamedTuple):
    """All that may be left out of each token's experts: 2^top_k choices, the first leaves out nothing."""

    joules: Tensor
    """(..., choices)."""
    bound: Tensor
    """(..., choices): how far the output can be off."""
    cost: Tensor
    """(..., choices): nats that the selector predicts, its surrogates answering."""
    late: Tensor
    """(..., choices), bool: whether a helper that is out of reach is asked."""


def subsets(top_k: int) -> Tensor:
    """Which of its experts a token keeps in each choice `(choices, top_k)`, bool, in the order of `Choices`."""
    return torch.tensor(list(product((True, False), repeat=top_k)))


def choices(joules: Tensor, reached: Tensor, helper: Tensor, bounds: Tensor, costs: Tensor) -> Choices:
    """Weigh every subset of each token's experts.

    Args:
        joules, reached: of the helper of each of its experts `(..., top_k)`.
        helper: which one that is; a token is sent once to each.
        bounds: `(..., top_k, top_k + 1)`: how far the output is off when the token's expert j stands in for i; last: nothing.
        costs: predicted nats of leaving each out `(..., top_k)`.
    """
    top_k = joules.shape[-1]
    found = []
    for own in subsets(top_k):
        first = [
            (own & (helper == helper[..., i : i + 1]))[..., :i].any(-1).logical_not() & own[i] for i in range(top_k)
        ]
        sent = torch.stack(first, dim=-1)
        nearest = bounds.masked_fill(~torch.cat([own, torch.tensor([True])]), math.inf).amin(-1)
        found.append(
            (
                (joules * sent).sum(-1),
                (nearest * ~own).sum(-1),
                (costs * ~own).sum(-1),
                (sent & ~reached).any(-1),
            )
        )
    return Choices(*(torch.stack(part, dim=-1) for part in zip(*found, strict=True)))


def least(joules: Tensor, bound: Tensor, late: Tensor, limits: Tensor) -> Tensor:
    """SiftMoE's choice (arXiv 2603.23888) `(...)`: least energy of those in time whose bound is within the layer's limit.

    Args:
        limits: broadcast to `(..., 1)`. Where no choice in time is within it, the one with the least bound is taken.
    """
    bound = bound.masked_fill(late, math.inf)
    within = bound <= torch.maximum(limits, bound.amin(-1, keepdim=True))
    return joules.masked_fill(~within, math.inf).argmin(-1)


def priced(joules: Tensor, loss: Tensor, late: Tensor, price: float) -> Tensor:
    """Our choice `(...)`: least loss + price × energy of those in time. Left out is what costs less than price × energy."""
    return (loss + price * joules).masked_fill(late, math.inf).argmin(-1)


def sift(made: Choices, limit: float) -> Tensor:
    """SiftMoE's, with one limit for all tokens and layers."""
    return least(made.joules, made.bound, made.late, torch.tensor(limit))


def by_bound(made: Choices, price: float) -> Tensor:
    return priced(made.joules, made.bound, made.late, price)


def by_cost(made: Choices, price: float) -> Tensor:
    return priced(made.joules, made.cost, made.late, price)


# Ways of choosing, by the one number that each has.
WAYS: dict[str, Callable[[Choices, float], Tensor]] = {
    "SiftMoE, a limit for each token and layer": sift,
    "one price, SiftMoE's bound": by_bound,
    "one price, learned cost": by_cost,
}


def taken(part: Tensor, choice: Tensor) -> Tensor:
    """What each token's choice has of a part of `Choices`."""
    return part.gather(-1, choice.unsqueeze(-1)).squeeze(-1).double()


def bound_tables(stats: ExpertStats) -> Tensor:
    """Mean distance of two experts' outputs, in the last column from nothing, relative to the layer's mean output norm
    `(layers, experts, experts + 1)`."""
    scale = stats.norms.mean(-1).clamp_min(1e-20)[:, None, None]
    return torch.cat([stats.distances, stats.lengths.unsqueeze(-1)], dim=-1) / scale


def distances(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Bound of one expert of a token standing in for another, or nothing: weight × distance `(..., top_k, top_k + 1)`.

    Args:
        table: of the layer, as in `bound_tables`.
        indices, weights: as routed `(..., top_k)`.
    """
    nothing = torch.full_like(indices[..., :1], len(table))
    stand_ins = torch.cat([indices, nothing], dim=-1)
    return table[indices.unsqueeze(-1), stand_ins.unsqueeze(-2)] * weights.unsqueeze(-1)


def rules(
    hardware: Helpers,
    traffic: Traffic,
    selection: Selection,
    stats: ExpertStats,
    hidden: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Each way of choosing: name, joules of a token in all its layers, bound, what is predicted to be lost, share late.

    All have the mean bound of the selector's choice, which is made at the loss predicted for its budget.

    Raises:
        OptionError: a token has too many experts.
    """
    steps, layers, sequences, top_k = traffic.indices.shape
    check_experts(top_k)
    found = channels(hardware, steps, sequences, hidden, seed)
    helper = blocks(traffic.experts, hardware.helpers)[traffic.indices]
    step = torch.arange(steps)[:, None, None, None]
    joules, reached = found.joules[step, helper], found.reached[step, helper]
    bounds = [
        distances(table, traffic.indices[:, layer], traffic.weights[:, layer])
        for layer, table in enumerate(bound_tables(stats))
    ]
    made = choices(joules, reached, helper, torch.stack(bounds, dim=1), traffic.costs)
    unit = float(made.joules[..., 0].mean())

    def row(rule: str, choice: Tensor) -> dict[str, Any]:
        return {
            "rule": rule,
            "joules": float(taken(made.joules, choice).mean()) * layers,
            "bound": float(taken(made.bound, choice).mean()),
            "loss": float(taken(made.cost, choice).mean()) * layers,
            "late": float(taken(made.late, choice).mean()),
        }

    def reaching(part: Tensor, way: str, start: float, limit: float) -> Tensor:
        """The choice with the largest number, some multiple of `start`, whose mean of `part` is within a limit."""
        return largest(
            lambda scale: WAYS[way](made, scale * start), lambda choice: float(taken(part, choice).mean()), limit
        )

    everything = torch.zeros(traffic.active.shape, dtype=torch.long)
    yield row("all experts", everything)
    loss = traffic.loss(selection.keep(traffic)) / layers
    *others, ours = WAYS
    learned = reaching(made.cost, ours, loss / unit, loss)
    bound = float(taken(made.bound, learned).mean())
    for way in others:
        yield row(way, reaching(made.bound, way, 1.0 if way == others[0] else bound / unit, bound))
    yield row(ours, learned)


def check_experts(top_k: int) -> None:
    """Raises:
    OptionError: a token has too many experts.
    """
    if top_k > MOST_EXPERTS:
        raise OptionError(
            f"--hardware of helpers is not usable: tokens have {top_k} experts, expected {MOST_EXPERTS} at most"
        )
