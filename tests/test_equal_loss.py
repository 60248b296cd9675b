"""Matching: curves are read on their measured part alone, and ratios come with intervals that cover the truth."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lynx_learn.measure.equal_loss import RESAMPLES, Readings, Sweep, interpolate, matched, ratios

Curve = list[tuple[float, float, float]]
POINTS = st.tuples(st.floats(1e-6, 10), st.floats(1, 64), st.floats(0.01, 1))
CURVES = st.lists(POINTS, max_size=6)


# Reading one curve.


@example([(1e-06, 1.0, 1.0), (1.0000000000000002e-06, 1.0, 0.5)], 1e-6)  # their logarithms are equal
@given(CURVES, st.floats(1e-7, 20))
def test_a_curve_is_never_read_beyond_its_points(curve: Curve, level: float) -> None:
    found = interpolate(curve, level)
    losses = [loss for loss, _, _ in curve]
    assert (found is not None) == (len(curve) > 1 and min(losses) <= level <= max(losses))
    if found is not None:
        for value, column in zip(found, list(zip(*curve, strict=True))[1:], strict=True):
            assert min(column) - 1e-9 <= value <= max(column) + 1e-9


@given(CURVES, st.floats(1e-6, 10), st.randoms(use_true_random=False))
def test_the_order_of_the_points_does_not_matter(curve: Curve, level: float, random: Any) -> None:
    found = interpolate(curve, level)
    random.shuffle(curve)
    assert interpolate(curve, level) == found


@given(st.lists(POINTS, min_size=2, max_size=6, unique_by=lambda p: round(p[2], 3)), st.floats(1e-6, 10))
def test_the_crossing_with_the_fewest_bytes_counts(curve: Curve, level: float) -> None:
    """Against a walk in small steps over all segments between neighbours by bytes."""
    found = interpolate(curve, level)
    by_bytes = sorted(curve, key=lambda p: p[2])
    steps = [
        (low[2] + share * (high[2] - low[2]), math.log(low[0]) + share * (math.log(high[0]) - math.log(low[0])))
        for low, high in itertools.pairwise(by_bytes)
        for share in (step / 200 for step in range(201))
    ]
    above = [value >= math.log(level) for _, value in steps]
    crossings = [steps[i][0] for i in range(1, len(steps)) if above[i] != above[i - 1]]
    if crossings:
        assert found is not None
        assert found[1] <= crossings[0] + 1e-9
        longest = max(high[2] - low[2] for low, high in itertools.pairwise(by_bytes))
        touched = [p[2] for p in by_bytes if math.isclose(p[0], level, rel_tol=1e-3)]
        assert found[1] >= crossings[0] - longest / 200 - 1e-9 or any(t <= found[1] + 1e-6 for t in touched)


@given(st.lists(POINTS, min_size=2, max_size=6, unique_by=(lambda p: round(p[0], 6), lambda p: round(p[2], 3))))
def test_a_monotone_curve_goes_through_its_points(curve: Curve) -> None:
    losses, sizes = sorted((p[0] for p in curve), reverse=True), sorted(p[2] for p in curve)
    monotone = [(loss, 10 * size, size) for loss, size in zip(losses, sizes, strict=True)]
    for loss, experts, size in monotone:
        assert interpolate(monotone, loss) == (pytest.approx(experts), pytest.approx(size))


def test_a_curve_is_read_on_the_logarithm_of_the_loss() -> None:
    assert interpolate([(0.01, 16.0, 0.6), (1.0, 8.0, 0.2)], 0.1) == (pytest.approx(12.0), pytest.approx(0.4))


def test_noise_that_bends_a_curve_back_does_not_hide_the_fewer_bytes() -> None:
    bent = [(0.1, 4.0, 0.2), (0.02, 8.0, 0.4), (0.05, 10.0, 0.5), (0.01, 16.0, 0.8)]
    found = interpolate(bent, 0.03)
    assert found is not None
    assert 0.2 < found[1] < 0.4


@pytest.mark.parametrize("loss", [0.0, -0.01, math.nan, math.inf])
def test_points_without_a_logarithm_are_left_out(loss: float) -> None:
    curve = [(0.01, 8.0, 0.5), (0.1, 4.0, 0.2)]
    assert interpolate([*curve, (loss, 16.0, 0.9)], 0.03) == interpolate(curve, 0.03)
    assert interpolate([*curve, (loss, 16.0, 0.9)], 0.005) is None


# All methods of a cell.


def sweep(method: str, at_001: float, at_01: float, groups: int = 10, noise: Tensor | None = None) -> Sweep:
    """A curve through bytes at KL 0.01 and at KL 0.1, of 100 that the untouched model reads; 1 expert is 10 bytes."""
    losses = torch.tensor([[0.01 - 1e-8], [0.1 + 1e-8]], dtype=torch.float64).expand(2, groups)  # room for rounding
    if noise is not None:
        losses = losses * noise.double()
    size = torch.tensor([[at_001], [at_01]]).double().expand(2, groups)
    return Sweep(method, {"kl": losses, "nll": 2 * losses}, size / 10, size)


def readings(*sweeps: Sweep) -> Readings:
    groups = sweeps[0].experts.shape[1]
    return Readings(list(sweeps), torch.full((groups,), 100.0), seed=0)


def test_every_method_is_matched_at_every_level() -> None:
    rows = matched(readings(sweep("xshare", 80, 60), sweep("learned", 50, 30), sweep("learned", 60, 20)), [0.1, 0.01])
    kl = {(row["method"], row["level"]): (row["experts"], row["bytes"]) for row in rows if row["metric"] == "kl"}
    assert kl == {
        ("xshare", 0.01): (pytest.approx(8), pytest.approx(0.8)),
        ("xshare", 0.1): (pytest.approx(6), pytest.approx(0.6)),
        ("learned", 0.01): (pytest.approx(5), pytest.approx(0.5)),  # the first curve is better here
        ("learned", 0.1): (pytest.approx(2), pytest.approx(0.2)),  # and the second one here
    }
    nll = {(row["method"], row["level"]): row["bytes"] for row in rows if row["metric"] == "nll"}
    assert nll["xshare", 0.01] is None
    assert nll["learned", 0.1] == pytest.approx(0.3 + 0.2 * math.log10(2), abs=0.05)


def test_ratios_name_the_best_rule_of_which_nothing_is_trained() -> None:
    found = readings(
        *(sweep("random", 95, 90), sweep("xshare", 80, 60), sweep("vote", 70, 65)),
        *(sweep("learned", 42, 30), sweep("learned_lda", 44, 32), sweep("formula", 56, 35), sweep("oracle", 40, 24)),
    )
    low, high = (row for row in ratios(found, [0.01, 0.1]) if row["metric"] == "kl")
    assert (low["best_rule"], high["best_rule"]) == ("vote", "xshare")
    assert low["bytes_to_best_rule"]["ratio"] == pytest.approx(0.6)
    assert high["bytes_to_best_rule"]["ratio"] == pytest.approx(0.5)
    assert low["bytes_to_formula"]["ratio"] == pytest.approx(0.75)
    assert low["experts_to_oracle"]["ratio"] == pytest.approx(1.05)
    assert high["experts_to_oracle"]["ratio"] == pytest.approx(1.25)
    for row in (low, high):  # groups that are all alike leave nothing to be unsure of
        assert row["bytes_to_best_rule"]["low"] == pytest.approx(row["bytes_to_best_rule"]["high"])


def test_experts_are_not_bytes() -> None:
    """Surrogates are read, too: with equal bytes the oracle may keep fewer experts."""
    learned = sweep("learned", 50, 30)
    oracle = Sweep("oracle", learned.losses, learned.experts / 2, learned.bytes)
    (row, *_) = ratios(readings(learned, oracle), [0.05])
    assert row["experts_to_oracle"]["ratio"] == pytest.approx(2.0)
    assert (row["best_rule"], row["bytes_to_best_rule"], row["bytes_to_formula"]) == (None, None, None)


def test_a_ratio_that_is_seldom_reached_has_no_interval() -> None:
    """At 0.0105 the noisy curve begins, on average, a little below the level."""
    noise = torch.tensor([0.7, 1.3] * 5)
    clear, edge = (
        ratios(readings(sweep("learned", 50, 30, noise=noise), sweep("xshare", 80, 60)), [level])[0]
        for level in (0.03, 0.0105)
    )
    assert clear["bytes_to_best_rule"]["low"] is not None
    assert edge["bytes_to_best_rule"]["ratio"] == pytest.approx(50 / 80, rel=0.02)
    assert (edge["bytes_to_best_rule"]["low"], edge["bytes_to_best_rule"]["high"]) == (None, None)


def test_intervals_cover_the_truth() -> None:
    """Groups differ in how hard they are, for both methods alike, and each method has noise of its own."""
    generator = torch.Generator().manual_seed(0)
    truth = 0.5 * (0.5 + 0.3) / (0.5 * (0.8 + 0.6))  # both read half-way between 0.01 and 0.1 on the logarithm
    level = math.sqrt(0.01 * 0.1)
    covered, paired, trials = 0, [], 100
    for _ in range(trials):
        hard = (0.4 * torch.randn(24, generator=generator)).exp() / math.exp(0.08)
        own = (0.05 * torch.randn(2, 24, generator=generator)).exp() / math.exp(0.00125)
        pair = (sweep("learned", 50, 30, 24, hard * own[0]), sweep("xshare", 80, 60, 24, hard * own[1]))
        interval = ratios(readings(*pair), [level])[0]["bytes_to_best_rule"]
        assert interval["low"] <= interval["ratio"] <= interval["high"]
        covered += interval["low"] <= truth <= interval["high"]
        paired.append(interval["high"] - interval["low"])
    assert 0.85 <= covered / trials < 1.0
    # With groups drawn for each method alone, their common hardness would widen the interval.
    alone = sweep("xshare", 80, 60, 24, (hard * own[1])[torch.randperm(24, generator=generator)])
    unpaired = ratios(readings(pair[0], alone), [level])[0]["bytes_to_best_rule"]
    assert sum(paired) / trials < 0.75 * (unpaired["high"] - unpaired["low"])


def test_resamples_are_drawn_with_replacement_and_the_same_for_all() -> None:
    found = readings(sweep("learned", 50, 30, 12))
    weights = found.weights * 12
    assert weights.shape == (12, RESAMPLES + 1)
    assert torch.equal(weights[:, 0], torch.ones(12, dtype=torch.float64))
    assert torch.allclose(weights.sum(0), torch.tensor(12.0).double())
    assert weights[:, 1:].max() > 2
    assert torch.equal(found.weights, readings(sweep("xshare", 50, 30, 12)).weights)
