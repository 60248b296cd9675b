"""Bounds against scipy and by simulation."""

import math

import numpy as np
import pytest
import torch

from lynx_learn.measure.bound import WIDER, clopper_pearson, count_bound, exact_levels, last_within, upper_bound


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("size", [2, 8, 60])
def test_without_skewness_the_bound_is_that_of_students_t_a_little_wider(size: int, confidence: float) -> None:
    from scipy.stats import ttest_1samp

    half = torch.rand(size // 2, generator=torch.Generator().manual_seed(size)).double()
    values = 3 + torch.cat([half, -half])
    mean = float(values.mean())
    students = float(ttest_1samp(values.numpy(), 0, alternative="less").confidence_interval(confidence).high)
    assert upper_bound(values, confidence) == pytest.approx(mean + (students - mean) * (1 + WIDER / size), rel=1e-9)


def test_skewness_widens_the_bound_and_never_narrows_it() -> None:
    values = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0]).double()
    mirrored = 2 * values.mean() - values
    assert upper_bound(values, 0.95) > upper_bound(mirrored, 0.95) + 0.1
    symmetric = torch.cat([values, mirrored])
    assert upper_bound(mirrored, 0.95) > upper_bound(symmetric, 0.95)


@pytest.mark.parametrize("groups", [8, 20, 60])
def test_the_bound_lies_below_the_mean_of_skewed_losses_no_more_often_than_allowed(groups: int) -> None:
    """Group means of losses have a long upper tail, on which plain t says "within the budget" too often."""
    from scipy.stats import t

    draws = torch.from_numpy(np.random.default_rng(0).gamma(6.0, size=(8000, groups)))
    missed = np.mean([upper_bound(row, 0.95) < 6.0 for row in draws])
    plain = draws.mean(1) + float(t.ppf(0.95, groups - 1)) * draws.std(1) / math.sqrt(groups)
    assert missed <= 0.05
    assert (plain < 6.0).double().mean() > 0.055


def test_the_bound_of_values_that_do_not_vary_or_are_too_few() -> None:
    assert upper_bound(torch.full((8,), 0.25), 0.95) == 0.25
    assert upper_bound(torch.tensor([0.25]), 0.95) == math.inf


@pytest.mark.parametrize(("count", "of"), [(0, 760), (3, 50), (50, 50)])
def test_the_bound_of_a_count_is_exact(count: int, of: int) -> None:
    """At the bound so few are seen with just the chance that the confidence leaves; of none, the rule of three."""
    from scipy.stats import binom

    bound = count_bound(count, of, 0.95)
    if count == of:
        assert bound == 1.0
    else:
        assert binom.cdf(count, of, bound) == pytest.approx(0.05)
    if not count:
        assert bound == pytest.approx(3 / of, rel=0.01)


def test_every_bound_of_a_threshold_has_to_hold_and_nothing_is_taken_beyond_a_failure() -> None:
    uppers = {1.0: [0.1, 0.2], 2.0: [0.3, 0.9], 3.0: [0.9, 1.1], 4.0: [0.1, 0.1]}
    assert last_within([1.0, 2.0, 3.0, 4.0], uppers.__getitem__, 1.0) == (2.0, [0.3, 0.9])
    assert last_within([3.0, 4.0], uppers.__getitem__, 1.0) == (0.0, ())
    assert last_within([1.0], lambda tau: [math.nan], 1.0) == (0.0, ())


@pytest.mark.parametrize(("tested", "rest", "groups"), [(20, 72, 96), (8, 30, 42), (44, 20, 68)])
def test_exact_levels_are_those_of_a_procedure_that_uses_up_its_error(tested: int, rest: int, groups: int) -> None:
    """Losses are scaled so that the bound is the budget: other groups are over it where their mean is over the bound."""
    from scipy.stats import t

    draws = np.random.default_rng(tested).normal(5.0, size=(20_000, groups))
    own, others = draws[:, :tested], draws[:, tested : tested + rest]
    bounds = own.mean(1) + t.ppf(0.95, tested - 1) * own.std(1, ddof=1) / math.sqrt(tested)
    found = exact_levels(tested, rest, groups, 0.95)
    assert found["test_over"] == pytest.approx((others.mean(1) > bounds).mean(), abs=0.006)
    assert found["pool_over"] == pytest.approx((draws.mean(1) > bounds).mean(), abs=0.006)
    assert found["true_over"] == pytest.approx((bounds < 5.0).mean(), abs=0.006)
    whole = draws[0]  # in splits of one given pool the shares are the same
    generator = np.random.default_rng(1)
    split = np.stack([generator.permutation(whole) for _ in range(20_000)])
    own, others = split[:, :tested], split[:, tested : tested + rest]
    bounds = own.mean(1) + t.ppf(0.95, tested - 1) * own.std(1, ddof=1) / math.sqrt(tested)
    assert found["test_over"] == pytest.approx((others.mean(1) > bounds).mean(), abs=0.02)
    assert found["pool_over"] == pytest.approx((whole.mean() > bounds).mean(), abs=0.02)


def test_the_interval_is_that_of_clopper_and_pearson() -> None:
    """Its ends by the beta distribution; of no events, the rule of three."""
    from scipy.stats import beta

    assert clopper_pearson(7, 200) == pytest.approx([beta.ppf(0.025, 7, 194), beta.ppf(0.975, 8, 193)])
    low, high = clopper_pearson(0, 2000)
    assert low == 0.0
    assert high == pytest.approx(3.69 / 2000, rel=0.01)
