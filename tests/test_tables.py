"""Tables fit a page of 80 columns, and none of their figures is lost."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluate_cases import tiny_report

from lynx_learn.show import quality, tables

METRICS = json.loads((Path(__file__).parents[1] / "selectors" / "reference-moe" / "metrics.json").read_text())
# The shipped selector has no coverage; figures as wide as they get.
COVERED = {
    **{"shift": False, "batch_size": 64, "budget": 0.003, "test_over": 0.125, "pool_over": 0.105},
    **{"true_over": 0.1047, "true_over_interval": [0.1012, 0.1134], "bound_misses": 0.1475, "nothing": 0.105},
    **{"bound_misses_interval": [0.1386, 0.1578], "test_share": 0.8994, "upper_share": 0.9612, "bytes": 1.0},
}
EXACT = {"options": {"metric": "kl"}, "exact": {"test_over": 0.1055, "pool_over": 0.0194, "true_over": 0.05}}
MAKERS: dict[str, Callable[[], Any]] = {
    "training": lambda: quality.training_table(METRICS["train"]["layers"]),
    "coverage": lambda: quality.coverage_table(
        {"rows": [COVERED, {**COVERED, "shift": True, "test_share": None}], **EXACT}
    ),
    "evaluation": lambda: quality.evaluation_table(METRICS["evaluate"]),
    "calibration": lambda: quality.calibration_table("kl", METRICS["calibrate"]["kl"]).without("groups"),
    "matched": lambda: quality.matched_table(METRICS["evaluate"]),
    "ratios": lambda: quality.ratios_table(METRICS["evaluate"]),
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


def test_what_rounds_to_nothing_has_no_sign() -> None:
    point = {**METRICS["evaluate"]["points"][-1], "kl": -1e-7, "nll": -1e-7}
    (row,) = quality.evaluation_table({**METRICS["evaluate"], "points": [point]}).rows
    assert row[4].startswith("0.0000 ")
    assert row[5].startswith("+0.0000 ")


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
    assert [list(column.cells) for column in kept.__rich__().columns] == [["a|b c", "*"], ["0.25", ""]]


def test_lines_of_text_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    line = "lynx-learn calibrate --selector " + "a/long/folder/" * 8
    tables.show(line)
    assert capsys.readouterr().out == line + "\n"


def test_tables_show_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure, in 80 columns; a cell that is folded goes on in the lines below."""
    report = tiny_report()

    def printed(part: object) -> tuple[str, list[str]]:
        capsys.readouterr()
        tables.show(part)
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert not [line for line in lines if len(line) > 80]
        return "\n".join(lines), " ".join(lines).split()

    page, words = printed(quality.evaluation_table(report))
    for point in report["points"]:
        row = f"{point['method']}.* {point['batch_size']}( single)? +{point['experts']:.1f} +{point['bytes']:.0%} +{point['kl']:.4f}"
        assert re.search(rf"^{row}", page, re.MULTILINE), row
        assert set(point["setting"].split()) <= set(words)
        assert {f"±{point['kl_margin']:.4f}", f"{point['nll']:+.4f}", f"±{point['nll_margin']:.4f}"} <= set(words)
    page, _ = printed(quality.matched_table(report))
    for method, batch in {(row["method"], f"{row['batch_size']}") for row in report["matched"]}:
        of_it = [row for row in report["matched"] if (row["method"], f"{row['batch_size']}") == (method, batch)]
        for row in (row for row in of_it if row["bytes"] is not None):
            cell = f"{row['bytes']:.0%}/{row['experts']:.1f}"
            assert re.search(rf"^{method} +{batch}.* {cell}( |$)", page, re.MULTILINE), cell
    _, words = printed(quality.ratios_table(report))
    for row in report["ratios"]:
        ratio = row["bytes_to_best_rule"]
        if ratio and ratio["low"]:
            assert f"{ratio['ratio']:.3f}" in words
            assert f"({ratio['low']:.3f}–{ratio['high']:.3f})" in words
