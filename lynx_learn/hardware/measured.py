"""What it costs to leave helpers out: each way of choosing runs as a policy of simulated decode, and the energy of all is
read off at equal measured loss."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..decode.simulate import METRICS, Run, Simulation
from ..moe.decision import Decision, Routing
from ..moe.families import MoeLayer
from ..rules.expert_stats import ExpertStats
from ..rules.rule import Rule
from ..selector.layer import LayerSelector
from ..selector.selector import LynxSelector
from .described import Helpers
from .devices import blocks
from .helpers import WAYS, Channels, bound_tables, by_cost, channels, check_experts, choices, distances, subsets, taken
from .traffic import Source

# From where a way's number starts, and factor and most steps up and down in search of the levels.
START, FACTOR, MOST = 0.1, 2.0, 24
# A way is followed down until its loss falls by less than this share: what is out of reach stays.
FLAT = 0.02


@dataclass(frozen=True, eq=False)
class Scene:
    """What ways of choosing are measured on."""

    hardware: Helpers
    source: Source
    model: nn.Module
    layers: list[MoeLayer]
    selector: LynxSelector
    stats: ExpertStats


class ByRadio(Rule):
    """One way of choosing, with its number, over one group's channels; sums the joules that it takes, and those of all experts.

    A token's expert that is left out is answered by its surrogate where the way goes by learned costs; else by the expert
    of the same token that is nearest, or by nothing where that is nearer.
    """

    def __init__(self, way: str, number: float, scene: Scene, found: Channels) -> None:
        self.name, self.setting, self.number = way, f"{number:g}", number
        self.found, self.layers = found, scene.selector.layers
        self.tables = bound_tables(scene.stats)
        self.helper = blocks(self.tables.shape[1], scene.hardware.helpers)
        self.taken = self.everything = 0.0

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        own: LayerSelector = self.layers[layer.index]  # type: ignore[assignment]
        helper = self.helper[routing.indices]
        step = torch.arange(len(helper))[:, None, None]
        bounds = distances(self.tables[layer.index], routing.indices, routing.weights.float())
        joules, reached = (part[step, helper] for part in self.found)
        made = choices(joules, reached, helper, bounds, own.costs(routing).float())
        choose = WAYS[self.name]
        choice = choose(made, self.number)
        self.taken += float(taken(made.joules, choice).sum())
        self.everything += float(made.joules[..., 0].sum())
        kept = subsets(routing.indices.shape[-1])[choice]
        if choose is by_cost:
            answer = own.surrogates.answer(routing.hidden, routing.indices, routing.weights * ~kept)
            return Decision(routing.indices, routing.weights * kept, addition=answer)
        absent = torch.nn.functional.pad(~kept, (0, 1), value=False).unsqueeze(-2)
        nearest = bounds.masked_fill(absent, math.inf).argmin(-1).where(~kept, torch.arange(kept.shape[-1]))
        nobody = nearest == kept.shape[-1]
        stand_in = routing.indices.gather(-1, nearest.masked_fill(nobody, 0))
        return Decision(stand_in, routing.weights * ~nobody)


@torch.no_grad()
def at_losses(scene: Scene, size: int, most: int, levels: list[float], seed: int) -> Iterator[dict[str, Any]]:
    """Energy of each way, relative to all experts, where its measured KL is each of `levels`; None: it comes to none.

    Args:
        size: sequences that decode together.
        most: decode steps, at most.
    """
    options = scene.source.trace.options
    check_experts(options.top_k)
    groups = scene.source.groups(size, most)
    steps = [tokens.shape[1] - options.prompt for tokens in groups]
    air = channels(scene.hardware, sum(steps), size, options.hidden_size, seed)
    # In units of what sending a token takes, so that prices and limits are of one size.
    unit = air.joules.mean()
    parts = [Channels(*own) for own in zip((air.joules / unit).split(steps), air.reached.split(steps), strict=True)]
    simulation = Simulation(scene.model, scene.layers, options.prompt)

    def measure(way: str, number: float) -> tuple[float, float]:
        policies = [ByRadio(way, number, scene, own) for own in parts]
        runs = [Run(tokens, policy) for tokens, policy in zip(groups, policies, strict=True)]
        losses = [own for own, _ in simulation.losses(runs)]
        kl = sum(float(own.sums[:, METRICS.index("kl")].sum()) for own in losses)
        energy = sum(own.taken for own in policies) / sum(own.everything for own in policies)
        return kl / sum(int(own.tokens.sum()) for own in losses), energy

    for way in WAYS:
        curve = curve_over(partial(measure, way), min(levels), max(levels))
        for level in levels:
            yield {"rule": way, "level": level, "energy": read_off(curve, level)}


def curve_over(measure: Callable[[float], tuple[float, float]], low: float, high: float) -> list[tuple[float, float]]:
    """Points (loss, energy) from below `low` to above `high`, as far as the loss goes."""
    found = [measure(START)]
    for step in range(1, MOST):
        if found[-1][0] >= high:
            break
        found.append(measure(START * FACTOR**step))
    lowest = [found[0]]
    for step in range(1, MOST):
        if lowest[-1][0] <= low:
            break
        lowest.append(measure(START / FACTOR**step))
        # What is lost to helpers out of reach stays, however little is left out beside them.
        if lowest[-1][0] > (1 - FLAT) * lowest[-2][0]:
            break
    return [*reversed(lowest[1:]), *found]


def read_off(curve: list[tuple[float, float]], level: float) -> float | None:
    """Energy where the loss is `level`, between two points on both logarithms."""
    loss, energy = zip(*sorted(curve), strict=True)
    if not loss[0] <= level <= loss[-1]:
        return None
    return float(np.exp(np.interp(np.log(level), np.log(loss), np.log(energy))))
