"""Sweeps: which settings are measured, in which process, and that no process stays behind."""

import math
from collections.abc import Iterator

import pytest
import torch
from flows import LENGTH, PROMPT, tiny_flow
from hypothesis import given
from hypothesis import strategies as st

from lynx_learn.decode.simulate import compare
from lynx_learn.measure.sweeps import (
    ABOVE,
    BELOW,
    MOST_SETTINGS,
    ROOM,
    SEED_STEP,
    Row,
    Setup,
    Subject,
    Task,
    key,
    measure,
    plan,
    settings_to_measure,
    walk,
)
from lynx_learn.rules.grids import curves
from lynx_learn.traces.groups import decode_groups

LEVELS, SEED = (0.02, 0.1), 5


def setup(*methods: str, trace: bool = False) -> Setup:
    flow = tiny_flow()
    return Setup(
        str(flow.selector), None, str(flow.trace) if trace else None, "cpu", "auto", methods, LEVELS, PROMPT, SEED
    )


def tokens(subject: Subject, groups: int = 2) -> list[torch.Tensor]:
    made = decode_groups(str(tiny_flow().texts), subject.loaded.tokenizer, "test", 4, LENGTH, groups, seed=0)
    return [rows for rows, _ in made]


# Which settings.

LOSSES = st.lists(st.floats(-1e-6, 3.0) | st.just(math.nan), min_size=1, max_size=14)


@given(LOSSES, st.lists(st.floats(1e-4, 0.3), min_size=1, max_size=4).map(tuple))
def test_settings_reach_beyond_the_levels_where_the_sweep_does(losses: list[float], levels: tuple[float, ...]) -> None:
    found = settings_to_measure(losses, levels)
    kept = [losses[i] for i in sorted(found)]
    low, high = min(levels), max(levels)
    assert 1 <= len(found) <= MOST_SETTINGS
    assert found <= set(range(len(losses)))
    for is_beyond in (lambda loss: loss <= low / ROOM, lambda loss: not loss < high * ROOM):
        if any(map(is_beyond, losses)):
            assert any(map(is_beyond, kept))
    useful = [i for i, loss in enumerate(losses) if low / BELOW <= loss <= high * ABOVE]
    assert len(found - set(useful)) <= 2
    if len(useful) + 2 <= MOST_SETTINGS:
        assert set(useful) <= found


def test_of_too_many_settings_those_that_lie_close_together_are_dropped() -> None:
    spaced = [0.0011 * 45 ** (i / (MOST_SETTINGS - 1)) for i in range(MOST_SETTINGS)]
    losses = [*spaced[:3], spaced[2] * 1.001, *spaced[3:]]
    everything = set(range(len(losses)))
    assert settings_to_measure(losses, (0.003, 0.03)) in (everything - {2}, everything - {3})


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.5, 0.9], {0}),  # all too harsh: the gentlest
        ([0.0, 0.0001, 0.0005], {2}),  # all too gentle: the harshest
        ([0.0001, 0.0002, 0.5], {1, 2}),  # nothing within: both neighbours
        ([0.0001, 0.0029, 0.01, 0.031, 0.5], {0, 1, 2, 3, 4}),  # too near a level to lie beyond it on all groups
        ([0.0001, 0.002, 0.01, 0.05, 0.5], {1, 2, 3}),
        ([math.nan], {0}),
    ],
)
def test_neighbours_of_the_range(losses: list[float], expected: set[int]) -> None:
    assert settings_to_measure(losses, (0.003, 0.01, 0.03)) == expected


def rows_of(losses: list[float]) -> list[Row]:
    return [
        {"method": "m", "curve": 0, "setting": str(i), "sums": [[x, 0.0, 0.0]], "tokens": [1]}
        for i, x in enumerate(losses)
    ]


@pytest.mark.parametrize("beyond", [0.21, math.nan])
def test_a_walk_ends_with_the_first_setting_that_is_too_harsh(beyond: float) -> None:
    def rows() -> Iterator[Row]:
        yield from rows_of([0.001, 0.19, 0.1, beyond])
        raise AssertionError("measured further than needed")

    assert [row["setting"] for row in walk(rows(), highest=0.1)] == ["0", "1", "2", "3"]


def test_a_plan_keeps_budgets_and_the_untouched_model_whatever_they_lose() -> None:
    rows = [
        {"method": "untouched", "curve": 0, "setting": "", "sums": [[0.0, 0.0, 0.0]], "tokens": [1]},
        *rows_of([0.0, 0.00001, 0.05, 0.9]),
        {"method": "learned", "curve": 0, "setting": "budget=9", "sums": [[2.0, 0.0, 0.0]], "tokens": [1]},
    ]
    assert plan(rows, LEVELS) == [("untouched", 0, ""), *(("m", 0, i) for i in "123"), ("learned", 0, "budget=9")]


# Measuring.


def test_the_first_group_is_walked_and_the_others_follow_the_plan() -> None:
    subject = Subject(setup("xshare", "gate_sq", "learned"))
    first, second = tokens(subject)
    walked = measure(subject, Task("cell", 0, first.tolist(), None))
    swept = {}
    for row in walked[1:]:
        swept.setdefault((row["method"], row["curve"]), []).append(row["setting"])
    assert set(swept) == {("xshare", 0), ("gate_sq", 0), ("gate_sq", 1), ("learned", 0)}
    for (method, number), settings in swept.items():
        curve = curves(method, subject.layers, 4, None, subject.selector)[number]
        assert settings == [policy.setting for policy in curve][: len(settings)]
    wanted = plan(walked, LEVELS)
    assert 4 < len(wanted) < len(walked)
    assert [key(row) for row in measure(subject, Task("cell", 1, second.tolist(), wanted))] == wanted


def test_what_is_measured_is_what_a_comparison_measures() -> None:
    subject = Subject(setup("siftmoe", "random", trace=True))
    group = tokens(subject)[1]
    rows = {key(row): row for row in measure(subject, Task("cell", 7, group.tolist(), None))}
    for method, seed in (("siftmoe", 0), ("random", SEED + 7 * SEED_STEP)):
        policy = curves(method, subject.layers, 4, subject.stats, subject.selector, seed)[0][0]
        (result,) = compare(subject.loaded.model, subject.layers, [(group, [""] * 4)], [policy], PROMPT)
        row = rows[method, 0, policy.setting]
        for name, wanted in (("sums", result.sums[0]), ("part_sums", result.part_sums[0])):
            torch.testing.assert_close(torch.tensor(row[name]).double(), wanted, rtol=1e-4, atol=1e-5)
        assert row["stats"]["experts_after"] == result.stats[0].experts_after
    untouched = rows["untouched", 0, ""]
    assert untouched["stats"]["bytes_ratio"] == 1.0
    # What later layers route depends on the policy, the first layer does not.
    assert untouched["stats"]["experts_after"][0] == result.stats[0].experts_before[0]
