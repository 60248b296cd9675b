"""Upper confidence bounds of a mean, and the thresholds that stay below a budget by them."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

BOUND = (
    "one-sided Student t with Hall's skewness correction, never below plain t, its margin widened by 4/n; fixed-sequence "
    "testing (Learn then Test)"
)

# Thresholds tested for a budget, as the shares of it that the pilot groups lose at them.
FRACTIONS = (0.5, 0.65, 0.75, 0.83, 0.9, 0.96)
# Part of the margin by which it is widened, times the number of values: see `upper_bound`.
WIDER = 4.0

# (threshold, loss), both rising.
Curve = list[tuple[float, float]]

# Upper confidence bound of a mean: of values `(n,)`, at a confidence.
Bound = Callable[[Tensor, float], float]


def upper_bound(values: Tensor, confidence: float) -> float:
    """One-sided upper confidence bound of the mean of independent `values` `(n,)`; infinite for fewer than two.

    Student's t with the correction of Hall (1983, Annals of Statistics 11, 569-576) for the skewness that losses have.
    With 8 to 30 values of such losses that alone lies below the mean more often than it may (`docs/bounds.py`), so a
    sample whose skewness happens to be negative takes nothing off, and the margin is widened by WIDER/n. Bounds that
    hold for every distribution with a known largest value (empirical Bernstein, betting) need hundreds of groups.
    """
    n = len(values)
    if n < 2:
        return math.inf
    mean, spread = float(values.mean()), float(values.std())
    if spread <= 1e-12 * abs(mean):
        return mean
    skew = max(0.0, float((values - mean).pow(3).mean()))
    quantile = student_quantile(confidence, n - 1)
    margin = quantile * spread / math.sqrt(n) * (1 + WIDER / n)
    return mean + margin + skew * (2 * quantile**2 + 1) / (6 * n * spread**2)


def count_bound(count: int, of: int, confidence: float) -> float:
    """The exact one-sided upper bound of a share of which `count` of `of` were seen (Clopper and Pearson 1934).

    Of none seen it is about -log(1 - confidence)/of, at 95% the rule of three.
    """
    from scipy.stats import beta

    return 1.0 if count >= of else float(beta.ppf(confidence, count + 1, of - count))


@functools.cache
def student_quantile(probability: float, freedom: int) -> float:
    """Of Student's t with `freedom` degrees; the same one is asked for many times."""
    from scipy.stats import t

    return float(t.ppf(probability, freedom))


def rising(taus: list[float], losses: list[float]) -> Curve:
    """The curve through mean losses at rising thresholds, made non-decreasing from 0 on."""
    return list(zip(taus, itertools.accumulate((max(loss, 0.0) for loss in losses), max), strict=True))


def plan(curve: Curve, budgets: list[float]) -> dict[float, list[float]]:
    """For each budget, rising, the thresholds to test, rising: those at which the pilot loses FRACTIONS of it."""
    return {b: sorted({threshold_at(curve, f * b) for f in FRACTIONS}) for b in sorted(budgets)}


def last_within(
    taus: list[float], uppers: Callable[[float], Sequence[float]], budget: float
) -> tuple[float, Sequence[float]]:
    """Fixed-sequence testing: the last of the rising thresholds before the first of whose bounds one exceeds the budget.

    All bounds of a threshold have to hold for it to be taken, so each may use the whole error that is allowed
    (intersection-union test; Berger 1982, Technometrics 24, 295-300).

    Args:
        uppers: the upper bounds of everything that shall stay within the budget, at a threshold.

    Returns:
        The threshold and its bounds; 0 and none when the first one fails already.
    """
    found: tuple[float, Sequence[float]] = (0.0, ())
    for tau in taus:
        upper = uppers(tau)
        if not all(value <= budget for value in upper):
            break
        found = (tau, upper)
    return found


def threshold_at(curve: Curve, loss: float) -> float:
    """The threshold at which the pilot loses `loss`, interpolated on logarithms; the curve's ends beyond it."""
    below = [(tau, value) for tau, value in curve if 0 < value <= loss]
    above = [(tau, value) for tau, value in curve if value > loss]
    if not above:
        return curve[-1][0]
    if not below:
        return above[0][0] * min(1.0, loss / above[0][1])
    (t0, v0), (t1, v1) = below[-1], above[0]
    share = (math.log(loss) - math.log(v0)) / (math.log(v1) - math.log(v0))
    return math.exp(math.log(t0) + share * (math.log(t1) - math.log(t0)))


def clopper_pearson(count: int, of: int) -> list[float]:
    """The exact 95% interval of a binomial share."""
    from scipy.stats import binomtest

    low, high = binomtest(count, of).proportion_ci(0.95, "exact")
    return [float(low), float(high)]


def exact_levels(tested: int, rest: int, groups: int, confidence: float) -> dict[str, float]:
    """What each share would be if the bound were exact and the certified threshold one whose bound is the budget.

    The mean of r other groups then exceeds the budget when it exceeds the bound m + t·s/√n that the n tested ones gave.
    For normal losses (mean of the others − m)/(s·√(1/n + 1/r)) has Student's distribution with n − 1 degrees of freedom,
    in a random split of a given pool as for independent groups, so the share is P(T > t·√(r/(r + n))). In the whole pool
    of N groups the n tested ones count too: (mean − m)/(s·√(1/n − 1/N)), and the share is P(T > t·√(N/(N − n))). Of the
    true mean it is 1 − confidence.

    Args:
        tested, rest, groups: groups tested, left over, and in the pool.
    """
    from scipy.stats import t

    quantile = student_quantile(confidence, tested - 1)
    return {
        "test_over": float(t.sf(quantile * math.sqrt(rest / (rest + tested)), tested - 1)),
        "pool_over": float(t.sf(quantile * math.sqrt(groups / (groups - tested)), tested - 1)),
        "true_over": 1.0 - confidence,
    }


def margin(values: Tensor) -> float:
    """Half the width of the 95% interval of the mean of independent `values`, by Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1) * values.std() / math.sqrt(len(values)))
