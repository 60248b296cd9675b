"""Tables fit a page of 80 columns, and none of their figures is lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lynx_learn.show import tables

METRICS = json.loads((Path(__file__).parents[1] / "selectors" / "reference-moe" / "metrics.json").read_text())
MAKERS: dict[str, Callable[[], Any]] = {
    "training": lambda: tables.training_table(METRICS["train"]["layers"]),
    "coverage": lambda: tables.coverage_table(METRICS["coverage"]),
    "evaluation": lambda: tables.evaluation_table(METRICS["evaluate"]),
    "calibration": lambda: tables.calibration_table("kl", METRICS["calibrate"]["kl"]).without("groups"),
    "matched": lambda: tables.matched_table(METRICS["evaluate"]),
    "ratios": lambda: tables.ratios_table(METRICS["evaluate"]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_tables_of_the_shipped_selector_fit(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = MAKERS[name]()
    tables.show(made)
    out = capsys.readouterr().out
    assert all(len(line.rstrip()) <= 80 for line in out.splitlines())
    assert "…" not in out
    printed = set(out.split())
    figures = {word for row in made.rows for cell in row[1:] for word in cell.split()}
    lost = {word for word in figures - printed if any(c.isdigit() for c in word) and "_" not in word}
    assert not lost


def test_widths_wrap_between_words_before_they_break_one() -> None:
    assert tables.fit([["a", "12"], ["head", "1 2"]]) == [2, 4]
    words = [["x" * 20], ["y" * 10 + " " + "y" * 10], ["h", "w" * 20 + " " + "w" * 20]]
    widths = tables.fit(words)
    assert sum(widths) + tables.GAP * 3 - 1 <= tables.WIDTH
    assert all(width >= least for width, least in zip(widths, (20, 10, 20), strict=True))
    assert sum(tables.fit([["z" * 60, "z" * 60]] * 2)) == tables.WIDTH - 3


def test_a_page_holds_the_same_cells_as_the_terminal() -> None:
    made = tables.Table("title", ["name", "left out", "loss"], [["a|b\nc", "1", "0.25"], ["*", "2", ""]])
    assert made.markdown.splitlines()[2:] == ["| a\\|b c | 1 | 0.25 |", "| * | 2 |  |"]
    kept = made.without("left out")
    assert kept.markdown.splitlines() == ["| name | loss |", "| --- | --- |", "| a\\|b c | 0.25 |", "| * |  |"]
    assert [list(column.cells) for column in kept.__rich__().columns] == [["a|b\nc", "*"], ["0.25", ""]]


def test_lines_of_text_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    line = "lynx-learn calibrate --selector " + "a/long/folder/" * 8
    tables.show(line)
    assert capsys.readouterr().out == line + "\n"
