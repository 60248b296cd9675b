"""Bench: the summary by hand, the command, and what cannot be timed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import save_texts
from tiny import small_shape, tiny_model

from lynx_learn.cli import main
from lynx_learn.decode import bench as bench_module
from lynx_learn.decode.bench import BenchOptions, bench, fit_line, median_interval, summary
from lynx_learn.decode.tally import Stats
from lynx_learn.decode.timing import Steps
from lynx_learn.errors import LynxError
from lynx_learn.moe.decision import Routing
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.show.speed import bench_tables


def stats(before: float, after: float) -> Stats:
    return Stats(10, [before, before], [after, after], after / before, 0.0)


def test_summary_by_hand() -> None:
    """Steps of exactly 10 + 2 T ms, deciding costs 3 ms, and one stalled turn that medians do not see."""
    steps = {
        "off": Steps([50.0, 50.0, 500.0], None),
        "on": Steps([33.0, 33.0, 33.0], stats(20, 10)),
        "deciding": Steps([53.0, 53.0, 53.0], stats(20, 20)),
        "20": Steps([50.0] * 3, stats(20, 20)),
        "10": Steps([30.0] * 3, stats(20, 10)),
        "5": Steps([20.0] * 3, stats(20, 5)),
    }
    found = summary(steps, ["5", "10", "20"])
    assert found["line"]["a_ms"] == pytest.approx(10)
    assert found["line"]["b_ms"] == pytest.approx(2)
    assert found["ratio"] == pytest.approx(50 / 33)
    assert found["realised"] == pytest.approx(17 / 20)
    assert found["deciding_ms"] == pytest.approx(3)
    assert found["overhead"] == pytest.approx(0.06)
    assert (found["experts_off"], found["experts_on"]) == (20, 10)


def test_a_line_through_one_place_has_no_slope() -> None:
    assert fit_line([(3.0, 10.0), (3.0, 12.0)]) == (11.0, 0.0)


def test_the_interval_of_a_median() -> None:
    """The narrowest pair of order statistics, alike on both sides, that holds it with 95% by the binomial."""
    assert median_interval([float(n) for n in range(40, 0, -1)]) == (14.0, 27.0)
    assert median_interval([float(n) for n in range(100, 0, -1)]) == (40.0, 61.0)
    assert median_interval([2.0, 5.0, 3.0]) == (2.0, 5.0)  # no pair of three does


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bench.json").read_text())


def test_a_shape_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_shape(monkeypatch)
    command = ["bench", "--shape", "small", "--layers", "2", "--fraction", "0.5", "--batch-sizes", "4", "8"]
    command += ["--implementations", "grouped_mm", "batched_mm", "--steps", "6", "--prompt", "4", "--dtypes", "float32"]
    assert main([*command, "--generate", "4", "--out", str(tmp_path / "out")]) == 0
    report = read(tmp_path / "out")
    assert report["weights"] == "random"
    cases = {(case["implementation"], case["batch_size"]): case for case in report["cases"]}
    assert set(cases) == {(name, size) for name in ("grouped_mm", "batched_mm") for size in (4, 8)}
    for case in cases.values():
        assert case["experts_on"] < case["experts_off"]
        assert case["experts_on"] / case["experts_off"] == pytest.approx(0.5, abs=0.15)
        assert case["steps"] == 6
        assert [point[0] for point in case["line"]["points"]] == sorted(point[0] for point in case["line"]["points"])
        micro = case["microseconds_per_layer"]  # of which "all" is a difference of two times
        assert all(value > 0 for name, value in micro.items() if name != "all")
        assert micro["all"] == pytest.approx(1e3 * case["deciding_ms"] / case["moe_layers"])
        assert case["generate"]["ratio"] > 0
    shown = capsys.readouterr().out
    assert "random weights" in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("bytes"))
    assert line.split() == ["bytes", *(f"{case['bytes']:.0%}" for case in report["cases"])]
    assert (tmp_path / "out" / "bench.svg").stat().st_size > 1000
    assert (tmp_path / "out" / "bench.png").stat().st_size > 1000


def test_a_model_and_its_calibrated_selector(tmp_path: Path) -> None:
    options = BenchOptions(
        str(tmp_path / "out"),
        "reference-moe",
        selector="selectors/reference-moe",
        budget=0.01,
        steps=6,
        prompt=8,
        held_out=str(save_texts(tmp_path / "text")),
        held_out_tokens=1,
    )
    report = bench(options)
    (case,) = report["cases"]
    assert 0 < case["loss"]["kl"] < 1
    assert case["loss"]["tokens"] == 2 * 16 * 95
    assert case["loss"]["bytes"] < 0.9
    assert f"{case['loss']['nll']:+.4f}" in bench_tables(report)[0].markdown
    assert case["batch_size"] == 16
    assert case["experts_on"] < 0.75 * case["experts_off"]
    assert read(tmp_path / "out")["weights"] == "trained"
    assert "generate" not in case


def test_fewer_experts_are_loaded_and_nothing_else_changes() -> None:
    layer = find_moe_layers(tiny_model("qwen3_moe"))[0]
    indices, weights = torch.tensor([[[1, 6], [3, 4]]]), torch.rand(1, 2, 2)
    routing = Routing(torch.randn(1, 2, 32), torch.randn(1, 2, 8), indices, weights, torch.ones(1, 2, dtype=torch.bool))
    decision = bench_module.Fewer(3).decide(layer, routing)
    assert decision.indices.tolist() == [[[1, 0], [0, 1]]]
    assert decision.weights is weights
    assert decision.loads is not None
    assert [part.sum().item() for part in decision.loads] == [4, 2]


def test_graphs_are_skipped_with_the_reason_where_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["bench", "--shape", "qwen3-half", "--fraction", "0.5", "--graph", "true", "--out", str(tmp_path)]
    assert main(command) == 0
    assert "no GPU is visible" in capsys.readouterr().out
    assert read(tmp_path)["cases"] == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "one of --model and --shape"),
        ({"model": "reference-moe", "shape": "qwen3-half"}, "one of --model and --shape"),
        ({"shape": "qwen3-half", "fraction": 0.5, "held_out": "text"}, "--held_out needs a trained --model"),
        ({"shape": "qwen3-half"}, "one of --budget"),
        ({"shape": "qwen3-half", "budget": 0.01}, "--budget needs a calibrated --selector"),
        ({"shape": "qwen3-half", "fraction": 1.5}, "--fraction 1.5"),
        ({"shape": "gpt-5", "fraction": 0.5}, "expected one of qwen3-30b"),
        ({"shape": "qwen3-half", "fraction": 0.5, "layers": 49}, "expected 1 to 48"),
        ({"shape": "qwen3-half", "fraction": 0.5, "steps": 0}, "--steps 0"),
        ({"shape": "qwen3-half", "fraction": 0.5, "batch_sizes": []}, "--batch_sizes"),
        ({"shape": "qwen3-half", "fraction": 0.5, "dtypes": ["int3"]}, "--dtypes 'int3'"),
        ({"shape": "small", "fraction": 0.5, "layers": 1, "implementations": ["fast"]}, "--implementations 'fast'"),
        ({"shape": "small", "fraction": 0.5, "device": "abacus"}, "--device 'abacus'"),
        ({"shape": "small", "fraction": 0.5, "device": "cuda"}, "no GPU is visible"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    options: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_shape(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LynxError) as caught:
        bench(BenchOptions(str(tmp_path / "out"), **options))
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()
