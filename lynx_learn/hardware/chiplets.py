"""Chiplets: dies in a ring, each with its own memory channel, either own the experts or let them stream past."""

from collections import deque
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError
from ..selector.prices import Price
from .described import Chiplets
from .devices import blocks
from .traffic import Selection, Source, Traffic, buffered


class Times(NamedTuple):
    """Seconds, from hardware and an expert's size."""

    load: float
    """One expert through one memory channel."""
    hop: float
    """One expert from a die to the next."""
    compute: float
    """One expert with one token on one die."""
    token: float
    """One token's hidden state through a link."""

    @classmethod
    def of(cls, hardware: Chiplets, weights: int, hidden: int) -> "Times":
        size = weights * hardware.weight_bytes
        token = hidden * hardware.weight_bytes / hardware.link
        return cls(size / hardware.channel, size / hardware.link, weights / hardware.macs, token)


def paired(tokens: Any) -> list[int]:
    """Experts that have tokens `(experts,)` in the order hottest, coldest, second hottest, second coldest, …"""
    order = deque(sorted(np.flatnonzero(tokens), key=lambda e: (-tokens[e], e)))
    found = []
    while order:
        found.append(int(order.popleft()))
        if order:
            found.append(int(order.pop()))
    return found


class Piece(NamedTuple):
    """A slice of an expert on a die, and the dies it will visit after that, all of the ring up to the last with tokens."""

    expert: int
    route: tuple[int, ...]
    parts: list[int]
    """One number: what is left to be done with it on this die."""


LOADED, SENT, COMPUTED = range(3)


def stream(tokens: Any, slices: int, room: int, times: Times) -> float:
    """Seconds until all is computed by expert streaming (FSE-DP, arXiv 2603.27624): tokens stay, experts travel.

    An expert's slices are spread over the channels. A die computes a slice that it has received on its own tokens, and
    passes it on at the same time; where it has received none, the oldest that it loaded itself. A slice is freed when both
    are done. A die loads the next slice when two are free, so that a ring can never be full.

    Args:
        tokens: of each expert on each die `(experts, dies)`; none: it does not run.
        slices: of an expert.
        room: slices that a die holds, 2 or more.
    """
    order, dies, tokens = paired(tokens.sum(1)), tokens.shape[1], tokens.tolist()
    waiting: list[deque[Piece]] = [deque() for _ in range(dies)]
    for expert in order:
        for number in range(slices):
            home = number % dies
            last = max(step for step in range(dies) if tokens[expert][(home + step) % dies])
            waiting[home].append(Piece(expert, tuple((home + step) % dies for step in range(last + 1)), [0]))
    received, own, leaving = ([deque[Piece]() for _ in range(dies)] for _ in range(3))
    free, busy = [room] * dies, [[False] * dies for _ in range(3)]
    events: list[tuple[float, int, int, int, Piece]] = []
    now = 0.0

    def start(action: int, die: int, seconds: float, piece: Piece) -> None:
        busy[action][die] = True
        # The count keeps events of one time in the order in which they began.
        heappush(events, (now + seconds / slices, next_number(), action, die, piece))

    def arrive(piece: Piece, die: int, queue: deque[Piece]) -> None:
        piece.parts[0] = bool(tokens[piece.expert][die]) + (len(piece.route) > 1)
        if tokens[piece.expert][die]:
            queue.append(piece)
        if len(piece.route) > 1:
            leaving[die].append(piece)

    def finish(piece: Piece, die: int) -> None:
        piece.parts[0] -= 1
        free[die] += piece.parts[0] == 0

    next_number = count().__next__
    changed: Iterable[int] = range(dies)
    while True:
        for die in changed:
            if waiting[die] and not busy[LOADED][die] and free[die] >= 2:
                free[die] -= 1
                start(LOADED, die, times.load, waiting[die].popleft())
            if leaving[die] and not busy[SENT][die] and free[leaving[die][0].route[1]]:
                piece = leaving[die].popleft()
                free[piece.route[1]] -= 1
                start(SENT, die, times.hop, piece)
            if (queue := received[die] or own[die]) and not busy[COMPUTED][die]:
                piece = queue.popleft()
                start(COMPUTED, die, times.compute * tokens[piece.expert][die], piece)
        if not events:
            return now
        now, _, action, die, piece = heappop(events)
        busy[action][die] = False
        # A slice that leaves makes room for the die before, and is there for the one after.
        changed = ((die - 1) % dies, die, (die + 1) % dies)
        if action == LOADED:
            arrive(piece, die, own[die])
            continue
        if action == SENT:
            arrive(Piece(piece.expert, piece.route[1:], [0]), piece.route[1], received[piece.route[1]])
        finish(piece, die)


def stay(tokens: Any, devices: Any, travel: float, times: Times) -> float:
    """Seconds where each die loads and computes its own experts, hottest first, and tokens travel there and back.

    Args:
        tokens: of each expert `(experts,)`.
        devices: die of each `(experts,)`.
        travel: seconds that tokens take to their experts' dies.
    """
    longest = 0.0
    for die in set(devices.tolist()):
        loaded, done = 0.0, travel
        for expert in sorted(np.flatnonzero((devices == die) & (tokens > 0)), key=lambda e: -tokens[e]):
            loaded += times.load
            done = max(done, loaded) + times.compute * tokens[expert]
        longest = max(longest, done)
    return float(longest + travel)


def by_popularity(popular: Any, dies: int) -> Tensor:
    """Die of each expert `(layers, experts)`: the most popular first, each to the die with the least of those with room."""
    layers, experts = popular.shape
    found = np.zeros((layers, experts), int)
    for layer in range(layers):
        load, room = np.zeros(dies), np.full(dies, -(-experts // dies))
        for expert in np.argsort(-popular[layer], kind="stable"):
            die = min(np.flatnonzero(room), key=lambda d: load[d])
            found[layer, expert] = die
            load[die] += popular[layer, expert]
            room[die] -= 1
    return torch.from_numpy(found)


def travels(traffic: Traffic, keep: Tensor, devices: Tensor, dies: int) -> Any:
    """Tokens that leave or reach the busiest die `(steps, layers)`; a token goes once to each die.

    Args:
        keep: experts that run `(steps, layers, experts)`.
        devices: die of each expert `(layers, experts)`.
    """
    flat = traffic.indices.flatten(-2)
    there = devices.expand(*keep.shape).gather(-1, flat).view_as(traffic.indices)
    runs = keep.gather(-1, flat).view_as(traffic.indices) & traffic.active.unsqueeze(-1)
    visits = torch.zeros(*traffic.active.shape, dies).scatter_add(-1, there, runs.float()) > 0
    home = torch.arange(traffic.active.shape[-1]) % dies
    away = visits & (torch.arange(dies) != home.unsqueeze(-1))
    sent = torch.zeros(*away.shape[:2], dies).index_add(-1, home, away.sum(-1).float())
    return torch.maximum(sent, away.sum(2)).amax(-1).numpy()


def rules(
    hardware: Chiplets, source: Source, traffic: Traffic, selection: Selection | None, weights: int, hidden: int
) -> Iterator[dict[str, Any]]:
    """Each way of running the steps: name, what is predicted to be lost, and seconds of a token in all its layers.

    Raises:
        OptionError: a die does not hold an expert.
    """
    dies, times = hardware.dies, Times.of(hardware, weights, hidden)
    room = int(hardware.memory // (weights * hardware.weight_bytes / hardware.slices))
    if room < max(hardware.slices, 2):
        raise OptionError(
            f"--hardware with {hardware.memory:g} bytes of memory on a die is not usable: one expert of this trace has "
            f"{weights * hardware.weight_bytes:g}; expected room for one, and for two slices"
        )

    def streamed(rule: str, steps: Traffic, keep: Tensor | None = None) -> dict[str, Any]:
        home = torch.arange(steps.active.shape[-1]) % dies
        parts = [steps.counts(home == die) for die in range(dies)]
        counts = torch.stack(parts, dim=-1) * (1 if keep is None else keep.unsqueeze(-1))
        seconds = sum(
            stream(own, hardware.slices, room, times) for own in counts.int().numpy().reshape(-1, *counts.shape[2:])
        )
        return _row(rule, steps, keep, seconds)

    def stayed(rule: str, devices: Tensor, keep: Tensor | None = None) -> dict[str, Any]:
        counts = traffic.counts() * (1 if keep is None else keep)
        moved = travels(traffic, counts > 0, devices, dies) * times.token
        seconds = sum(
            stay(own, where, travel, times)
            for step, row in zip(counts.numpy(), moved, strict=True)
            for own, where, travel in zip(step, devices.numpy(), row, strict=True)
        )
        return _row(rule, traffic, keep, seconds)

    layers = traffic.indices.shape[1]
    block = blocks(traffic.experts, dies).expand(layers, -1)
    popular = by_popularity(source.popular, dies)
    together = buffered(traffic, hardware.slack)
    yield stayed("EP", block)
    yield stayed("EP, placed by popularity", popular)
    yield streamed("streaming", traffic)
    yield streamed("streaming, buffered", together)
    if selection is None:
        return
    keep = selection.keep(traffic)
    yield stayed("EP, selection", block, keep)
    yield stayed("EP, selection by device load", block, selection.at_loss(traffic, [Price(devices=d) for d in block]))
    yield stayed("EP, placed by popularity, selection", popular, keep)
    yield streamed("streaming, selection", traffic, keep)
    yield streamed("streaming, buffered, selection", together, selection.keep(together))


def _row(rule: str, steps: Traffic, keep: Tensor | None, seconds: float) -> dict[str, Any]:
    counts = steps.counts() * (1 if keep is None else keep)
    return {
        "rule": rule,
        "experts": float((counts > 0).sum(-1).float().mean()),
        "seconds": seconds / steps.tokens,
        "loss": 0.0 if keep is None else steps.loss(keep),
    }
