"""What is said of the noise floor and of the group that was decoded for real."""

from typing import Any

import pytest

from lynx_learn.show.floor import floor_lines
from lynx_learn.show.quality import calibration_lines

CELL = {
    "threshold": 0.5,
    "mean": 0.002,
    "upper": 0.003,
    "experts_before": 4.0,
    "experts": 3.0,
    "bytes": 0.8,
    "groups": 8,
}
FLOOR = {"batch_size": 16, "steps": 64, "cached": 0.0003, "precision": 0.0006, "other": "bfloat16"}
REAL = {"budget": "0.03", "simulated": 0.0281, "real": 0.0279}


def figures(**changes: Any) -> dict[str, Any]:
    cells = {"0.003": {"16": CELL}, "0.03": {"16": CELL}}
    return {"cells": cells, "floor": {**FLOOR, **changes.pop("floor", {})}, "real": REAL, **changes}


def test_floor_and_real_decode_are_told() -> None:
    assert floor_lines(figures()) == [
        "Noise floor, the untouched model against itself: 0.0003 between one pass and a decode with a cache (batch of 16, "
        "64 steps), 0.0006 in bfloat16; smallest budget 0.003.",
        "One group decoded for real at budget 0.03 loses 0.0279, by simulated decode 0.0281.",
    ]
    assert floor_lines({"cells": {"0.003": {"16": CELL}}}) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"floor": {"cached": 0.0031}}, "The smallest budget, 0.003, is below the noise floor"),
        ({"floor": {"precision": 0.0031}}, "The smallest budget, 0.003, is below the noise floor"),
        ({"floor": {"cached": 0.0008}}, "more than a quarter of the smallest budget, 0.003."),
        ({"floor": {"precision": None, "other": "float32: too large"}}, "not measured in float32: too large; smallest"),
        ({"real": {**REAL, "real": 0.0312}}, "differ by more than a tenth of the budget"),
        ({"real": {**REAL, "real": 0.0250}}, "differ by more than a tenth of the budget"),
    ],
    ids=str,
)
def test_what_is_out_of_the_ordinary_is_said(change: dict[str, Any], said: str) -> None:
    assert said not in " ".join(floor_lines(figures()))
    assert said in " ".join(floor_lines(figures(**change)))


def test_where_nothing_is_certified_there_is_no_real_decode() -> None:
    assert len(floor_lines(figures(real=None))) == 1


def test_the_floor_stands_before_the_smallest_budget_in_the_table() -> None:
    made: Any
    made, *lines = calibration_lines({"kl": figures(floor={"precision": None})})
    assert [row[0] for row in made.rows] == ["floor", "0.003", "0.03"]
    assert made.rows[0][2] == "0.0003"
    assert lines == floor_lines(figures(floor={"precision": None}))
