"""Figures: every method that was measured is in them, and the same report gives the same bytes."""

import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_learn.measure.equal_loss import NO_RULES
from lynx_learn.rules.grids import METHODS
from lynx_learn.show.figures import STYLES, front, frontier

LEVELS = [0.003, 0.01, 0.03]


def made_up(methods: list[str], cells: list[tuple[int, str]]) -> dict[str, Any]:
    """A report with a straight curve per method: the later in the list, the more bytes."""
    points, matched, ratios = [], [], []
    for size, batches in cells:
        place = {"batch_size": size, "batches": batches}
        zeros = {"bytes": 1.0, "kl": 0.0, "kl_margin": 0.0, "setting": "", "curve": 0}
        points.append({"method": "untouched", **place, **zeros})
        for rank, method in enumerate(methods):
            offset = 0.02 * rank + (0.05 if batches == "single" else 0)
            for step in range(5):
                kl = 0.002 * 2.2**step
                own = {"bytes": 0.8 + offset - 0.1 * step, "kl": kl, "kl_margin": 0.1 * kl, "curve": 0}
                points.append({"method": method, **place, "setting": f"M={step}", **own})
            for level in LEVELS:
                matched.append({**place, "metric": "kl", "level": level, "method": method, "bytes": 0.6 + offset})
        rule = next((method for method in methods if method not in NO_RULES), None)
        for metric in ("kl", "nll"):
            for level in LEVELS:
                known = rule is not None and "learned" in methods
                ratio = {"ratio": 0.77, "low": 0.7, "high": 0.8} if known else None
                row = {"metric": metric, "level": level, "best_rule": rule, "bytes_to_best_rule": ratio}
                ratios.append({**place, **row})
    return {"options": {"levels": LEVELS}, "points": points, "matched": matched, "ratios": ratios}


def drawn(report: dict[str, Any], folder: Path) -> list[str]:
    """The texts of the svg."""
    folder.mkdir(exist_ok=True)
    frontier(report, folder)
    svg = (folder / "frontier.svg").read_text(encoding="utf-8")
    return [text.replace("&lt;", "<") for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_every_method_has_a_look_of_its_own() -> None:
    assert set(STYLES) == set(METHODS)
    assert len({label for label, _, _ in STYLES.values()}) == len(STYLES)
    assert len({(colour, marker) for _, colour, marker in STYLES.values()}) == len(STYLES)


CELLS: list[list[tuple[int, str]]] = [
    [(16, "mixed")],
    [(16, "single")],
    [(8, "mixed"), (16, "mixed"), (16, "single"), (64, "mixed")],
    [(1, "mixed"), (8, "mixed"), (16, "mixed"), (32, "mixed"), (64, "mixed")],
]


@pytest.mark.parametrize("cells", CELLS, ids=str)
@pytest.mark.parametrize("methods", [list(METHODS), ["xshare", "learned"], ["random"], ["learned", "oracle"]], ids=str)
def test_what_was_measured_is_labelled(methods: list[str], cells: list[tuple[int, str]], tmp_path: Path) -> None:
    texts = drawn(made_up(methods, cells), tmp_path)
    labels = {label for label, _, _ in STYLES.values()}
    assert {text for text in texts if text in labels} == {STYLES[method][0] for method in methods}
    titles = [text for text in texts if text.startswith("batch of ")]
    one_source = ", one source" if cells == [(16, "single")] else ""
    assert titles == [f"batch of {size}{one_source}" for size in sorted({size for size, _ in cells})]
    kinds = {batches for _, batches in cells}
    assert ("batches of one source" in texts) == (kinds == {"mixed", "single"})
    compared = "learned" in methods and any(method not in NO_RULES for method in methods)
    assert texts.count("−23%") == (len(cells) - len([c for c in cells if c[1] == "single"]) if compared else 0)
    assert {"0.003", "0.01", "0.03"} <= set(texts)


def test_the_png_is_of_a_size_for_a_slide(tmp_path: Path) -> None:
    drawn(made_up(list(METHODS), CELLS[2]), tmp_path)
    data = (tmp_path / "frontier.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > height > 1000


def test_equal_reports_give_equal_figures(tmp_path: Path) -> None:
    report = made_up(["xshare", "learned", "oracle"], CELLS[2])
    for name in ("a", "b"):
        drawn(report, tmp_path / name)
    for file in ("frontier.svg", "frontier.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_method_that_never_loses_anything_does_no_harm(tmp_path: Path) -> None:
    report = made_up(["xshare", "learned"], [(4, "mixed")])
    for point in report["points"]:
        point["kl"] = 0.0 if point["method"] == "xshare" else point["kl"]
    assert "XShare" in drawn(report, tmp_path)


@given(st.lists(st.tuples(st.floats(0.1, 1), st.floats(1e-4, 1)), min_size=1, max_size=12))
def test_the_front_holds_what_nothing_beats(pairs: list[tuple[float, float]]) -> None:
    points = [{"bytes": size, "kl": loss} for size, loss in pairs]
    kept = front(points)
    assert [p["bytes"] for p in kept] == sorted({p["bytes"] for p in kept})
    assert [p["kl"] for p in kept] == sorted({p["kl"] for p in kept}, reverse=True)
    for point in points:
        beaten = any(
            (q["bytes"], q["kl"]) != (point["bytes"], point["kl"])
            and q["bytes"] <= point["bytes"]
            and q["kl"] <= point["kl"]
            for q in points
        )
        assert (point in kept) == (not beaten)
