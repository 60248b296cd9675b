"""Timing: decodes step in turns through the same text, everything is left as it was, and the report says what was measured."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_selector, tiny_model, words
from torch import nn

from lynx_learn.cli import main
from lynx_learn.decode import bench as bench_module
from lynx_learn.decode.bench import BenchOptions, bench, fit_line, median_interval, summary
from lynx_learn.decode.runtime import skip_experts
from lynx_learn.decode.shapes import SHAPES, shaped_model
from lynx_learn.decode.tally import Stats
from lynx_learn.decode.timing import Steps, paired_ratio, take_turns
from lynx_learn.errors import LynxError, OptionError
from lynx_learn.moe.decision import Decision, Routing
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.rules.keep_sets import XShare

ROWS, POSITIONS, PROMPT, WARM_UP = 4, 20, 8, 3


@pytest.fixture
def two_threads() -> Iterator[None]:
    """A number of threads that `take_turns` does not use itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Failing(XShare):
    """A rule that breaks down at its third decode step."""

    calls = 0

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        self.calls += layer.index == 0
        if self.calls == 3:
            raise RuntimeError("no more")
        return super().decide(layer, routing)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_both_decodes_are_timed_step_by_step(family: str) -> None:
    model = tiny_model(family)
    found = take_turns(model, {"off": None, "on": XShare(4)}, words(ROWS, POSITIONS), PROMPT, WARM_UP)
    off, on = found["off"], found["on"]
    assert len(off.ms) == len(on.ms) == POSITIONS - PROMPT - WARM_UP
    assert all(value > 0 for value in off.ms + on.ms)
    assert paired_ratio(off, on) == pytest.approx(1 / paired_ratio(on, off))
    assert off.stats is None
    assert on.stats is not None
    assert on.stats.steps == POSITIONS - PROMPT  # those of the warm-up skip too, and the untouched decode does not
    assert all(before > 4 for before in on.stats.experts_before)
    assert all(after <= 4 for after in on.stats.experts_after)
    assert torch.get_num_threads() == 2
    assert hooks(model) == 0


@pytest.mark.usefixtures("two_threads")
def test_a_failure_leaves_threads_and_model_as_they_were() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(RuntimeError, match="no more"):
        take_turns(model, {"off": None, "on": Failing(4)}, words(ROWS, POSITIONS), PROMPT, WARM_UP)
    assert torch.get_num_threads() == 2
    assert hooks(model) == 0
    skip_experts(model, XShare(4)).attach().detach()  # nothing is attached any more


def test_each_decode_sees_the_whole_text_one_token_at_a_time() -> None:
    """A prefill each, then each column for everyone, with the hooks of one policy at a time, taking turns."""
    model, tokens = tiny_model("qwen3_moe"), words(ROWS, POSITIONS)
    seen: list[tuple[torch.Tensor, bool]] = []
    resting = hooks(model)

    def note(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append((kwargs["input_ids"], hooks(model) > resting + 1))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    policies = {"off": None, "on": random_selector(model).at_threshold(1e9)}
    take_turns(model, policies, tokens, PROMPT, WARM_UP)
    handle.remove()
    assert [skips for _, skips in seen[:2]] == [False, False]
    assert all(torch.equal(ids, tokens[:, :PROMPT]) for ids, _ in seen[:2])
    steps = seen[2:]
    assert len(steps) == 2 * (POSITIONS - PROMPT)
    firsts = [skips for _, skips in steps[::2]]
    assert firsts == [position % 2 == 1 for position in range(PROMPT, POSITIONS)]
    for index, (ids, skips) in enumerate(steps):
        assert torch.equal(ids, tokens[:, PROMPT + index // 2 : PROMPT + index // 2 + 1])
        assert skips == (firsts[index // 2] if index % 2 == 0 else not firsts[index // 2])


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(OptionError, match="3 decode steps are too few"):
        take_turns(tiny_model("qwen3_moe"), {"off": None}, words(ROWS, PROMPT + WARM_UP), PROMPT, WARM_UP)


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
    assert median_interval([float(n) for n in range(100, 0, -1)]) == (41.0, 61.0)
    assert median_interval([5.0]) == (5.0, 5.0)


def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 4000,
    }
    monkeypatch.setitem(SHAPES, "small", ("qwen3_moe", sizes))


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
        assert all(value > 0 for value in case["microseconds_per_layer"].values())
        assert case["generate"]["ratio"] > 0
    shown = capsys.readouterr().out
    assert "random weights" in shown
    assert "float32 batched_mm, batch 8" in shown
    assert (tmp_path / "out" / "bench.svg").stat().st_size > 1000
    assert (tmp_path / "out" / "bench.png").stat().st_size > 1000


def test_a_model_and_its_calibrated_selector(tmp_path: Path) -> None:
    options = BenchOptions(
        str(tmp_path), "reference-moe", selector="selectors/reference-moe", budget=0.01, steps=6, prompt=8
    )
    (case,) = bench(options)["cases"]
    assert case["batch_size"] == 16
    assert case["experts_on"] < 0.75 * case["experts_off"]
    assert read(tmp_path)["weights"] == "trained"
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


def test_a_shape_shrinks_its_vocabulary_with_its_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    small_shape(monkeypatch)
    model = shaped_model("small", 2, torch.device("cpu"), torch.bfloat16)
    assert (model.config.vocab_size, model.config.num_hidden_layers) == (2000, 2)  # type: ignore[union-attr]
    again = shaped_model("small", 2, torch.device("cpu"), torch.bfloat16)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    with torch.no_grad():
        assert model(input_ids=words(2, 5)).logits.isfinite().all()
