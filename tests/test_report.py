"""The report of an evaluation, against figures worked by hand, and the groups on disk that it is made from."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluate_cases import CELLS, LEVELS, METHODS_HERE, points, tiny_report

from lynx_learn.decode.tally import Stats
from lynx_learn.measure.equal_loss import interpolate
from lynx_learn.measure.report import Cell, Measured, Store, make_report, make_sweep
from lynx_learn.measure.sweeps import Row
from lynx_learn.rules.grids import METHODS

# Two groups of two sequences of two sources; ten scored tokens each, but the last sequence ended after five.
CELL = Cell(2, "mixed", [(torch.zeros(2, 12, dtype=torch.int64), names) for names in (["a", "b"], ["b", "a"])], (1,))
TOKENS = [[10, 10], [10, 5]]
# KL of the rule at M=3 by group: 1/35 in all, and what the sum of either group is above that, over its mean count.
BY_GROUP = [1 / 35 + (0.6 - 20 / 35) / 17.5, 1 / 35 + (0.4 - 15 / 35) / 17.5]
# Bytes of an expert in either layer.
LAYER_BYTES = torch.tensor([1.0, 3.0]).double()


def row(group: int, method: str, setting: str, kl: list[float], after: list[float], ratio: float) -> Row:
    """One policy on one group: the KL that its sequences lose per token, and what it loads of (4, 2) experts."""
    sums = [[loss * n, -loss * n, 0.1 * n] for loss, n in zip(kl, TOKENS[group], strict=True)]
    total = [sum(column) for column in zip(*sums, strict=True)]
    parts = [[share * value for value in total] for share in (0.1, 0.2, 0.3, 0.4)]
    stats = Stats(9, [4.0, 2.0 + group], after, ratio, 0.25)
    counts = [sum(TOKENS[group]) / 4] * 4
    return {
        "method": method,
        "curve": 0,
        "setting": setting,
        "sums": sums,
        "tokens": TOKENS[group],
        "part_sums": parts,
        "part_tokens": counts,
        "stats": asdict(stats),
    }


def groups() -> list[list[Row]]:
    """Of either group the untouched model, and a rule at two settings."""
    return [
        [
            row(group, "untouched", "", [0.0, 0.0], [4.0, 2.0 + group], 1.0),
            row(group, "rule", "M=3", [0.02, 0.04], [3.0, 2.0], 0.8),
            row(group, "rule", "M=2", [0.2, 0.4], [2.0, 1.0], 0.5),
        ]
        for group in (0, 1)
    ]


def measured(place: int) -> Measured:
    return Measured(CELL, [rows[place] for rows in groups()], LAYER_BYTES)


def test_a_point_by_hand() -> None:
    untouched = measured(0).loaded
    assert untouched.tolist() == [4 * 1 + 2 * 3, 4 * 1 + 3 * 3]
    point = measured(1).point(untouched)
    assert (point["method"], point["setting"], point["batch_size"], point["batches"]) == ("rule", "M=3", 2, "mixed")
    assert (point["groups"], point["tokens"]) == (2, 35)
    assert point["kl"] == pytest.approx((0.2 + 0.4 + 0.2 + 0.2) / 35)
    assert point["nll"] == pytest.approx(-point["kl"])
    assert point["agreement"] == pytest.approx(0.1)
    assert (point["experts_before"], point["experts"], point["answered"]) == (3.25, 2.5, 0.25)
    # Bytes of both groups together: the second one loads more, so it counts for more.
    assert point["bytes"] == pytest.approx(0.8 * (10 + 13) / (10 + 13))
    assert point["kl_by_part"] == pytest.approx([4 * share * point["kl"] for share in (0.1, 0.2, 0.3, 0.4)])
    # Source a: ten tokens of 0.02 and five of 0.04; b: ten of 0.04 and ten of 0.02.
    assert point["by_source"]["kl"] == pytest.approx({"a": 0.4 / 15, "b": 0.6 / 20})
    # Half the width of Student's interval of two values.
    first, second = BY_GROUP
    spread = (first - second) / 2**0.5
    assert point["kl_margin"] == pytest.approx(12.7062 * spread / 2**0.5, rel=1e-4)


def test_bytes_are_weighed_by_what_the_untouched_model_loads() -> None:
    rows = [dict(rows[1]) for rows in groups()]
    rows[1]["stats"] = {**rows[1]["stats"], "bytes_ratio": 0.5}
    point = Measured(CELL, rows, LAYER_BYTES).point(measured(0).loaded)
    assert point["bytes"] == pytest.approx((0.8 * 10 + 0.5 * 13) / 23)


def test_the_source_that_loses_most_is_named() -> None:
    rows = [dict(rows[1]) for rows in groups()]
    rows[1]["sums"] = rows[1]["sums"][::-1]
    rows[1]["tokens"] = rows[1]["tokens"][::-1]
    point = Measured(CELL, rows, LAYER_BYTES).point(measured(0).loaded)
    assert point["worst_source"] == "b"
    assert "worst_source" not in measured(0).point(measured(0).loaded)


def test_a_sweep_has_settings_by_groups() -> None:
    sweep = make_sweep("rule", [measured(1), measured(2)])
    assert sweep.losses["kl"].tolist() == [pytest.approx([f * loss for loss in BY_GROUP]) for f in (1, 10)]
    assert sweep.experts.tolist() == [[2.5, 2.5], [1.5, 1.5]]
    assert sweep.bytes.tolist() == [pytest.approx([8.0, 10.4]), pytest.approx([5.0, 6.5])]


def test_the_report_is_made_of_what_is_stored(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", {"seed": 1})
    for index, rows in enumerate(groups()):
        store.write(CELL.name, index, rows)
    layers = [SimpleNamespace(expert_bytes=size) for size in LAYER_BYTES.tolist()]
    subject: Any = SimpleNamespace(layers=layers, selector=SimpleNamespace(config=SimpleNamespace(base_model="tiny")))
    report = make_report({"seed": 1, "levels": [0.1]}, subject, [CELL], store)
    assert (report["base_model"], report["sources"]) == ("tiny", ["a", "b"])
    untouched = measured(0).loaded
    assert report["points"] == [measured(place).point(untouched) for place in range(3)]
    (reached, _) = report["matched"]
    assert (reached["method"], reached["batch_size"], reached["metric"], reached["level"]) == ("rule", 2, "kl", 0.1)
    assert 0.5 < reached["bytes"] < 0.8
    assert 1.5 < reached["experts"] < 2.5


def test_stored_groups_are_read_back_and_damaged_ones_count_as_none(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", {"seed": 1})
    assert store.read(CELL.name, 0) is None
    rows = groups()[0]
    store.write(CELL.name, 0, rows)
    assert json.loads((tmp_path / "out" / "options.json").read_text()) == {"seed": 1}
    file = tmp_path / "out" / "groups" / "2-mixed" / "00000.json"
    assert Store(tmp_path / "out", {"seed": 1}).read(CELL.name, 0) == rows
    file.write_bytes(file.read_bytes()[:-3])
    assert store.read(CELL.name, 0) is None


def test_a_task_carries_all_that_another_process_needs() -> None:
    task = CELL.task(1, [("rule", 0, "M=2")])
    assert (task.cell, task.index, task.plan, task.ends) == ("2-mixed", 1, [("rule", 0, "M=2")], (1,))
    assert task.tokens == [[0] * 12] * 2
    assert CELL.place == {"batch_size": 2, "batches": "mixed"}


# At equal loss.


def test_matched_is_read_off_the_points() -> None:
    report = tiny_report()
    keys = [(*cell, metric, level) for cell in CELLS for metric in ("kl", "nll") for level in LEVELS]
    rows = [[row[k] for k in ("batch_size", "batches", "metric", "level", "method")] for row in report["matched"]]
    assert rows == [[*key, method] for key in keys for method in METHODS if method in METHODS_HERE]
    assert [tuple(row[k] for k in ("batch_size", "batches", "metric", "level")) for row in report["ratios"]] == keys
    for row in report["matched"]:
        own = points(report, **{key: row[key] for key in ("batch_size", "batches", "method")})
        readings = []
        for curve in {p["curve"] for p in own}:
            line = [(p[row["metric"]], p["experts"], p["bytes"]) for p in own if p["curve"] == curve]
            readings.append(interpolate(line, row["level"]))
        reached = [reading for reading in readings if reading is not None]
        if reached:
            best = min(reached, key=lambda reading: reading[1])
            assert (row["experts"], row["bytes"]) == (pytest.approx(best[0]), pytest.approx(best[1]))
        else:
            assert (row["experts"], row["bytes"]) == (None, None)
    kl = [row["bytes"] for row in report["matched"] if row["metric"] == "kl"]
    assert None in kl
    assert sum(size is not None for size in kl) > len(kl) / 2


def test_ratios_are_those_of_the_matched_bytes() -> None:
    report = tiny_report()
    found = 0
    for row in report["ratios"]:
        place = {key: row[key] for key in ("batch_size", "batches", "metric", "level")}
        here = {r["method"]: r["bytes"] for r in report["matched"] if all(r[k] == v for k, v in place.items())}
        rules = {method: size for method, size in here.items() if method != "learned" and size is not None}
        assert row["best_rule"] == min(rules, key=rules.__getitem__, default=None)
        assert row["bytes_to_formula"] is row["experts_to_oracle"] is None  # not among the methods
        if rules and here["learned"] is not None:
            ratio = row["bytes_to_best_rule"]
            assert ratio["ratio"] == pytest.approx(here["learned"] / min(rules.values()))
            assert ratio["low"] is None or ratio["low"] <= ratio["ratio"] <= ratio["high"]
            found += ratio["low"] is not None
    assert found
