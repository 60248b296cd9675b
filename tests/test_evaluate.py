"""Evaluate: what the report holds, against figures worked out here, how a run goes on, and what goes into the card."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import (
    EXPERTS,
    LENGTH,
    PROMPT,
    SIZES,
    calibrated,
    contents,
    one_line,
    other_revision,
    reference_flow,
    save_texts,
    tiny_flow,
)
from shared import SHARED

from lynx_learn.decode.simulate import Comparison, compare
from lynx_learn.errors import CorpusError, OptionError, SelectorError, TraceError
from lynx_learn.measure.bound import margin
from lynx_learn.measure.equal_loss import interpolate
from lynx_learn.measure.evaluate import FEWEST_GROUPS, EvaluateOptions, evaluate
from lynx_learn.measure.sweeps import MOST_SETTINGS, SEED_STEP
from lynx_learn.moe.decision import Policy
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.loading import load_model
from lynx_learn.parts import deciding
from lynx_learn.rules.grids import METHODS, curves
from lynx_learn.selector.saving import read_metrics
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.show.tables import evaluation_table, matched_table, ratios_table, show
from lynx_learn.traces.collect import CollectOptions, collect
from lynx_learn.traces.groups import Batches, decode_groups

TOP_K, SEED = 2, 2
SCORED = LENGTH - PROMPT - 1
LEVELS = [0.03, 0.1]
METHODS_HERE = ["learned", "xshare", "random", "gate_sq"]
CELLS: list[tuple[int, Batches]] = [(2, "mixed"), (4, "mixed"), (4, "single")]


def choices(out: Path, **changes: Any) -> EvaluateOptions:
    options = EvaluateOptions(
        str(calibrated()),
        str(out),
        corpus=str(tiny_flow().texts),
        methods=METHODS_HERE,
        batch_sizes=SIZES,
        batches=["single:4", "mixed"],
        tokens=1,
        levels=LEVELS,
        length=LENGTH,
        prompt=PROMPT,
        mode="teacher",
    )
    return replace(options, **changes)


def little(out: Path, **changes: Any) -> EvaluateOptions:
    """Options for a run that is about something else."""
    return choices(out, **{"methods": ["xshare"], "batch_sizes": [2], "batches": ["mixed"], **changes})


@cache
def tiny_run() -> tuple[dict[str, Any], Path]:
    """A report on CELLS, and its folder; nobody may write to it."""
    out = SHARED.folder("evaluated", lambda folder: evaluate(choices(folder)))
    return json.loads((out / "report.json").read_text()), out


def tiny_report() -> dict[str, Any]:
    return tiny_run()[0]


def points(report: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [p for p in report["points"] if all(p[key] == value for key, value in wanted.items())]


def groups_of(
    size: int, batches: Batches = "mixed", count: int = FEWEST_GROUPS
) -> list[tuple[torch.Tensor, list[str]]]:
    tokenizer = load_model(str(tiny_flow().model), "cpu").tokenizer
    return decode_groups(str(tiny_flow().texts), tokenizer, "test", size, LENGTH, count, SEED, batches=batches)


def comparison(size: int, batches: Batches, policy: Policy) -> Comparison:
    loaded = load_model(str(tiny_flow().model), "cpu")
    (result,) = compare(loaded.model, find_moe_layers(loaded.model), groups_of(size, batches), [policy], PROMPT)
    return result


# The report.


def test_the_report_is_what_is_written(tmp_path: Path) -> None:
    options = little(tmp_path / "deep" / "out", tokens=400)
    report = evaluate(options)
    groups = [f"groups/2-mixed/{index:05d}.json" for index in range(-(-400 // (2 * SCORED)))]
    assert list(contents(tmp_path / "deep" / "out")) == sorted(
        ["frontier.png", "frontier.svg", "options.json", "report.json", *groups]
    )
    assert json.loads((tmp_path / "deep" / "out" / "report.json").read_text()) == report
    assert report["options"] == deciding(options)
    assert report["base_model"] == str(tiny_flow().model)
    assert report["sources"] == ["even", "odd"]
    assert report["environment"]["torch"] == torch.__version__
    assert {p["groups"] for p in report["points"]} == {len(groups)} == {9}
    assert {p["tokens"] for p in report["points"]} == {9 * 2 * SCORED}


def test_cells_are_batch_sizes_with_mixed_and_single_batches() -> None:
    def cells(**changes: Any) -> list[tuple[int, Batches]]:
        return choices(Path("out"), **changes).cells

    assert cells() == CELLS
    assert cells(batches=["mixed"]) == [(2, "mixed"), (4, "mixed")]
    assert cells(batch_sizes=[4, 2, 4], batches=["single", "single:2"]) == [(2, "single"), (4, "single")]
    assert [
        tuple(p[key] for key in ("batch_size", "batches")) for p in points(tiny_report(), method="untouched")
    ] == CELLS


def test_every_method_is_there_with_a_part_of_each_sweep() -> None:
    """In the table's order, and from gentle to harsh; the budgets are always there."""
    selector = LynxSelector.from_pretrained(calibrated())
    layers = find_moe_layers(load_model(str(tiny_flow().model), "cpu").model)
    for size, batches in CELLS:
        found = [
            (p["method"], p["curve"], p["setting"]) for p in points(tiny_report(), batch_size=size, batches=batches)
        ]
        assert found[0] == ("untouched", 0, "")
        assert found[-2:] == [("learned", 0, "budget=0.02"), ("learned", 0, "budget=0.1")]
        expected = []
        for method in (name for name in METHODS if name in METHODS_HERE):
            for number, curve in enumerate(curves(method, layers, size, None, selector)):
                settings = [policy.setting for policy in curve]
                own = [setting for m, n, setting in found[1:-2] if (m, n) == (method, number)]
                assert 1 <= len(own) <= MOST_SETTINGS
                expected += [(method, number, setting) for setting in settings if setting in own]
        assert found[1:-2] == expected


def test_settings_lie_around_the_levels() -> None:
    for size, batches in CELLS:
        kl = [p["kl"] for p in points(tiny_report(), batch_size=size, batches=batches, method="learned")[:-2]]
        assert min(kl) < LEVELS[0] < LEVELS[1] < 1.1 * max(kl)
        assert len(kl) > 2


def test_the_untouched_row_loses_nothing_and_reads_everything() -> None:
    for size, batches in CELLS:
        (row,) = points(tiny_report(), method="untouched", batch_size=size, batches=batches)
        losses = ("kl", "nll", "agreement", "kl_margin", "nll_margin", "agreement_margin")
        assert [row[key] for key in losses] == [0.0] * 6
        assert (row["bytes"], row["answered"]) == (1.0, 0.0)
        assert TOP_K < row["experts"] == row["experts_before"] <= min(EXPERTS, TOP_K * size)
        assert row["experts"] == pytest.approx(mean_experts(size, batches))
        assert row["tokens"] == FEWEST_GROUPS * size * SCORED


@torch.no_grad()
def mean_experts(size: int, batches: Batches) -> float:
    """Distinct experts of a layer that a position of a group needs, from the routers' outputs alone."""
    model = load_model(str(tiny_flow().model), "cpu").model
    counts: list[int] = []

    def count(module: torch.nn.Module, args: Any, output: Any) -> None:
        indices = output[2].view(size, LENGTH, TOP_K)[:, PROMPT:]
        counts.extend(len(indices[:, position].unique()) for position in range(LENGTH - PROMPT))

    for layer in find_moe_layers(model):
        layer.router.register_forward_hook(count)
    for tokens, _ in groups_of(size, batches):
        model(input_ids=tokens)
    return sum(counts) / len(counts)


def test_fewer_experts_lose_more() -> None:
    for method in ("xshare", "learned"):
        rows = sorted(points(tiny_report(), method=method, batch_size=4, batches="mixed"), key=lambda p: p["kl"])
        assert len(rows) > 2
        assert [row["experts"] for row in rows] == sorted((row["experts"] for row in rows), reverse=True)


def test_bytes_are_those_of_experts_and_surrogates() -> None:
    for row in tiny_report()["points"]:
        (untouched,) = points(tiny_report(), method="untouched", **{k: row[k] for k in ("batch_size", "batches")})
        if row["method"] == "learned":
            assert row["answered"] > 0
            assert row["bytes"] > row["experts"] / untouched["experts"]
        else:
            assert row["answered"] == 0
            assert row["bytes"] == pytest.approx(row["experts"] / untouched["experts"])


@pytest.mark.parametrize(("size", "batches"), CELLS)
def test_a_point_is_what_a_comparison_measures(size: int, batches: Batches) -> None:
    selector = LynxSelector.from_pretrained(calibrated())
    layers = find_moe_layers(load_model(str(tiny_flow().model), "cpu").model)
    gentlest = points(tiny_report(), method="xshare", batch_size=size, batches=batches)[0]["setting"]
    (xshare,) = (p for p in curves("xshare", layers, size, None, selector)[0] if p.setting == gentlest)
    for policy in (selector.policy(0.1), xshare):
        result = comparison(size, batches, policy)
        wanted = {"method": policy.name, "setting": policy.setting, "batch_size": size, "batches": batches}
        (row,) = points(tiny_report(), **wanted)
        close = partial(pytest.approx, rel=1e-4, abs=1e-6)  # passes that are shared otherwise round otherwise
        for metric in ("kl", "nll", "agreement"):
            assert row[metric] == close(result.mean(metric))
            assert row[f"{metric}_margin"] == close(margin(result.group_means(metric)))
            assert row["by_source"][metric] == close(result.by_source(metric))
        stats = result.mean_stats()
        assert {key: row[key] for key in stats if key != "bytes"} == {k: v for k, v in stats.items() if k != "bytes"}
        (untouched,) = points(tiny_report(), method="untouched", batch_size=size, batches=batches)
        ratio = stats["bytes"] * stats["experts_before"] / untouched["experts"]
        assert row["bytes"] == pytest.approx(ratio, rel=0.02)  # there a mean of ratios
    assert 0.1 / 3 < row["kl"] < 0.3 or policy is xshare


def test_single_batches_have_one_source_and_mixed_ones_have_more() -> None:
    out = tiny_run()[1]
    for size, batches in CELLS:
        kinds = {len(set(names)) for _, names in groups_of(size, batches)}
        assert kinds == ({1} if batches == "single" else {2})
        assert len(list((out / "groups" / f"{size}-{batches}").iterdir())) == FEWEST_GROUPS
    mixed, single = (
        points(tiny_report(), setting="budget=0.1", batch_size=4, batches=b)[0] for b in ("mixed", "single")
    )
    assert mixed["kl"] != single["kl"]
    assert mixed["by_source"]["kl"].keys() == single["by_source"]["kl"].keys() == {"even", "odd"}


def test_a_random_rule_draws_anew_in_every_group() -> None:
    row = points(tiny_report(), method="random", batch_size=4, batches="mixed")[0]
    selector = LynxSelector.from_pretrained(calibrated())
    loaded = load_model(str(tiny_flow().model), "cpu")
    layers = find_moe_layers(loaded.model)
    means = []
    for index, group in enumerate(groups_of(4)):
        (curve,) = curves("random", layers, 4, None, selector, SEED + SEED_STEP * index)
        policy = next(p for p in curve if p.setting == row["setting"])
        means.append(compare(loaded.model, layers, [group], [policy], PROMPT)[0].mean("kl"))
    assert row["kl"] == pytest.approx(sum(means) / len(means))


def test_the_means_of_the_sources_average_to_the_mean() -> None:
    for size, batches in CELLS:
        names = [name for _, group in groups_of(size, batches) for name in group]
        rows = [p for p in points(tiny_report(), batch_size=size, batches=batches) if p["method"] != "untouched"]
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


def test_a_selector_without_thresholds_is_measured_at_others(tmp_path: Path) -> None:
    report = evaluate(little(tmp_path / "out", selector=str(tiny_flow().selector), methods=["learned"]))
    settings = [p["setting"] for p in points(report, method="learned")]
    assert len(settings) > 2
    assert all(setting.startswith("tau=") for setting in settings)


@pytest.mark.slow
def test_random_loses_more_than_xshare_on_the_reference_model(tmp_path: Path) -> None:
    """A trained model's gates say something; an uncalibrated selector is no hindrance to measuring the rules."""
    options = EvaluateOptions(
        str(reference_flow().selector),
        str(tmp_path),
        mix={"code": 1.0},  # there are few documents of the other source
        methods=["random", "xshare"],
        batch_sizes=[4],
        tokens=1,
        levels=[0.05, 0.1],
        length=48,
        prompt=16,
    )
    report = evaluate(options)
    assert report["sources"] == ["code"]
    for level in (0.05, 0.1):
        found = {r["method"]: r["bytes"] for r in report["matched"] if (r["metric"], r["level"]) == ("kl", level)}
        assert found["xshare"] < 0.9
        assert found["random"] is None or found["random"] > found["xshare"] + 0.1


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


def test_tables_show_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure, in 80 columns; a cell that is folded goes on in the lines below."""
    report = tiny_report()

    def printed(part: object) -> tuple[str, list[str]]:
        capsys.readouterr()
        show(part)
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert not [line for line in lines if len(line) > 80]
        return "\n".join(lines), " ".join(lines).split()

    page, words = printed(evaluation_table(report))
    for point in report["points"]:
        row = f"{point['method']}.* {point['batch_size']}( single)? +{point['experts']:.1f} +{point['bytes']:.0%} +{point['kl']:.4f}"
        assert re.search(rf"^{row}", page, re.MULTILINE), row
        assert set(point["setting"].split()) <= set(words)
        assert {f"±{point['kl_margin']:.4f}", f"{point['nll']:+.4f}", f"±{point['nll_margin']:.4f}"} <= set(words)
    page, _ = printed(matched_table(report))
    for method, batch in {(row["method"], f"{row['batch_size']}") for row in report["matched"]}:
        of_it = [row for row in report["matched"] if (row["method"], f"{row['batch_size']}") == (method, batch)]
        for row in (row for row in of_it if row["bytes"] is not None):
            cell = f"{row['bytes']:.0%}/{row['experts']:.1f}"
            assert re.search(rf"^{method} +{batch}.* {cell}( |$)", page, re.MULTILINE), cell
    _, words = printed(ratios_table(report))
    for row in report["ratios"]:
        ratio = row["bytes_to_best_rule"]
        if ratio and ratio["low"]:
            assert f"{ratio['ratio']:.3f}" in words
            assert f"({ratio['low']:.3f}–{ratio['high']:.3f})" in words


# Going on.


def test_equal_seeds_give_equal_reports(tmp_path: Path) -> None:
    again, other = (
        evaluate(choices(tmp_path / str(seed), batch_sizes=[2], batches=["mixed"], seed=seed)) for seed in (SEED, 3)
    )
    assert again["points"] == points(tiny_report(), batch_size=2)
    assert again["matched"] == [row for row in tiny_report()["matched"] if row["batch_size"] == 2]
    assert again["ratios"] == [row for row in tiny_report()["ratios"] if row["batch_size"] == 2]
    assert other["points"] != again["points"]


# Begins a program that is killed as soon as a file is in its place.
KILLED_AT = """
import os, signal
replace = os.replace
def stop(source, target, **more):
    replace(source, target, **more)
    if str(target).endswith("{last}"):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = stop
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """And ends with the same bytes in every file as one that was not killed."""
    out = tmp_path / "out"
    options = choices(out, batch_sizes=[2], batches=["mixed", "single"], methods=["random", "gate_sq"], tokens=700)
    evaluate(options)
    expected = contents(out)
    shutil.rmtree(out)
    program = KILLED_AT.format(last="2-single/00002.json") + (
        f"from lynx_learn.measure.evaluate import *\nevaluate(EvaluateOptions(**{asdict(options)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "report.json").exists()
    finished = {file: file.stat().st_mtime_ns for file in (out / "groups").rglob("[0-9]*.json")}
    assert 3 <= len(finished) < 2 * 16
    evaluate(options)
    assert contents(out) == expected
    assert {file: file.stat().st_mtime_ns for file in finished} == finished


def test_a_finished_run_is_not_repeated_and_a_damaged_group_is(tmp_path: Path) -> None:
    report = evaluate(little(tmp_path))
    before, group = contents(tmp_path), tmp_path / "groups" / "2-mixed" / "00003.json"
    first = group.stat().st_mtime_ns
    group.write_bytes(group.read_bytes()[:-7])
    others = {file: file.stat().st_mtime_ns for file in group.parent.iterdir() if file != group}
    assert evaluate(little(tmp_path)) == report
    assert contents(tmp_path) == before
    assert group.stat().st_mtime_ns > first
    assert {file: file.stat().st_mtime_ns for file in others} == others


def test_another_run_in_the_same_folder_is_refused_by_name(tmp_path: Path) -> None:
    out, selector, texts = (tmp_path / name for name in ("out", "selector", "texts"))
    shutil.copytree(calibrated(), selector)
    shutil.copytree(tiny_flow().texts, texts)
    evaluate(little(out, corpus=str(texts)))
    before = contents(out)
    for changes, named in (
        ({"seed": 9, "levels": [0.2]}, "seed, levels, text_sha256 "),
        ({"tokens": 800}, "tokens, text_sha256 "),
        ({"methods": ["gate_sq"]}, "methods "),
        ({"corpus": str(tiny_flow().texts)}, "corpus "),
        ({"selector": str(selector)}, "selector "),
    ):
        with pytest.raises(OptionError, match="holds an evaluation with other") as error:
            evaluate(little(out, **{"corpus": str(texts), **changes}))
        assert f"other {named}" in one_line(error)
    lines = (texts / "odd.jsonl").read_text().splitlines(keepends=True)
    (texts / "odd.jsonl").write_text("".join(line.replace("router", "batch") for line in lines))
    with pytest.raises(OptionError, match="other text_sha256 "):
        evaluate(little(out, corpus=str(texts)))
    (texts / "odd.jsonl").write_text("".join(lines))
    options = json.loads(before["options.json"])
    options["versions"]["torch"] = "1.0"
    (out / "options.json").write_text(json.dumps(options))
    with pytest.raises(OptionError, match="other versions "):
        evaluate(little(out, corpus=str(texts)))
    (out / "options.json").write_text("{")
    with pytest.raises(OptionError, match="other model, corpus, mix"):
        evaluate(little(out, corpus=str(texts)))
    assert {k: v for k, v in contents(out).items() if k != "options.json"} == {
        k: v for k, v in before.items() if k != "options.json"
    }


def test_a_selector_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    selector = tmp_path / "selector"
    shutil.copytree(calibrated(), selector)
    options = little(tmp_path / "out", selector=str(selector))
    report = evaluate(options)
    assert evaluate(replace(options, card=True))["points"] == report["points"]  # a new card is no other selector
    changed = LynxSelector.from_pretrained(selector)
    changed.with_config(thresholds={"kl": {"0.1": {"2": 0.5}}}).save_pretrained(selector)
    with pytest.raises(OptionError, match="other selector_sha256 "):
        evaluate(options)


@pytest.mark.parametrize("name", ["out", "out/file.txt"])
def test_folders_that_are_in_use(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(OptionError, match="choose another") as error:
        evaluate(little(tmp_path / "out"))
    assert str(tmp_path / "out") in one_line(error)
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.slow
def test_several_workers_give_the_same_report(tmp_path: Path) -> None:
    options = choices(tmp_path / "out", batch_sizes=[4], workers=2)
    report = evaluate(options)
    expected = [p for p in tiny_report()["points"] if p["batch_size"] == 4]
    assert [p["setting"] for p in report["points"]] == [p["setting"] for p in expected]
    for found, wanted in zip(report["points"], expected, strict=True):
        for key in ("kl", "nll", "experts", "bytes", "kl_margin"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-6)
        assert (
            found["by_source"]
            == {metric: pytest.approx(values, rel=1e-4, abs=1e-6) for metric, values in wanted["by_source"].items()}
            if "by_source" in wanted
            else True
        )
    alone = evaluate(replace(options, workers=1))  # what is there is gone on with
    assert alone["points"] == report["points"]


# The card.


def test_the_card_shows_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    """Every number in its tables is one of metrics.json or config.json, rounded."""
    folder = tmp_path / "selector"
    shutil.copytree(calibrated(), folder)
    before = contents(folder)
    report = evaluate(choices(tmp_path / "out", selector=str(folder), methods=["xshare", "learned"], card=True))
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} == {
        "README.md",
        "metrics.json",
        "run-evaluate.yaml",
    }
    metrics = read_metrics(folder)
    assert {p["method"] for p in report["points"]} == {"untouched", "xshare", "learned"}
    own = {**report, "points": [p for p in report["points"] if p["method"] != "xshare"]}
    assert metrics == {**json.loads(before["metrics.json"]), "evaluate": own}
    card = after["README.md"].decode()
    assert f"split `test` (even, odd); {report['environment']['machine']}" in card
    config = json.loads(after["config.json"])
    for section, figures in (
        ("Test", report),
        ("Budgets", [config["calibration"], metrics["calibrate"]]),
        ("Training", metrics["train"]),
    ):
        rows = [line for line in card.split(f"## {section}\n")[1].split("\n## ")[0].splitlines() if line[:1] == "|"][2:]
        assert rows
        known = set(numbers(figures))
        for row in rows:
            for word in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?%?", row):
                assert is_rounded(word, known), (section, row, word)
    test = [line for line in card.split("## Test\n")[1].splitlines() if line.startswith("| learned budget=0.1 | 4 |")]
    (row,) = points(report, setting="budget=0.1", batch_size=4, batches="mixed")
    assert f"| {row['experts']:.1f} | {row['bytes']:.0%} | {row['kl']:.4f} ±{row['kl_margin']:.4f} |" in test[0]


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
    evaluate(little(tmp_path, methods=["learned"], dtype="bfloat16"))
    assert contents(calibrated()) == before


def test_the_card_holds_what_was_trained_whatever_the_model_ran_in(tmp_path: Path) -> None:
    selector = tmp_path / "selector"
    shutil.copytree(calibrated(), selector)
    weights = (selector / "selector.safetensors").read_bytes()
    evaluate(little(tmp_path / "out", selector=str(selector), methods=["learned"], dtype="bfloat16", card=True))
    assert (selector / "selector.safetensors").read_bytes() == weights


# What is refused.


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0},
        {"workers": 0},
        {"levels": []},
        {"levels": [0.01, 0.0]},
        {"levels": [math.inf]},
        {"prompt": 0},
        {"prompt": LENGTH - 1},
        {"batch_sizes": []},
        {"batch_sizes": [0]},
        {"batches": []},
        {"batches": ["both"]},
        {"batches": ["single:3"]},
        {"batches": ["mixed:"]},
        {"methods": []},
        {"methods": ["xshare", "magic"]},
    ],
    ids=str,
)
def test_options_that_cannot_be_used(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError) as error:
        choices(tmp_path, **change)
    assert f"--{next(iter(change))} " in one_line(error)


def test_rules_that_need_a_trace_are_refused_without_one(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"siftmoe.* --trace") as error:
        evaluate(little(tmp_path / "out", methods=["xshare", "siftmoe"]))
    one_line(error)
    assert not (tmp_path / "out").exists()
    report = evaluate(little(tmp_path / "out", methods=["siftmoe"], trace=str(tiny_flow().trace)))
    assert len(points(report, method="siftmoe")) > 1
    assert json.loads((tmp_path / "out" / "options.json").read_text())["trace_sha256"]


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    model, trace = other_revision(tiny_flow().model, tmp_path / "model"), tmp_path / "trace"
    collect(CollectOptions(str(model), str(trace), str(tiny_flow().texts), tokens=640, length=LENGTH))
    with pytest.raises(TraceError, match="was collected from") as error:
        evaluate(little(tmp_path / "out", trace=str(trace)))
    one_line(error)
    assert not (tmp_path / "out").exists()


def test_another_revision_and_too_little_text_are_refused(tmp_path: Path) -> None:
    model = other_revision(tiny_flow().model, tmp_path / "model")
    with pytest.raises(SelectorError, match="was trained for"):
        evaluate(choices(tmp_path / "out", model=str(model)))
    with pytest.raises(CorpusError, match="sequences of 32 tokens"):
        evaluate(choices(tmp_path / "out", batch_sizes=[4, 512]))
    assert not (tmp_path / "out").exists()


def test_text_for_fewer_tokens_than_asked_for_is_used_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = save_texts(tmp_path / "texts", documents=90)
    report = evaluate(little(tmp_path / "out", corpus=str(texts), tokens=10**6, split="all"))
    tokens = report["points"][0]["tokens"]
    assert FEWEST_GROUPS * 2 * SCORED < tokens < 10**6
    assert f"holds {tokens:,} of the 1,000,000 tokens asked for in batches of 2" in capsys.readouterr().out
