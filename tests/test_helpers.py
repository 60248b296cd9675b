"""Wireless helpers: energy by hand, every choice of a token, and what one price is sure to do."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx_learn.hardware.described import Helpers, read_hardware
from lynx_learn.hardware.helpers import Choices, channels, choices, least, priced

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
