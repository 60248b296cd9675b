"""The bound against scipy and by simulation, and thresholds read off a curve."""

import math

import numpy as np
import pytest
import torch

from lynx_learn.measure.bound import upper_bound

# The bound.


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("size", [2, 8, 60])
def test_without_skewness_the_bound_is_that_of_students_t(size: int, confidence: float) -> None:
    from scipy.stats import ttest_1samp

    half = torch.rand(size // 2, generator=torch.Generator().manual_seed(size)).double()
    values = 3 + torch.cat([half, -half])
    wanted = ttest_1samp(values.numpy(), 0, alternative="less").confidence_interval(confidence).high
    assert upper_bound(values, confidence) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("groups", [20, 60])
def test_the_bound_covers_skewed_losses(groups: int) -> None:
    """Group means of losses have a long upper tail, on which plain t says "within the budget" too often."""
    from scipy.stats import t

    draws = torch.from_numpy(np.random.default_rng(0).gamma(4.0, size=(4000, groups)))
    covered = np.mean([upper_bound(row, 0.95) >= 4.0 for row in draws])
    plain = draws.mean(1) + float(t.ppf(0.95, groups - 1)) * draws.std(1) / math.sqrt(groups)
    assert covered > 0.93
    assert covered > (plain >= 4.0).double().mean() + 0.005


def test_the_bound_of_values_that_do_not_vary_or_are_too_few() -> None:
    assert upper_bound(torch.full((8,), 0.25), 0.95) == 0.25
    assert upper_bound(torch.tensor([0.25]), 0.95) == math.inf
