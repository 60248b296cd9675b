"""Evaluate: what the report holds, against figures worked out here, and what is refused."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_cases import (
    CELLS,
    LEVELS,
    METHODS_HERE,
    SCORED,
    SEED,
    TOP_K,
    choices,
    comparison,
    groups_of,
    little,
    points,
    tiny_report,
    tiny_run,
)
from flows import (
    EXPERTS,
    LENGTH,
    PROMPT,
    calibrated,
    contents,
    one_line,
    other_revision,
    reference_flow,
    save_texts,
    tiny_flow,
)

from lynx_learn.decode.simulate import compare
from lynx_learn.errors import CorpusError, OptionError, SelectorError, TraceError
from lynx_learn.measure.bound import margin
from lynx_learn.measure.evaluate import FEWEST_GROUPS, EvaluateOptions, evaluate
from lynx_learn.measure.sweeps import MOST_SETTINGS, SEED_STEP
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.loading import load_model
from lynx_learn.parts import deciding
from lynx_learn.rules.grids import METHODS, curves
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.traces.collect import CollectOptions, collect
from lynx_learn.traces.groups import Batches

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


def test_without_methods_only_the_calibrated_thresholds_are_measured(tmp_path: Path) -> None:
    calibrated, swept = (evaluate(little(tmp_path / str(len(m)), methods=m)) for m in ([], ["learned"]))
    names = [(p["method"], p["setting"]) for p in points(calibrated)]
    assert names[0] == ("untouched", "")
    assert len(names) > 1
    assert all(method == "learned" and setting.startswith("budget=") for method, setting in names[1:])
    assert points(calibrated) == [p for p in points(swept) if (p["method"], p["setting"]) in names]


def test_without_methods_and_thresholds_there_is_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="has no thresholds: run `lynx-learn calibrate`") as error:
        evaluate(little(tmp_path / "out", selector=str(tiny_flow().selector), methods=[]))
    one_line(error)
    assert not (tmp_path / "out").exists()


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
