"""Wireless helpers: energy by hand, every choice of a token, and what one price is sure to do."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx_learn.hardware.described import Helpers, read_hardware
from lynx_learn.hardware.helpers import WAYS, Channels, Choices, channels, choices, least, priced, subsets
from lynx_learn.hardware.measured import ByRadio, curve_over, read_off
from lynx_learn.moe.decision import Routing

HARDWARE = read_hardware(Path(__file__).parents[1] / "data" / "hardware" / "helpers-8.yaml")
assert isinstance(HARDWARE, Helpers)
cases = settings(deadline=None, derandomize=True, max_examples=60)


def test_energy_by_hand() -> None:
    """One bit for each hertz and second: the power is noise over gain."""
    given = replace(HARDWARE, helpers=1, nearest=1000, farthest=1000, bandwidth=1e6, delay=0.002, value_bits=10)
    found = channels(given, steps=2000, batch=1, hidden=100, seed=0)
    gain = 10 ** (-given.loss_at_km / 10)
    noise = 10 ** ((given.noise - 30) / 10) * 1e6
    fading = torch.where(found.reached, noise / gain * 0.002 / found.joules, 0.0)
    # Exponential with mean 1, but for the deep fades that are out of reach.
    reach = noise / gain / 10 ** ((given.most_power - 30) / 10)
    for value, share in ((reach, math.exp(-reach)), (math.log(2), 0.5), (math.log(4), 0.25)):
        assert abs(float((fading > value).float().mean()) - share) < 0.04


def test_more_tokens_and_more_distance_take_more() -> None:
    few, many = (channels(HARDWARE, 500, batch, 192, seed=1) for batch in (4, 64))
    assert (many.joules >= few.joules).all()
    assert many.reached.float().mean() < few.reached.float().mean()
    assert few.joules[:, 0].median() < few.joules[:, -1].median()


def test_choices_by_hand() -> None:
    """Three experts, the first two on one helper."""
    joules, helper = torch.tensor([2.0, 2.0, 5.0]), torch.tensor([0, 0, 1])
    bounds = torch.tensor([[0.0, 0.1, 0.9, 0.3], [0.2, 0.0, 0.4, 0.5], [0.6, 0.7, 0.0, 0.8]])
    found = choices(joules, torch.tensor([True, True, False]), helper, bounds, torch.tensor([1.0, 2.0, 4.0]))
    by_kept = dict(zip(["123", "12", "13", "1", "23", "2", "3", ""], range(8), strict=True))
    expected = {
        "123": (7.0, 0.0, 0.0, True),
        "12": (2.0, 0.6, 4.0, False),
        "13": (7.0, 0.2, 2.0, True),
        "2": (2.0, 0.1 + 0.7, 5.0, False),
        "": (0.0, 0.3 + 0.5 + 0.8, 7.0, False),
    }
    for kept, (energy, bound, cost, late) in expected.items():
        at = by_kept[kept]
        got = [float(part[at]) for part in found]
        assert torch.allclose(torch.tensor(got), torch.tensor([energy, bound, cost, late])), kept


@st.composite
def weighed(draw: st.DrawFn) -> Choices:
    """Four tokens with two experts each; numbers that add up exactly."""
    number = st.integers(0, 8).map(float)

    def table(*shape: int) -> torch.Tensor:
        count = math.prod(shape)
        return torch.tensor(draw(st.lists(number, min_size=count, max_size=count))).view(shape)

    helper = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=8, max_size=8))).view(4, 2)
    energy = table(2)[helper]
    reached = torch.tensor(draw(st.lists(st.booleans(), min_size=2, max_size=2)))[helper]
    return choices(energy, reached, helper, table(4, 2, 3), table(4, 2))


@cases
@given(weighed(), st.integers(0, 12), st.sampled_from([0.25, 0.5, 1.0, 2.0]))
def test_no_choice_within_the_same_bound_takes_less_than_one_price(made: Choices, limit: int, price: float) -> None:
    """Among all choices in time, whoever is off no more in the mean: SiftMoE's with any limit among them."""

    def total(part: torch.Tensor, choice: torch.Tensor) -> float:
        return float(part.gather(-1, choice.unsqueeze(-1)).sum())

    own = priced(made.joules, made.bound, made.late, price)
    sift = least(made.joules, made.bound, made.late, torch.tensor(float(limit)))
    if total(made.bound, sift) <= total(made.bound, own):
        assert total(made.joules, own) <= total(made.joules, sift)
    assert not total(made.late, own)
    assert not total(made.late, sift)


@cases
@given(weighed(), st.integers(0, 12))
def test_siftmoe_takes_least_of_what_is_within_its_limit(made: Choices, limit: int) -> None:
    choice = least(made.joules, made.bound, made.late, torch.tensor(float(limit)))
    for token, taken in enumerate(choice.tolist()):
        in_time = [c for c in range(4) if not made.late[token, c]]
        lowest = min(float(made.bound[token, c]) for c in in_time)
        allowed = [c for c in in_time if made.bound[token, c] <= max(limit, lowest)]
        assert taken in allowed
        assert made.joules[token, taken] == min(made.joules[token, c] for c in allowed)


SIFT, BOUND, COST = WAYS


def by_radio(way: str, number: float, reached: list[bool]) -> tuple[ByRadio, Any]:
    """A token whose three experts lie on three helpers, the last one the dearest; and what it decides in a layer."""
    selector = SimpleNamespace(
        costs=lambda routing: torch.tensor([[[0.5, 0.1, 0.02]]]),
        surrogates=SimpleNamespace(answer=lambda hidden, indices, weights: weights.sum(-1, keepdim=True) * hidden),
    )
    # Outputs of 0 and 1 are alike, 2 is small.
    distances = torch.tensor([[[0.0, 0.1, 1.0], [0.1, 0.0, 1.0], [1.0, 1.0, 0.0]]])
    stats = SimpleNamespace(norms=torch.ones(1, 3), distances=distances, lengths=torch.tensor([[1.0, 1.0, 0.2]]))
    scene: Any = SimpleNamespace(
        selector=SimpleNamespace(layers=[selector]), stats=stats, hardware=replace(HARDWARE, helpers=3)
    )
    policy = ByRadio(way, number, scene, Channels(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([reached])))
    routing = Routing(
        torch.ones(1, 1, 2),
        torch.zeros(1, 1, 3),
        torch.tensor([[[0, 1, 2]]]),
        torch.tensor([[[0.5, 0.3, 0.2]]]),
        torch.ones(1, 1, dtype=torch.bool),
    )
    layer: Any = SimpleNamespace(index=0)
    return policy, policy.decide(layer, routing)


def test_who_answers_for_a_helper_that_is_not_asked() -> None:
    policy, same = by_radio(SIFT, 0.0, [True] * 3)
    assert same.indices.tolist() == [[[0, 1, 2]]]
    assert (policy.taken, policy.everything) == (7.0, 7.0)
    # The limit allows 1 to be answered by 0 (.3 × .1) and 2 by nothing (.2 × .2).
    policy, two = by_radio(SIFT, 0.071, [True] * 3)
    assert (two.indices[..., :2].tolist(), policy.taken) == ([[[0, 0]]], 1.0)
    assert torch.equal(two.weights, torch.tensor([[[0.5, 0.3, 0.0]]]))
    # One that is out of reach is left out whatever it costs.
    policy, late = by_radio(BOUND, 0.0, [False, True, True])
    assert (late.indices.tolist(), policy.taken) == ([[[1, 1, 2]]], 6.0)


def test_surrogates_answer_where_costs_are_learned() -> None:
    """At this price 1 and 2 cost less than they take."""
    policy, made = by_radio(COST, 0.06, [True] * 3)
    assert policy.taken == 1.0
    assert torch.equal(made.weights, torch.tensor([[[0.5, 0.0, 0.0]]]))
    assert torch.allclose(made.addition, torch.full((1, 1, 2), 0.5))


def test_subsets_are_in_the_order_of_choices() -> None:
    one = torch.ones(3)
    kept = subsets(3)
    made = choices(one, one > 0, torch.arange(3), torch.ones(3, 4), torch.tensor([1.0, 2.0, 4.0]))
    assert made.cost.tolist() == [float(torch.tensor([1.0, 2.0, 4.0])[~own].sum()) for own in kept]


def test_energy_is_read_off_between_points() -> None:
    def measure(number: float) -> tuple[float, float]:
        """A loss with a floor, and energy that falls as loss grows."""
        loss = 0.002 + number**2
        return loss, loss**-0.5

    curve = curve_over(measure, 0.001, 0.05)
    assert min(curve)[0] == pytest.approx(0.002, rel=0.05)
    assert max(curve)[0] >= 0.05
    assert read_off(curve, 0.01) == pytest.approx(10.0, rel=1e-3)
    assert read_off(curve, 0.001) is None
    assert read_off(curve, 1.0) is None
