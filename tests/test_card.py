"""The model card, rendered from figures that the commands measured on the tiny model."""

import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from flows import LENGTH, PROMPT, tiny_flow
from shared import SHARED

from lynx_learn.measure.calibrate import CalibrateOptions, calibrate
from lynx_learn.measure.coverage import CoverageOptions, coverage
from lynx_learn.measure.evaluate import EvaluateOptions, evaluate
from lynx_learn.selector.saving import read_metrics
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.show.card import render
from lynx_learn.show.floor import floor_lines
from lynx_learn.show.tables import Table

SIZE, BUDGET = 2, 0.1
TEXT: dict[str, Any] = {"length": LENGTH, "prompt": PROMPT, "batch_sizes": [SIZE]}


@cache
def measured() -> Path:
    """A selector with thresholds, coverage under a shift, and a test on text of another source; nobody may write to it."""
    return SHARED.folder("carded", measure) / "selector"


def measure(folder: Path) -> None:
    selector, texts = folder / "selector", str(tiny_flow().texts)
    shutil.copytree(tiny_flow().selector, selector)
    calibrate(CalibrateOptions(str(selector), corpus=texts, budgets=[BUDGET, 1e-9], groups=12, **TEXT))
    few: dict[str, Any] = {"groups": 24, "calibration_groups": 12, "resplits": 20, "bootstraps": 20}
    shift = {"calibrate": ["even"], "test": ["odd"]}
    options = CoverageOptions(
        str(selector), str(folder / "c"), corpus=texts, budgets=[BUDGET], shift=shift, **few, **TEXT
    )
    coverage(replace(options, card=True))
    strange = folder / "strange.jsonl"
    shutil.copyfile(tiny_flow().texts / "odd.jsonl", strange)
    text = {"corpus": str(strange), "tokens": 400, **TEXT}
    evaluate(EvaluateOptions(str(selector), str(folder / "e"), methods=["learned"], card=True, **text))


def parts() -> tuple[LynxSelector, dict[str, Any]]:
    """The selector and its figures, to change."""
    metrics: dict[str, Any] = read_metrics(measured())
    return LynxSelector.from_pretrained(measured()), metrics


def rendered() -> str:
    selector, metrics = parts()
    return render(asdict(selector.config), metrics)


def section(card: str, name: str) -> str:
    return card.split(f"## {name}\n")[1].split("\n## ")[0]


# Begins what the section on coverage says of every guarantee.
PROMISES = "Calibrated on so many groups"


def table(text: str) -> list[list[str]]:
    """The cells of a section's table, its head first."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| --- ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def with_coverage(change: Callable[[dict[str, Any]], None]) -> str:
    """The section on coverage after its report was changed."""
    selector, metrics = parts()
    change(metrics["coverage"])
    return section(render(asdict(selector.config), metrics), "Coverage")


# What the budget is certified for.


def test_the_card_is_what_is_rendered() -> None:
    assert (measured() / "README.md").read_text() == rendered()


def test_the_shipped_card_is_what_is_rendered() -> None:
    folder = Path(__file__).parents[1] / "selectors" / "reference-moe"
    config = asdict(LynxSelector.from_pretrained(folder).config)
    assert (folder / "README.md").read_text() == render(config, read_metrics(folder))


def test_the_budgets_are_said_to_be_certified_for_this_text_alone() -> None:
    selector, metrics = parts()
    card = render(asdict(selector.config), metrics)
    sources = selector.config.calibration["kl"]["sources"]
    like = ", ".join(f"{name} {100 * sources[name]:.0f}%" for name in ("even", "odd"))
    text = f"what the model itself writes up to its end-of-text token, sampled at temperature 1, top-p 1, after prompts like those of `{tiny_flow().texts}` ({like}): "
    text += f"{PROMPT} tokens of prompt and {LENGTH - PROMPT} of decode, in float32 on cpu"
    assert f"text: {text}; guarantee `cell`" in section(card, "Budgets")
    limits = section(card, "Limits")
    assert f"1. **What holds.** For {text}, decoded in batches of exactly a size" in limits
    assert "at most the budget, over the whole decode and over its last quarter.\n" in limits
    assert "each draw their prompts and samples anew, at most 5% take a threshold" in limits
    assert "for each budget and batch size on its own, not for all of them at once" in limits
    assert "one request, one source, one stretch of text" in limits
    assert limits.count("\n3. ") == 1
    assert "earlier procedure" not in limits


def test_thresholds_of_an_earlier_procedure_are_told() -> None:
    """Which did not look at the last quarter."""
    selector, metrics = parts()
    cell = metrics["calibrate"]["kl"]["cells"][str(BUDGET)][str(SIZE)]
    for more, earlier in (({"by_part": [0.1] * 4}, False), ({}, True)):
        cell.pop("by_part", None)
        cell |= {"threshold": 0.5, "experts": 1.0, "experts_before": 2.0, "bytes": 0.5, **more}
        limits = section(render(asdict(selector.config), metrics), "Limits")
        assert ("earlier procedure" in limits) is earlier
        assert ("its last quarter" in limits) is not earlier


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mode": "teacher"}, "For text like that of"),
        ({"mode": "teacher"}, "each draw their documents anew"),
        ({"mode": "skipping"}, "what the skipping model itself writes up to its end"),
        ({"temperature": 0.0, "ignore_eos": True}, "writes, sampled greedily, after"),
        ({"guarantee": "all"}, "all budgets and batch sizes at once"),
        ({"guarantee": "sizes"}, "counted for all batch sizes of a budget at once"),
        ({"guarantee": "worst-source"}, "for every source as well as for all of them.\n"),
        ({"guarantee": "worst-source"}, "says nothing of one request, one stretch of text"),
    ],
    ids=str,
)
def test_what_is_promised_follows_the_calibration(change: dict[str, Any], said: str) -> None:
    selector, metrics = parts()
    how = deepcopy(selector.config.calibration)
    how["kl"] |= change
    assert said in section(render(asdict(selector.with_config(calibration=how).config), metrics), "Limits")


def test_the_noise_floor_and_the_real_decode_stand_below_the_budgets() -> None:
    _, metrics = parts()
    text = section(rendered(), "Budgets")
    lines = floor_lines(metrics["calibrate"]["kl"])
    assert text.rstrip().endswith(" ".join(lines))
    assert "The smallest budget, 1e-09, is below the noise floor" in text


def test_the_source_with_the_highest_loss_is_named_for_each_budget() -> None:
    """Over all batch sizes; a budget that nothing was certified for has none."""
    selector, metrics = parts()
    how = metrics["calibrate"]
    cells = how["kl"]["cells"][str(BUDGET)]
    cells[str(SIZE)]["by_source"] = {"even": 0.01, "odd": 0.02}
    cells["4"] = {**cells[str(SIZE)], "by_source": {"even": 0.912, "odd": 0.0123}}
    lines = [line for line in _budgets(selector, how).splitlines() if line.startswith("- budget")]
    assert lines == [f"- budget {BUDGET}: highest by source at batch 4: even 0.9120"]
    del cells["4"]
    own = cells[str(SIZE)]["by_source"]
    worst = max(own, key=own.__getitem__)
    assert f"- budget {BUDGET}: highest by source at batch {SIZE}: {worst} {own[worst]:.4f}\n" in _budgets(
        selector, how
    )


def _budgets(selector: LynxSelector, how: dict[str, Any]) -> str:
    return section(render(asdict(selector.config), {"calibrate": how}), "Budgets")


def test_a_selector_without_figures() -> None:
    selector, _ = parts()
    card = render(asdict(selector.with_config(calibration={}).config), {})
    assert "Not calibrated yet" in card
    assert not re.search("## (Coverage|Test|Training)", card)


# Coverage.


def test_coverage_shows_the_figures_that_were_measured() -> None:
    _, metrics = parts()
    report = metrics["coverage"]
    text = section(rendered(), "Coverage")
    text, _, promises = text.partition(PROMISES)
    head, *rows = table(text)
    assert [row[:2] for row in rows] == [["0.1", "2"], ["0.1, shifted", "2"], ["exact", ""]]
    for line, row in zip(rows[:-1], report["rows"], strict=True):
        found = dict(zip(head, line, strict=True))
        assert found["test over"] == f"{row['test_over']:.1%}"
        assert found["pool over"] == f"{row['pool_over']:.1%}"
        low, high = row["true_over_interval"]
        assert found["true mean over"] == f"{row['true_over']:.1%} {100 * low:.1f}–{high:.1%}"
        assert found["bound misses"].startswith(f"{row['bound_misses']:.1%} ")
        assert found["none"] == f"{row['nothing']:.1%}"
        assert found["test"] == f"{row['test_share']:.2f}"
        assert found["bound"] == f"{row['upper_share']:.2f}"
        assert found["bytes"] == f"{row['bytes']:.0%}"
    exact = report["exact"]
    assert f"{exact['test_over']:.1%} and {exact['pool_over']:.1%} of the splits" in text
    _, *rows = table(promises)
    assert [row[:2] for row in rows] == [[row["guarantee"], str(row["groups"])] for row in report["guarantees"]]
    assert "20 random splits of 24 groups per batch size: 12 to calibrate" in text
    assert "20 independent draws" in text
    assert "of both 5.0% is allowed." in text
    assert "split `calibrate`, `test` (even 5" in text


def test_a_shift_that_costs_more_than_the_budget_is_said_to() -> None:
    def worse(report: dict[str, Any]) -> None:
        shifted = next(row for row in report["rows"] if row["shift"])
        shifted.update(test_share=1.234, test_over=0.87)
        report["rows"].append({**shifted, "batch_size": 8, "test_share": 1.5, "test_over": 1.0})

    text = with_coverage(worse)
    assert "Calibrated on even and tested on odd, the guarantee does not hold." in text
    assert "Over its budget in 100% of the splits, and 1.50 times it on average, at batch 8, budget 0.1." in text
    assert "Calibrated on draws from 16 groups, tested on 8 others." in text


def test_a_shift_that_costs_less_is_still_not_guaranteed() -> None:
    def better(report: dict[str, Any]) -> None:
        next(row for row in report["rows"] if row["shift"]).update(test_share=0.876, test_over=0.0)

    text = with_coverage(better)
    assert "the guarantee does not hold." in text
    assert "By measurement the loss stayed within the budget there, at most 0.88 of it (at batch 2, budget 0.1)" in text
    assert "though nothing guarantees it" in text


def test_where_nothing_was_certified() -> None:
    def nothing(report: dict[str, Any]) -> None:
        for row in report["rows"]:
            row.update(test_share=None, upper_share=None, bytes=None, nothing=1.0, test_over=0.0)

    text = with_coverage(nothing)
    assert "the guarantee does not hold.** Nothing was certified there" in text
    assert all(row[-3:] == ["–", "–", "–"] for row in table(text.partition(PROMISES)[0])[1:-1])


def test_without_a_shift_there_is_no_word_of_one() -> None:
    def plain(report: dict[str, Any]) -> None:
        report["options"]["shift"] = None
        report["rows"] = [row for row in report["rows"] if not row["shift"]]

    text, _, _ = with_coverage(plain).partition(PROMISES)
    assert "guarantee" not in text
    assert len(table(text)) == 3


# The test text.


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        (["strange"], "None of these sources was in the calibration text; the certificate does not cover them."),
        (
            ["even", "strange", "weird"],
            "Not in the calibration text, and not covered by the certificate: strange, weird.",
        ),
        (["even", "odd"], None),
    ],
    ids=str,
)
def test_sources_that_the_calibration_had_not(sources: list[str], said: str | None) -> None:
    selector, metrics = parts()
    assert metrics["evaluate"]["sources"] == ["strange"]
    metrics["evaluate"]["sources"] = sources
    text = section(render(asdict(selector.config), metrics), "Test")
    if said is None:
        assert "cover" not in text
    else:
        assert text.rstrip().endswith(said)


def test_batches_of_one_source_are_told_from_mixed_ones() -> None:
    selector, metrics = parts()
    points = metrics["evaluate"]["points"]
    own = next(p for p in points if p["setting"] == f"budget={BUDGET}")
    metrics["evaluate"]["points"] = [{**own, "batches": "mixed"}, {**own, "batches": "single"}]
    rows = table(section(render(asdict(selector.config), metrics), "Test"))[1:]
    assert [row[1] for row in rows] == ["2", "2 single"]


@pytest.mark.parametrize(
    "name", ["runs/moe #2", "runs/moe: second", "- a", "yes", "a'b\"c", "näme", "/home/ann/" + "x" * 200]
)
def test_the_front_matter_holds_any_path(name: str) -> None:
    from huggingface_hub import ModelCard

    config = {**asdict(parts()[0].config), "base_model": name}
    assert ModelCard(render(config, {})).data.to_dict() == {
        "library_name": "lynx-learn",
        "base_model": name,
        "tags": ["mixture-of-experts", "inference"],
    }


def test_a_name_with_a_bar_breaks_no_table() -> None:
    selector, metrics = parts()
    metrics["train"]["layers"][0]["name"] = "a|b"
    row = next(line for line in render(asdict(selector.config), metrics).splitlines() if "a\\|b" in line)
    assert row.startswith("| a\\|b |")


def test_names_with_line_breaks_or_backticks_stay_in_their_line() -> None:
    """A file's name may hold anything; a heading of somebody else's in a card, or a colour in a terminal, is no part of it."""
    selector, metrics = parts()
    name = "a\n\n# Certified by nobody `b`\x1b[31m"
    metrics["evaluate"]["sources"] = [name]
    metrics["evaluate"]["options"]["corpus"] = name
    metrics["train"]["layers"][0]["name"] = name
    card = render(asdict(selector.config), metrics)
    assert "\n# Certified" not in card
    assert "\x1b" not in card
    assert "`a\\n\\n# Certified by nobody 'b'\\x1b[31m`" in card
    assert "\x1b" not in str(Table("\x1b[1m", ["name"], [[name]]).markdown)
    assert Table("\x1b[1m", ["name"], [[name]]).title == "\\x1b[1m"
