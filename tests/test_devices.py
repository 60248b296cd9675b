"""Expert parallelism: loads by hand, replicas against every choice there is, and CAEE's rule step by step."""

from itertools import product
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traffic_cases import traffic

from lynx_learn.hardware.devices import balance_experts, balance_tokens, blocks, caee, chosen, fixed, replicate

cases = settings(deadline=None, derandomize=True, max_examples=60)


@st.composite
def replicas(draw: st.DrawFn) -> tuple[Any, Any]:
    """Tokens of up to six experts, and which of three devices hold each: one at least."""
    experts = draw(st.integers(1, 6))
    counts = np.array(draw(st.lists(st.integers(0, 4), min_size=experts, max_size=experts)))
    held = draw(st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=experts, max_size=experts))
    holds = np.array([[device in own for device in range(3)] for own in held])
    return counts, holds


def test_loads_by_hand() -> None:
    """Two devices of two experts; a step of two requests with two experts each."""
    steps = traffic([[[[0, 1], [0, 2]]], [[[0, 1], [0, 1]]]], experts=4)
    load = fixed(steps.counts(), blocks(4, 2))
    assert load.experts.tolist() == [[[2, 1]], [[2, 0]]]
    assert load.tokens.tolist() == [[[3, 1]], [[4, 0]]]


@cases
@given(replicas())
def test_experts_are_balanced_as_well_as_they_can_be(case: tuple[Any, Any]) -> None:
    counts, holds = case
    found = balance_experts(counts, holds)
    assert (found.sum(1) == counts).all()
    assert not found[~holds].any()
    assert ((found > 0).sum(1) == (counts > 0)).all()  # one replica each
    used = np.flatnonzero(counts)
    choices = product(*(np.flatnonzero(holds[e]) for e in used))
    best = min(max(np.bincount(choice, minlength=3)) if choice else 0 for choice in choices)
    assert (found > 0).sum(0).max() == best
    # The published ordering: never more experts on the busiest device than where tokens are balanced.
    assert best <= (balance_tokens(counts, holds) > 0).sum(0).max()


@cases
@given(replicas())
def test_balanced_tokens_are_all_there(case: tuple[Any, Any]) -> None:
    counts, holds = case
    found = balance_tokens(counts, holds)
    assert (found.sum(1) == counts).all()
    assert not found[~holds].any()


def test_balancing_tokens_reads_more_experts() -> None:
    """Two experts on both devices, each with two tokens: one of each everywhere, or each expert in one place."""
    counts, holds = np.array([2, 2]), np.ones((2, 2), bool)
    assert balance_tokens(counts, holds).tolist() == [[1, 1], [1, 1]]
    assert sorted(balance_experts(counts, holds).tolist()) == [[0, 2], [2, 0]]


def test_without_replicas_all_are_the_same() -> None:
    counts = torch.tensor([[[3.0, 0.0, 1.0, 2.0]]])
    devices = blocks(4, 2)
    holds = replicate(np.ones((1, 4)), devices, 2, spare=0)
    for choose in (balance_tokens, balance_experts):
        load, where = chosen(counts, holds, choose)
        assert load.experts.tolist() == fixed(counts, devices).experts.tolist() == [[[1, 2]]]
        assert where[0, 0, [0, 2, 3]].tolist() == [0, 1, 1]


def test_the_hottest_are_replicated_where_least_is_done() -> None:
    holds = replicate(np.array([[8.0, 1.0, 2.0, 3.0]]), blocks(4, 2), 2, spare=1)
    # Expert 0 goes to the other device, which has less; then 3 (5 are left there) to the first.
    assert holds[0].tolist() == [[True, True], [True, False], [False, True], [True, True]]
    assert replicate(np.ones((1, 2)), blocks(2, 2), 2, spare=9).all()  # no more than each on every device


def caee_by_steps(ratio: list[float], devices: list[int], limit: float) -> set[int]:
    """The slowest device loses its expert with the lowest ratio, until it has none below the limit."""
    runs = {e for e, own in enumerate(ratio) if own > 0}
    while runs:
        load = [sum(devices[e] == d for e in runs) for d in range(max(devices) + 1)]
        # Of devices that are equally slow, one that can lose nothing ends it.
        slow = [[e for e in runs if devices[e] == d] for d, count in enumerate(load) if count == max(load)]
        lowest = [min(own, key=lambda e: ratio[e]) for own in slow]
        if any(ratio[e] >= limit for e in lowest) or max(load) == 1:
            return runs
        runs.remove(lowest[0])
    return runs


@cases
@given(st.permutations(range(6)), st.lists(st.integers(0, 2), min_size=6, max_size=6), st.integers(0, 7))
def test_caee_is_the_rule_step_by_step(order: list[int], devices: list[int], limit: int) -> None:
    benefit = torch.tensor(order, dtype=torch.float32)
    found = caee(benefit, torch.ones(6), torch.tensor(devices), limit)
    expected = caee_by_steps([float(value) for value in order], devices, limit)
    assert set(torch.nonzero(found).flatten().tolist()) >= expected
    most = [
        max(sum(devices[e] == d for e in runs) for d in range(3))
        for runs in (set(torch.nonzero(found).flatten().tolist()), expected)
    ]
    assert most[0] == most[1]  # they differ at most in devices that nobody waits for


def test_caee_by_hand() -> None:
    benefit, devices = torch.tensor([0.1, 0.5, 0.9, 0.2]), torch.tensor([0, 0, 0, 1])
    assert caee(benefit, torch.ones(4), devices, 0.3).tolist() == [False, True, True, True]
    assert caee(benefit, torch.ones(4), devices, 0.6).tolist() == [False, False, True, True]
    # Its cost decides, too: the third is dear.
    assert caee(benefit, torch.tensor([1.0, 1.0, 9.0, 1.0]), devices, 0.2).tolist() == [False, True, False, True]
