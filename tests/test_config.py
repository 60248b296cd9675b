"""Thresholds between the sizes they were calibrated for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_learn.selector.config import by_active, outside


def test_a_power_law_is_met_between_calibrated_sizes_and_each_size_keeps_its_own() -> None:
    law = {size: 0.002 * size**0.7 for size in (2, 8, 64)}
    found = by_active(law)
    assert len(found) == 65
    assert found[:2] == [0.0, 0.0]
    assert found[2:] == pytest.approx([0.002 * size**0.7 for size in range(2, 65)])
    assert [found[size] for size in law] == list(law.values())


@given(st.dictionaries(st.integers(1, 40), st.sampled_from([0.0, 0.1, 0.3, 1.0, 5.0]), min_size=1, max_size=5))
def test_nothing_between_two_sizes_exceeds_the_larger_of_their_thresholds(table: dict[int, float]) -> None:
    """Where the smaller one was given none, nor are those after it; a larger size that was given less is no more than met."""
    found = by_active(table)
    assert found[0] == 0.0
    for size, tau in table.items():
        assert found[size] == tau
        above = [other for other in table if other > size]
        if above:
            high = min(above)
            between = found[size + 1 : high]
            assert all(math.isfinite(value) and value <= max(tau, table[high]) for value in between)
            assert all(value <= table[high] for value in between)
            assert tau > 0 or not any(between)


def test_a_use_that_is_not_certified_is_named() -> None:
    limits = {"dtype": "float32", "device": "cpu", "temperature": 1.0, "top_p": None, "length": 512}
    assert outside(limits, {"dtype": "float32", "device": "cpu", "temperature": 1.0, "top_p": 0.9, "length": 512}) == []
    assert outside(limits, {"temperature": 0.7, "length": 513}) == [
        "temperature 0.7 (certified: 1.0)",
        "length 513 (certified: up to 512)",
    ]
    assert outside({}, {"dtype": "bfloat16", "length": 9}) == []
