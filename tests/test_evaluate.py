"""Evaluate: what the report holds, against figures worked out here, and what goes into the card."""

import json
import math
import re
import shutil
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_fit import contents, one_line, other_revision, reference_flow, scratch, tiny_flow

from lynx_learn.calibrate import CalibrateOptions, calibrate
from lynx_learn.corpus import decode_groups
from lynx_learn.errors import CorpusError, OptionError, SelectorError
from lynx_learn.evaluate import EvaluateOptions, evaluate, interpolate, margin
from lynx_learn.families import find_moe_layers
from lynx_learn.models import load_model
from lynx_learn.selector import LynxSelector, read_metrics
from lynx_learn.simulate import compare

LENGTH, PROMPT, GROUPS, EXPERTS, TOP_K = 32, 8, 5, 8, 2
SIZES, BUDGETS, SHARES = [2, 4], [0.02, 0.1], [0.1, 0.5, 0.75, 1.0]
Curve = list[tuple[float, float, float]]


@cache
def calibrated() -> Path:
    """The tiny selector with thresholds for SIZES and BUDGETS; nobody may write to it."""
    folder = scratch() / "selector"
    shutil.copytree(tiny_flow().selector, folder)
    texts = str(tiny_flow().texts)
    calibrate(
        CalibrateOptions(
            str(folder), corpus=texts, budgets=BUDGETS, batch_sizes=SIZES, groups=12, length=LENGTH, prompt=PROMPT
        )
    )
    return folder


def choices(out: Path, **changes: Any) -> EvaluateOptions:
    options = EvaluateOptions(
        str(calibrated()),
        str(out),
        corpus=str(tiny_flow().texts),
        kept_shares=SHARES,
        batch_sizes=SIZES,
        groups=GROUPS,
        length=LENGTH,
        prompt=PROMPT,
    )
    return replace(options, **changes)


@cache
def tiny_report() -> dict[str, Any]:
    return evaluate(choices(scratch() / "report"))


def points(report: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [p for p in report["points"] if all(p[key] == value for key, value in wanted.items())]


# The report.


def test_the_report_is_what_is_written(tmp_path: Path) -> None:
    options = choices(tmp_path / "deep" / "out", methods=["xshare"], batch_sizes=[2])
    report = evaluate(options)
    assert list(contents(tmp_path)) == ["deep/out/report.json"]
    assert json.loads((tmp_path / "deep" / "out" / "report.json").read_text()) == report
    assert report["options"] == asdict(options)
    assert report["base_model"] == str(tiny_flow().model)
    assert report["sources"] == ["even", "odd"]
    assert report["environment"]["torch"] == torch.__version__


def test_every_method_is_there_at_every_setting() -> None:
    """Shares of 8 experts below top-k count as top-k; the learned curve goes beyond its budgets on both sides."""
    for size in SIZES:
        found = [(p["method"], p["setting"]) for p in points(tiny_report(), batch_size=size)]
        assert found[0] == ("untouched", "")
        for method in ("random", "xshare", "gate_sum"):
            assert [s for m, s in found if m == method] == ["M=2", "M=4", "M=6", "M=8"]
        learned = [s for m, s in found if m == "learned"]
        assert learned[:2] == ["budget=0.02", "budget=0.1"]
        thresholds = [float(s.removeprefix("tau=")) for s in learned[2:]]
        table = LynxSelector.from_pretrained(calibrated()).config.thresholds["kl"]
        low, high = (table[str(budget)][str(size)] for budget in BUDGETS)
        assert thresholds[0] < low < thresholds[1] < high < thresholds[2]
        assert len(thresholds) == 3


def test_the_untouched_row_loses_nothing_and_reads_everything() -> None:
    for size in SIZES:
        (row,) = points(tiny_report(), method="untouched", batch_size=size)
        losses = ("kl", "nll", "agreement", "kl_margin", "nll_margin", "agreement_margin")
        assert [row[key] for key in losses] == [0.0] * 6
        assert (row["bytes"], row["answered"]) == (1.0, 0.0)
        assert TOP_K < row["experts"] == row["experts_before"] <= min(EXPERTS, TOP_K * size)
        assert row["experts"] == pytest.approx(mean_experts(size))
        assert row["tokens"] == GROUPS * size * (LENGTH - PROMPT - 1)


@torch.no_grad()
def mean_experts(size: int) -> float:
    """Distinct experts of a layer that a position of a group needs, from the routers' outputs alone."""
    loaded = load_model(str(tiny_flow().model), "cpu")
    groups = decode_groups(str(tiny_flow().texts), loaded.tokenizer, "test", size, LENGTH, GROUPS, seed=2)
    counts: list[int] = []

    def count(module: torch.nn.Module, args: Any, output: Any) -> None:
        indices = output[2].view(size, LENGTH, TOP_K)[:, PROMPT:]
        counts.extend(len(indices[:, position].unique()) for position in range(LENGTH - PROMPT))

    for layer in find_moe_layers(loaded.model):
        layer.router.register_forward_hook(count)
    for tokens, _ in groups:
        loaded.model(input_ids=tokens)
    return sum(counts) / len(counts)


def test_a_rule_that_keeps_all_experts_loses_nothing() -> None:
    rows = [p for p in tiny_report()["points"] if p["setting"] == "M=8"]
    assert len(rows) == 3 * len(SIZES)
    for row in rows:
        assert row["kl"] == pytest.approx(0.0, abs=1e-6)
        assert row["experts"] == row["experts_before"]
        assert row["bytes"] == 1.0


def test_fewer_experts_lose_more() -> None:
    for method in ("random", "xshare", "gate_sum"):
        rows = points(tiny_report(), method=method, batch_size=4)
        losses, experts = ([row[key] for row in rows] for key in ("kl", "experts"))
        assert losses == sorted(losses, reverse=True)
        assert experts == sorted(experts)
        assert all(row["experts"] <= float(row["setting"].removeprefix("M=")) for row in rows)
        (untouched,) = points(tiny_report(), method="untouched", batch_size=4)
        # Bytes are averaged as ratios over the groups, hence not exactly the ratio of the averages.
        assert all(row["bytes"] == pytest.approx(row["experts"] / untouched["experts"], rel=0.02) for row in rows)


def test_surrogates_count_as_bytes() -> None:
    for row in points(tiny_report(), method="learned"):
        assert row["answered"] > 0
        assert row["bytes"] > row["experts"] / row["experts_before"]


def test_a_point_is_what_a_comparison_measures() -> None:
    loaded = load_model(str(tiny_flow().model), "cpu")
    groups = decode_groups(str(tiny_flow().texts), loaded.tokenizer, "test", 4, LENGTH, GROUPS, seed=2)
    policy = LynxSelector.from_pretrained(calibrated()).policy(0.1)
    result = compare(loaded.model, find_moe_layers(loaded.model), groups, [policy], PROMPT)[0]
    (row,) = points(tiny_report(), setting="budget=0.1", batch_size=4)
    for metric in ("kl", "nll", "agreement"):
        assert row[metric] == result.mean(metric)
        assert row[f"{metric}_margin"] == margin(result.group_means(metric))
    assert 0.1 / 3 < row["kl"] < 0.1 * 1.5


def test_the_means_of_the_sources_average_to_the_mean() -> None:
    loaded = load_model(str(tiny_flow().model), "cpu")
    for size in SIZES:
        groups = decode_groups(str(tiny_flow().texts), loaded.tokenizer, "test", size, LENGTH, GROUPS, seed=2)
        names = [name for _, group in groups for name in group]
        rows = [p for p in points(tiny_report(), batch_size=size) if p["method"] != "untouched"]
        assert rows
        for row in rows:
            for metric, by_source in row["by_source"].items():
                assert by_source.keys() == {"even", "odd"}
                total = sum(value * names.count(source) for source, value in by_source.items())
                assert total / len(names) == pytest.approx(row[metric], rel=1e-9, abs=1e-12)
            assert row["by_source"]["kl"][row["worst_source"]] == max(row["by_source"]["kl"].values())


def test_the_margin_is_half_of_students_interval() -> None:
    from scipy.stats import t

    values = torch.rand(9, generator=torch.Generator().manual_seed(0)).double()
    mean, error = float(values.mean()), float(values.std()) / 3
    low, high = t.interval(0.95, 8, loc=mean, scale=error)
    assert margin(values) == pytest.approx((high - low) / 2)


def test_equal_seeds_give_equal_reports(tmp_path: Path) -> None:
    again, other = (evaluate(choices(tmp_path / str(seed), batch_sizes=[2], seed=seed)) for seed in (2, 3))
    assert again["points"] == points(tiny_report(), batch_size=2)
    assert again["matched"] == [row for row in tiny_report()["matched"] if row["batch_size"] == 2]
    assert other["points"] != again["points"]


@pytest.mark.slow
def test_random_loses_more_than_xshare_on_the_reference_model(tmp_path: Path) -> None:
    """A trained model's gates say something; an uncalibrated selector is no hindrance to measuring the rules."""
    options = EvaluateOptions(
        str(reference_flow().selector),
        str(tmp_path),
        methods=["random", "xshare"],
        kept_shares=[0.25, 0.5],
        batch_sizes=[8],
        groups=3,
        length=64,
        prompt=16,
    )
    report = evaluate(options)
    assert report["sources"] == ["code", "prose"]
    for kept in ("M=8", "M=16"):
        by_chance, chosen = (points(report, method=m, setting=kept)[0] for m in ("random", "xshare"))
        assert by_chance["kl"] > 2 * chosen["kl"] > 0
        assert by_chance["nll"] > chosen["nll"]
        assert by_chance["agreement"] > chosen["agreement"]


# At equal loss.

CURVES = st.lists(st.tuples(st.floats(1e-6, 10), st.floats(1, 64), st.floats(0.01, 1)), max_size=6).map(sorted)


@example([(1e-06, 1.0, 1.0), (1.0000000000000002e-06, 1.0, 0.5)], 1e-6)  # their logarithms are equal
@given(CURVES, st.floats(1e-7, 20))
def test_a_curve_is_never_read_beyond_its_ends(curve: Curve, level: float) -> None:
    found = interpolate(curve, level)
    inside = len(curve) > 1 and curve[0][0] <= level <= curve[-1][0]
    assert (found != (None, None)) == inside
    if inside:
        for value, column in zip(found, list(zip(*curve, strict=True))[1:], strict=True):
            assert value is not None
            assert min(column) - 1e-9 <= value <= max(column) + 1e-9


MILLIONTHS = st.integers(1, 10**7).map(lambda count: count / 10**6)
DISTINCT = st.lists(st.tuples(MILLIONTHS, st.floats(1, 64), st.floats(0.01, 1)), min_size=2, unique_by=lambda p: p[0])


@given(DISTINCT.map(sorted))
def test_a_curve_goes_through_its_points(curve: Curve) -> None:
    for loss, experts, size in curve:
        assert interpolate(curve, loss) == (pytest.approx(experts), pytest.approx(size))


def test_a_curve_is_read_on_the_logarithm_of_the_loss() -> None:
    assert interpolate([(0.01, 16.0, 0.6), (1.0, 8.0, 0.2)], 0.1) == (pytest.approx(12.0), pytest.approx(0.4))


def test_methods_are_matched_at_budgets_and_at_what_the_learned_one_measured() -> None:
    report = tiny_report()
    for size in SIZES:
        rows = [row for row in report["matched"] if row["batch_size"] == size]
        measured = [p["kl"] for p in points(report, batch_size=size, method="learned") if "budget" in p["setting"]]
        assert {row["level"] for row in rows if row["metric"] == "kl"} == {*BUDGETS, *measured}
        for row in rows:
            own = [p for p in points(report, batch_size=size, method=row["method"]) if p[row["metric"]] > 0]
            losses = [p[row["metric"]] for p in own]
            within = len(own) > 1 and min(losses) <= row["level"] <= max(losses)
            assert (row["experts"] is not None) == (row["bytes"] is not None) == within
            exact = [p for p in own if p[row["metric"]] == row["level"]]
            if exact and losses.count(row["level"]) == 1:
                assert row["experts"] == pytest.approx(exact[0]["experts"])
        assert any(row["experts"] is not None for row in rows)
        assert any(row["experts"] is None for row in rows)


# The card.


def test_the_card_shows_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    """Every number in its tables is one of metrics.json or config.json, rounded."""
    folder = tmp_path / "selector"
    shutil.copytree(calibrated(), folder)
    before = contents(folder)
    report = evaluate(choices(tmp_path / "out", selector=str(folder), card=True, dtype="bfloat16"))
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} == {
        "README.md",
        "metrics.json",
        "run-evaluate.yaml",
    }
    metrics = read_metrics(folder)
    assert metrics == {**json.loads(before["metrics.json"]), "evaluate": report}
    card = after["README.md"].decode()
    assert f"split `test` (even, odd); {report['environment']['machine']}" in card
    config = json.loads(after["config.json"])
    for section, figures in (("Test", report), ("Budgets", config["calibration"]), ("Training", metrics["train"])):
        rows = [line for line in card.split(f"## {section}\n")[1].split("\n## ")[0].splitlines() if line[:1] == "|"][2:]
        assert rows
        known = set(numbers(figures))
        for row in rows:
            for word in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?%?", row):
                assert is_rounded(word, known), (section, row, word)
    test = [line for line in card.split("## Test\n")[1].splitlines() if line.startswith("| learned | budget=0.1 | 4 |")]
    (row,) = points(report, setting="budget=0.1", batch_size=4)
    assert f"| {row['experts']:.1f} | {row['bytes']:.0%} | {row['kl']:.4f} ± {row['kl_margin']:.4f} |" in test[0]


def numbers(value: Any) -> list[float]:
    """All numbers in a JSON value, keys and texts that are numbers included."""
    if isinstance(value, dict):
        return [n for pair in value.items() for part in pair for n in numbers(part)]
    if isinstance(value, list):
        return [n for part in value for n in numbers(part)]
    if isinstance(value, str):
        return [float(n) for n in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", value)]
    return [float(value)] if isinstance(value, int | float) else []


def is_rounded(word: str, known: set[float]) -> bool:
    """Whether a number as printed is the rounding of a known one; shares also as what is left of one."""
    mantissa, _, exponent = word.rstrip("%").partition("e")
    given, unit = float(word.rstrip("%")), 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    values = [100 * v for n in known for v in (n, 1 - n)] if word.endswith("%") else [abs(n) for n in known]
    return any(math.isclose(given, value, abs_tol=0.5001 * unit, rel_tol=1e-9) for value in values)


def test_without_card_the_selector_is_left_alone(tmp_path: Path) -> None:
    before = contents(calibrated())
    evaluate(choices(tmp_path, methods=["learned"], batch_sizes=[2]))
    assert contents(calibrated()) == before


# What is refused.


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 1},
        {"prompt": 0},
        {"prompt": LENGTH - 1},
        {"kept_shares": [0.5, 0.0]},
        {"kept_shares": [1.5]},
        {"batch_sizes": []},
        {"batch_sizes": [0]},
        {"methods": []},
    ],
    ids=str,
)
def test_options_that_cannot_be_used(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError) as error:
        choices(tmp_path, **change)
    assert f"--{next(iter(change))} " in one_line(error)


def test_a_selector_without_thresholds_has_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not calibrated") as error:
        evaluate(choices(tmp_path / "out", selector=str(tiny_flow().selector), methods=["learned"]))
    one_line(error)
    assert not (tmp_path / "out").exists()


def test_another_revision_and_too_little_text_are_refused(tmp_path: Path) -> None:
    model = other_revision(tiny_flow().model, tmp_path / "model")
    with pytest.raises(SelectorError, match="was trained for"):
        evaluate(choices(tmp_path / "out", model=str(model)))
    with pytest.raises(CorpusError, match="sequences of 32 tokens"):
        evaluate(choices(tmp_path / "out", batch_sizes=[2, 512]))
    assert not (tmp_path / "out").exists()
