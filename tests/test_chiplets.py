"""Chiplets: times by hand, bounds that hold for any tokens, and the published ordering where it must hold."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traffic_cases import traffic

from lynx_learn.hardware.chiplets import Times, by_popularity, paired, stay, stream, travels
from lynx_learn.hardware.devices import blocks

cases = settings(deadline=None, derandomize=True, max_examples=60)
# Tokens of up to six experts on four dies.
tables = st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=6).map(np.array)


def test_loads_are_paired() -> None:
    assert paired(np.array([5, 0, 1, 9, 2])) == [3, 2, 0, 4]


def test_streaming_by_hand() -> None:
    times = Times(load=2.0, hop=1.0, compute=1.0, token=0.0)
    # Two dies, one token on each. A slice is there at 1, is computed and passed on until 1.5, and computed again.
    assert stream(np.array([[1, 1]]), 2, 8, times) == 2.0
    # All tokens on one die: the other's slice arrives at 1.5, as its own is done.
    assert stream(np.array([[1, 0]]), 2, 8, times) == 2.0
    # Two experts: the channels are the limit, and the last slices take 1 more.
    assert stream(np.array([[1, 1], [1, 1]]), 2, 8, times) == 3.0
    assert stream(np.array([[0, 0]]), 2, 8, times) == 0.0
    # With two places for slices a die waits with its second until both are free.
    assert stream(np.array([[1, 1], [1, 1]]), 2, 2, times) > 3.0


def test_staying_by_hand() -> None:
    times = Times(load=2.0, hop=0.0, compute=1.0, token=0.0)
    # Three experts on the first die: loaded at 2, 4, 6, the last one computed until 7; tokens travel back for 0.25.
    tokens, devices = np.array([1, 2, 1, 1]), np.array([0, 0, 0, 1])
    assert stay(tokens, devices, 0.25, times) == 7.25
    # Computing is the limit: the hottest first, until 7, then the other.
    assert stay(np.array([5, 1]), np.array([0, 0]), 0.0, times) == 8.0
    assert stay(np.array([0, 1]), np.array([0, 0]), 0.0, times) == 3.0


@cases
@given(tables, st.integers(2, 9), st.sampled_from([4, 8]), st.tuples(*[st.floats(0, 2)] * 3))
def test_streaming_ends_and_is_never_too_fast(tokens: Any, room: int, slices: int, given: tuple[float, ...]) -> None:
    times = Times(*given, token=0.0)
    seconds = stream(tokens, slices, room, times)
    used = (tokens.sum(1) > 0).sum()
    work = tokens.sum(0) * times.compute
    assert seconds >= max(used * times.load / 4, work.max()) - 1e-9
    # Nor slower than one thing after the other.
    assert seconds <= used * (times.load + 3 * times.hop) + work.sum() + 1e-9


@cases
@given(tables, st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_streaming_beats_any_placement_where_memory_is_the_limit(tokens: Any, devices: list[int]) -> None:
    times = Times(load=1.0, hop=0.0, compute=0.0, token=0.0)
    streamed = stream(tokens, 4, 2, times)
    assert streamed == pytest.approx((tokens.sum(1) > 0).sum() / 4)
    assert streamed <= stay(tokens.sum(1), np.array(devices)[: len(tokens)], 0.0, times) + 1e-9


def test_the_published_ordering() -> None:
    """Two hot experts in one block: popularity places them apart, streaming spreads every one of them."""
    times = Times(load=1.0, hop=0.01, compute=0.01, token=0.001)
    steps = traffic([[[[0, 1]] * 4]], experts=8)
    home = torch.arange(4) % 4
    tokens = torch.stack([steps.counts(home == die) for die in range(4)], dim=-1)[0, 0].int().numpy()
    popular = by_popularity(np.array([[9, 9, 0, 0, 0, 0, 0, 0]]), 4)[0].numpy()
    together, apart = (stay(tokens.sum(1), own, 0.004, times) for own in (blocks(8, 4).numpy(), popular))
    assert stream(tokens, 8, 100, times) < apart < together


def test_popular_experts_lie_apart() -> None:
    found = by_popularity(np.array([[9, 8, 1, 1], [1, 1, 1, 1]]), 2)
    assert found[0].tolist() == [0, 1, 1, 0]
    assert np.bincount(found[1]).tolist() == [2, 2]


def test_travels_by_hand() -> None:
    """Two dies, four requests at home on 0, 1, 0, 1; experts 0 and 1 on die 0."""
    steps = traffic([[[[0, 1], [0, 1], [2, 3], [2, 0]]]], experts=4)
    devices = blocks(4, 2).expand(1, -1)
    every = torch.ones(1, 1, 4, dtype=torch.bool)
    # Away go request 1 and 3 to die 0, and request 2 to die 1, each once.
    assert travels(steps, every, devices, 2).tolist() == [[2]]
    without = every.clone()
    without[..., 0] = False
    assert travels(steps, without, devices, 2).tolist() == [[1]]
