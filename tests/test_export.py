"""The exported graph decides as PyTorch does, on every layer and for every number of tokens; what is refused."""

import functools
import json
import math
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import randomise

from lynx_learn.cli import main
from lynx_learn.errors import LynxError, OptionError, SelectorError
from lynx_learn.graph import export as export_module
from lynx_learn.graph.check import check, compare, middle
from lynx_learn.graph.export import ExportOptions, export
from lynx_learn.graph.graph import random_batch, to_bytes
from lynx_learn.graph.onnx_runtime import CONFIG_KEY, NAMES, VERSION_KEY, OnnxSelector
from lynx_learn.graph.times import time_layers
from lynx_learn.moe.decision import Routing
from lynx_learn.selector.config import SelectorConfig
from lynx_learn.selector.layer import LayerSelector
from lynx_learn.selector.selector import LynxSelector, ThresholdPolicy

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[1]
EXPERTS, TOP_K, HIDDEN, LAYERS = 8, 2, 32, 3
SIZES = (1, 2, 3, 16, 17, 64, 511, 512)
THRESHOLDS = {"kl": {"0.01": {"4": 0.5, "8": 2.0}, "0.1": {"1": 3.0}}, "nll": {"0.01": {"2": 0.25}}}
# (scorer, every token keeps its first expert, experts, top_k)
KINDS = [
    ("formula", True, EXPERTS, TOP_K),
    ("linear", False, EXPERTS, TOP_K),
    ("mlp", True, EXPERTS, TOP_K),
    ("mlp", False, 4, 4),
]
Kind = tuple[str, bool, int, int]
MLP = KINDS[2]


@functools.cache
def selector_of(kind: Kind) -> LynxSelector:
    scorer, keep_top1, experts, top_k = kind
    names = tuple(f"layers.{layer}" for layer in range(LAYERS))
    shape = (experts, top_k, HIDDEN, 1000, scorer, 4, keep_top1)
    config = SelectorConfig("base", "revision", "tiny", "f" * 64, names, *shape, THRESHOLDS, {"kl": {"seed": 1}})
    selector = LynxSelector(config)
    randomise(selector)
    return selector


@functools.cache
def content(kind: Kind) -> bytes:
    return to_bytes(selector_of(kind))


@functools.cache
def runner_of(kind: Kind) -> OnnxSelector:
    return OnnxSelector(content(kind))


def own(kind: Kind, layer: int) -> LayerSelector:
    return selector_of(kind).layers[layer]  # type: ignore[return-value]


def batch(kind: Kind, layer: int, tokens: int, seed: int = 0) -> Routing:
    return random_batch(selector_of(kind), layer, tokens, torch.Generator().manual_seed(seed))


def in_front(routing: Routing) -> Routing:
    """With the leading dimension that selectors expect."""
    return Routing(*(part.unsqueeze(0) for part in routing))


def ask(runner: OnnxSelector, layer: int, routing: Routing, threshold: float) -> Any:
    return runner.run(
        layer, routing.logits, routing.indices, routing.weights, threshold, routing.hidden, routing.active
    )


# Parity.


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_every_layer_decides_as_pytorch(kind: Kind, tokens: int) -> None:
    for layer in range(LAYERS):
        routing = batch(kind, layer, tokens, seed=tokens)
        part, one = own(kind, layer), in_front(routing)
        costs = part.costs(one)
        totals = part.totals(one, costs)
        for threshold in (0.0, middle(totals), math.inf):
            answer = ask(runner_of(kind), layer, routing, threshold)
            torch.testing.assert_close(torch.from_numpy(answer.costs), costs[0], rtol=1e-4, atol=1e-9)
            keep = part.keep(one, totals, torch.tensor([threshold]))[1][0]
            decision = part.decide(one, torch.tensor([threshold]), costs)
            sure = (totals[0] - threshold).abs() > 1e-4 * max(threshold, 1e-9)
            assert torch.equal(torch.from_numpy(answer.keep)[sure], keep[sure])
            if sure.all():
                assert torch.equal(torch.from_numpy(answer.run_indices), decision.indices[0])
                assert torch.equal(torch.from_numpy(answer.run_weights), decision.weights[0])
        assert answer.keep.sum() < len(answer.keep) or kind[1] or kind[2] == 1


def test_thresholds_between_two_totals_are_decided_alike_bit_by_bit() -> None:
    """No bit of these is within rounding of the threshold, so every one of them has been compared above."""
    for kind in KINDS:
        for layer in range(LAYERS):
            _, relative, bits, differing = compare(own(kind, layer), runner_of(kind), layer, batch(kind, layer, 40))
            assert relative < 1e-4
            assert (bits, differing) == (kind[2], 0)


def test_layers_differ_and_are_chosen_by_their_index() -> None:
    routing = batch(MLP, 0, 9)
    costs = [ask(runner_of(MLP), layer, routing, 1.0).costs for layer in range(LAYERS)]
    assert all(np.abs(costs[a] / costs[b] - 1).max() > 0.1 for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_with_an_infinite_threshold_the_dearest_stays_and_first_experts_if_wanted(kind: Kind) -> None:
    routing = batch(kind, 1, 3)
    routing = routing._replace(active=torch.tensor([True, False, True]))
    answer = ask(runner_of(kind), 1, routing, math.inf)
    total = own(kind, 1).totals(in_front(routing), own(kind, 1).costs(in_front(routing)))[0]
    wanted = {int(total.argmax())}
    if kind[1]:
        wanted |= set(routing.indices[routing.active, routing.weights[routing.active].argmax(-1)].tolist())
    assert set(np.flatnonzero(answer.keep).tolist()) == wanted
    assert not answer.run_weights[1].any()
    assert set(answer.run_indices.flatten().tolist()) <= wanted


def test_tokens_that_are_not_active_count_for_nothing() -> None:
    routing = batch(MLP, 2, 24, seed=5)
    live = routing.active
    assert 0 < int(live.sum()) < 24
    costs = own(MLP, 2).costs(in_front(routing))
    tau = middle(own(MLP, 2).totals(in_front(routing), costs))
    answer = ask(runner_of(MLP), 2, routing, tau)
    alone = ask(runner_of(MLP), 2, Routing(*(part[live] for part in routing)), tau)
    assert np.array_equal(answer.keep, alone.keep)
    assert np.array_equal(answer.run_weights[live.numpy()], alone.run_weights)
    everyone = routing._replace(active=torch.ones(24, dtype=torch.bool))
    assert not np.array_equal(answer.keep, ask(runner_of(MLP), 2, everyone, tau).keep)
    default = runner_of(MLP).run(2, routing.logits, routing.indices, routing.weights, tau, routing.hidden)
    assert np.array_equal(default.keep, ask(runner_of(MLP), 2, everyone, tau).keep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_converted(dtype: torch.dtype) -> None:
    routing = batch(MLP, 0, 5)
    low = Routing(*(part.to(dtype) if part.is_floating_point() else part for part in routing))
    plain = Routing(*(part.float() if part.is_floating_point() else part for part in low))
    arrays = [None if part is None else part.numpy() for part in plain]
    hidden, logits, indices, weights, active = arrays
    answers = [
        ask(runner_of(MLP), 0, low._replace(indices=routing.indices.int()), 1.0),
        ask(runner_of(MLP), 0, plain, 1.0),
        runner_of(MLP).run(0, logits, indices, weights, 1.0, hidden, active),
    ]
    for answer in answers[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(answers[0], answer, strict=True))


def changed() -> LynxSelector:
    """As the one of MLP, but one layer's costs off by half a percent."""
    other = LynxSelector(selector_of(MLP).config)
    other.load_state_dict(selector_of(MLP).state_dict())
    other.layers[2].scorer.log_residual += 0.005  # type: ignore[union-attr,operator]
    return other


def test_a_graph_of_another_selector_is_found_out() -> None:
    assert check(selector_of(MLP), runner_of(MLP)).layers == LAYERS
    with pytest.raises(LynxError, match=r"costs.* of layer 2"):
        check(changed(), runner_of(MLP))
    first = LynxSelector(replace(selector_of(MLP).config, keep_top1=False))
    first.load_state_dict(selector_of(MLP).state_dict())
    with pytest.raises(LynxError, match=r"keep bits.* of layer 0"):
        check(first, runner_of(MLP))


# The file.


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_inputs_and_outputs(kind: Kind) -> None:
    _, _, experts, top_k = kind
    runner = runner_of(kind)
    given = {part.name: (part.shape, part.type) for part in runner.session.get_inputs()}
    wanted = {
        "layer": ([], "tensor(int64)"),
        "logits": (["tokens", experts], "tensor(float)"),
        "indices": (["tokens", top_k], "tensor(int64)"),
        "weights": (["tokens", top_k], "tensor(float)"),
        "active": (["tokens"], "tensor(bool)"),
        "threshold": ([], "tensor(float)"),
    }
    if kind[0] == "mlp":
        wanted["hidden"] = (["tokens", HIDDEN], "tensor(float)")
    assert given == wanted
    assert runner.uses_hidden == (kind[0] == "mlp")
    assert [part.name for part in runner.session.get_outputs()] == ["keep", "costs", "run_indices", "run_weights"]
    assert runner.provider == "CPUExecutionProvider"


def test_metadata_comes_back() -> None:
    assert runner_of(MLP).config == replace(selector_of(MLP).config, calibration={})


def test_thresholds_are_those_of_the_policy() -> None:
    runner, selector = runner_of(MLP), selector_of(MLP)
    for budget, metric in ((0.01, "kl"), (0.1, "kl"), (0.01, "nll"), (0.0, "kl")):
        policy: ThresholdPolicy = selector.policy(budget, metric)
        for active in (1, 2, 3, 4, 7, 8, 100):
            reached = [size for size in sorted(policy.thresholds) if size <= active]
            wanted = policy.thresholds[reached[-1]] if reached else 0.0
            assert runner.threshold(active, budget, metric) == wanted, (budget, active)
    with pytest.raises(OptionError, match=r"not calibrated for a budget of 0\.5"):
        runner.threshold(4, 0.5)


def edited(**metadata: str) -> bytes:
    """A whole graph with other metadata."""
    proto = onnx.load_from_string(content(MLP))
    kept = {prop.key: prop.value for prop in proto.metadata_props} | metadata
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, kept)
    return proto.SerializeToString()


def foreign() -> bytes:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Exp", ["x"], ["y"])], "g", [value], [result])
    opset = [onnx.helper.make_opsetid("", 20)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (foreign, "is no graph of a selector"),
        (lambda: edited(**{VERSION_KEY: "7"}), "graph format version 7, this package reads 1"),
        (lambda: edited(**{CONFIG_KEY: "{"}), "cannot be read"),
        (lambda: edited(**{CONFIG_KEY: '{"format_version": 1}'}), "lacks"),
        (lambda: content(MLP)[:2000], "cannot be loaded by onnxruntime"),
        (lambda: b"not a graph", "cannot be loaded by onnxruntime"),
        (None, "is no file"),
    ],
)
def test_files_that_are_no_export_are_refused(
    make: Callable[[], bytes] | None, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.onnx"
    if make is not None:
        file.write_bytes(make())
    with pytest.raises(SelectorError) as caught:
        OnnxSelector(file)
    assert reason in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # onnxruntime prints nothing of its own


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer": LAYERS}, "layer 3 is not usable: expected 0 to 2"),
        ({"layer": -1}, "layer -1"),
        ({"logits": torch.zeros(4, EXPERTS + 1)}, "logits of shape (4, 9)"),
        ({"weights": torch.zeros(1, TOP_K)}, "weights of shape (1, 2) is not usable: expected (tokens, 2)"),
        ({"active": torch.ones(3, dtype=torch.bool)}, "active of shape (3,)"),
        ({"hidden": torch.zeros(4, 5)}, "hidden of shape (4, 5)"),
        ({"hidden": None}, "hidden is missing"),
        ({"logits": torch.zeros(0, EXPERTS)}, "logits of shape (0, 8)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict[str, Any], reason: str) -> None:
    inputs = {"layer": 0, **batch(MLP, 0, 4)._asdict(), "threshold": 1.0, **changes}
    with pytest.raises(OptionError) as caught:
        runner_of(MLP).run(**inputs)
    assert reason in str(caught.value)


# Providers and packages.


def test_cuda_is_refused_where_onnxruntime_has_none() -> None:
    if NAMES["cuda"] in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built with CUDA")
    with pytest.raises(LynxError, match=r"provider cuda is not usable.*onnx-gpu"):
        OnnxSelector(content(MLP), "cuda")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_is_refused_where_it_is_listed_but_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `onnxruntime-gpu` on a machine without CUDA: it names the provider, and runs on the CPU without a word."""
    if NAMES["cuda"] in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built with CUDA")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(NAMES.values()))
    with pytest.raises(LynxError, match="names CUDAExecutionProvider but runs on CPUExecutionProvider") as caught:
        OnnxSelector(content(MLP), "cuda")
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_cuda_decides_as_pytorch(kind: Kind) -> None:
    try:
        runner = OnnxSelector(content(kind), "cuda")
    except LynxError as error:
        pytest.skip(str(error))
    assert runner.provider == "CUDAExecutionProvider"
    assert check(selector_of(kind), runner, SIZES).relative < 1e-3


def test_threads_are_those_asked_for() -> None:
    assert runner_of(MLP).session.get_session_options().intra_op_num_threads == 1
    assert OnnxSelector(content(MLP), threads=2).session.get_session_options().intra_op_num_threads == 2


# The command.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved selector."""
    selector_of(MLP).save_pretrained(tmp_path / "selector")
    return tmp_path / "selector"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, which must fail with one line; returns it."""

    def refused(*words: object) -> str:
        capsys.readouterr()
        assert main(["export", *map(str, words)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1, lines
        return lines[0]

    return refused


def uncompiled(*_: object, **__: object) -> None:
    raise RuntimeError("no compiler\nis here")


def test_command_writes_a_checked_file_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(export_module, "time_layers", functools.partial(time_layers, rounds=30))
    words = ["--time-tokens", "16", "--report", str(folder.parent / "report.json")]
    assert main(["export", "--selector", str(folder), *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    file = folder / "selector.onnx"
    said = " ".join(out.split())
    assert f"{file}: " in out.replace("\n", "")
    assert "checked with onnxruntime on CPUExecutionProvider" in said
    assert "costs differ by at most" in said
    assert "0 of 72 differ" in said
    assert "torch.compile is not usable here: no compiler" in out
    found = json.loads((folder.parent / "report.json").read_text())
    assert found["parity"]["layers"] == LAYERS
    assert 0 < found["parity"]["relative"] < 1e-4
    assert found["versions"]["onnxruntime"] == onnxruntime.__version__
    times = found["times"]["microseconds"]
    assert times["compiled"] is None
    for name in ("eager", "onnxruntime", "bound", "runner"):
        assert 0 < times[name]["low"] <= times[name]["median"] <= times[name]["high"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "selector.onnx", "selector.safetensors"]
    answers = [ask(runner, 1, batch(MLP, 1, 20), 1.0) for runner in (OnnxSelector(file), runner_of(MLP))]
    assert all(np.array_equal(x, y) for x, y in zip(*answers, strict=True))


def test_a_graph_that_decides_otherwise_is_not_written(
    folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "selector.onnx").write_bytes(b"the one before")
    changed().save_pretrained(folder)
    monkeypatch.setattr(export_module, "to_bytes", lambda selector: content(MLP))
    message = refused("--selector", folder)
    assert "does not compute what PyTorch does (costs of layer 2" in message
    assert (folder / "selector.onnx").read_bytes() == b"the one before"
    assert len(list(folder.iterdir())) == 3


def test_cuda_asked_for_without_one(folder: Path, refused: Callable[..., str]) -> None:
    if NAMES["cuda"] in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built with CUDA")
    (folder / "selector.onnx").write_bytes(b"the one before")
    assert "provider cuda is not usable" in refused("--selector", folder, "--provider", "cuda")
    assert (folder / "selector.onnx").read_bytes() == b"the one before"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_packages_that_are_not_installed(
    package: str, folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = refused("--selector", folder)
    assert f"{package} is not installed" in message
    assert "pip install 'lynx-learn[onnx]'" in message
    assert not (folder / "selector.onnx").exists()


def test_scorers_that_no_file_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "LARGEST", 1000)
    with pytest.raises(LynxError, match=r"an \.onnx file holds 2 GiB"):
        to_bytes(selector_of(MLP))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--format", "tflite"], '"format"'),
        (["--provider", "tpu"], '"provider"'),
        (["--time-tokens", "-1"], "--time_tokens -1 "),
    ],
)
def test_bad_words(words: list[str], reason: str, folder: Path, refused: Callable[..., str]) -> None:
    assert reason in refused("--selector", folder, *words)


def test_without_a_folder_the_file_must_be_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lynx_learn.selector.selector._download", lambda name, revision: folder)
    with pytest.raises(OptionError, match="--out is missing: some/one is no folder here"):
        export(ExportOptions("some/one"))


def test_timing_of_random_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script, at a small size, where nothing can be compiled."""
    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(export_module, "time_layers", functools.partial(time_layers, rounds=30))
    sizes = ["--experts", "4", "--top_k", "2", "--hidden", "8", "--layers", "2", "--tokens", "3"]
    out = tmp_path / "times" / "onnx.json"
    monkeypatch.setattr(sys, "argv", ["onnx_times.py", *sizes, "--out", str(out)])
    runpy.run_path(str(ROOT / "train" / "onnx_times.py"), run_name="__main__")
    assert "Microseconds of one layer's decision" in capsys.readouterr().out
    found = json.loads(out.read_text())["times"]
    assert (found["experts"], found["tokens"], found["layers"]) == (4, 3, 2)
    assert found["microseconds"]["bound"]["median"] > 0
