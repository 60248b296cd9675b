"""The grid of thresholds, and what is read between them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pool_cases import made_up, power_law

from lynx_learn.measure.bound import plan
from lynx_learn.measure.calibrate import PILOT_STEP, pilot_thresholds
from lynx_learn.measure.pools import GRID, grid


@given(st.floats(0.3, 3.0), st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=3), st.floats(1e-6, 1e3))
def test_plans_fall_between_thresholds_that_are_close(power: float, budgets: list[float], factor: float) -> None:
    """Also those of pilots that lose a fifth more or less than the one the grid was made from."""
    curve = [(tau, factor * tau**power) for tau in pilot_thresholds(budgets, 4)]
    taus = grid(curve, budgets)
    assert taus == sorted(set(taus))
    assert set(taus) & {tau for tau, _ in curve}
    for off in (0.8, 1.0, 1.25):
        pilot = [(tau, off * loss) for tau, loss in curve if tau in taus]
        for planned in plan(pilot, budgets).values():
            for tau in planned:
                assert tau <= taus[-1] * (1 + 1e-9)
                above = min((t for t in taus if t >= tau), default=taus[-1])
                below = max((t for t in taus if t <= tau), default=0.0)
                assert above <= below * PILOT_STEP ** (1 / GRID) * (1 + 1e-9)


def test_a_pilot_reads_the_same_plan_off_the_grid_as_off_all_its_thresholds() -> None:
    curve = power_law()
    known = grid(curve, [0.01, 0.03])
    for off in (0.8, 1.0, 1.25):
        whole = [(tau, off * loss) for tau, loss in curve]
        assert plan([(tau, loss) for tau, loss in whole if tau in known], [0.01, 0.03]) == plan(whole, [0.01, 0.03])
    assert len(known) < 20


@given(st.floats(0.0, 0.5), st.integers(0, 50))
def test_between_thresholds_losses_lie_on_straight_lines(tau: float, seed: int) -> None:
    pool = made_up(3, seed)
    taus = pool.thresholds.tolist()
    for group in range(3):
        wanted = np.interp(tau, taus, pool.sums[:, 0, group])
        assert float(pool.losses_at(tau)[0][group]) == pytest.approx(wanted, rel=1e-9, abs=1e-15)
    index = seed % len(taus)
    assert torch.allclose(pool.losses_at(taus[index])[0], pool.sums[index, 0], rtol=1e-12)
    assert torch.equal(pool.bytes_at(taus[index]), pool.bytes[index])
    assert torch.equal(pool.losses_at(0.0)[0], torch.zeros(3).double())
    assert torch.equal(pool.bytes_at(0.0), torch.ones(3).double())
