"""A file in onnxruntime: inputs and outputs, thresholds, providers, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cases import (
    EXPERTS,
    HIDDEN,
    KINDS,
    LAYERS,
    MLP,
    TOP_K,
    Kind,
    batch,
    content,
    onnx,
    onnxruntime,
    runner_of,
    selector_of,
)
from torch import Tensor

from lynx_learn.decode.simulate import compare
from lynx_learn.errors import LynxError, OptionError, SelectorError
from lynx_learn.graph.graph import to_bytes
from lynx_learn.graph.onnx_runtime import CONFIG_KEY, NAMES, VERSION_KEY, OnnxSelector
from lynx_learn.moe.decision import Decision, Policy, Routing
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.moe.loading import REFERENCE, load_model
from lynx_learn.selector.config import by_active
from lynx_learn.selector.selector import LynxSelector, ThresholdPolicy
from lynx_learn.traces.corpus import BUILT_IN
from lynx_learn.traces.groups import decode_groups

SELECTOR = Path(__file__).parents[1] / "selectors" / "reference-moe"

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
        "prices": ([experts], "tensor(float)"),
        "devices": ([experts], "tensor(int64)"),
    }
    if kind[0] == "mlp":
        wanted["hidden"] = (["tokens", HIDDEN], "tensor(float)")
    assert given == wanted
    assert runner.uses_hidden == (kind[0] == "mlp")
    surrogates = ["addition"] * (kind[0] == "mlp")
    assert list(runner.outputs) == ["keep", "costs", "run_indices", "run_weights", *surrogates]
    assert runner.provider == "CPUExecutionProvider"


def test_metadata_comes_back() -> None:
    assert runner_of(MLP).config == selector_of(MLP).config


def test_thresholds_are_those_of_the_policy() -> None:
    runner, selector = runner_of(MLP), selector_of(MLP)
    for budget, metric in ((0.01, "kl"), (0.1, "kl"), (0.01, "nll"), (0.0, "kl")):
        policy: ThresholdPolicy = selector.policy(budget, metric)
        for active in (1, 2, 3, 4, 7, 8, 100):
            table = by_active(policy.thresholds)
            wanted = table[min(active, len(table) - 1)]
            assert runner.threshold(active, budget, metric) == wanted, (budget, active)
    assert [runner.threshold(active, 0.01) for active in (3, 4, 8, 100)] == [0.0, 0.5, 2.0, 2.0]
    # On a power law between two calibrated sizes.
    assert runner.threshold(6, 0.01) == pytest.approx(0.5 * 1.5**2)
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
        (lambda: edited(**{VERSION_KEY: "7"}), "graph format version 7, this package reads 3"),
        (lambda: edited(**{CONFIG_KEY: "{"}), "cannot be read"),
        (lambda: edited(**{CONFIG_KEY: '{"format_version": 3}'}), "lacks"),
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
        ({"prices": [1.0]}, "prices of shape (1,) is not usable: expected (8,)"),
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


def test_threads_are_those_asked_for() -> None:
    assert runner_of(MLP).session.get_session_options().intra_op_num_threads == 1
    assert OnnxSelector(content(MLP), threads=2).session.get_session_options().intra_op_num_threads == 2


class Exported:
    """What a graph decides, as a policy."""

    name = "exported"

    def __init__(self, runner: OnnxSelector, budget: float) -> None:
        self.runner, self.budget, self.setting = runner, budget, f"budget={budget:g}"

    def bind(self, layers: list[MoeLayer]) -> None: ...

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        done = [self._decide(layer, Routing(*parts)) for parts in zip(*routing, strict=True)]
        indices, weights, addition = (torch.stack(parts) for parts in zip(*done, strict=True))
        return Decision(indices, weights, addition)

    def _decide(self, layer: MoeLayer, one: Routing) -> tuple[Tensor, Tensor, Tensor]:
        tau = self.runner.threshold(int(one.active.sum()), self.budget)
        batch = (one.logits, one.indices, one.weights, tau, one.hidden, one.active)
        found = self.runner.run(layer.index, *batch)
        return (
            torch.from_numpy(found.run_indices),
            torch.from_numpy(found.run_weights),
            torch.from_numpy(found.addition),
        )

    def own_bytes(self, layer: MoeLayer, skipped: Tensor, batches: int) -> float:
        return 0.0


def test_the_exported_decision_loses_what_pytorchs_does_at_the_calibrated_budgets() -> None:
    """On the shipped model and selector: the graph holds the surrogates, so that it is what was calibrated."""
    selector = LynxSelector.from_pretrained(SELECTOR)
    loaded = load_model(REFERENCE, "cpu", "float32")
    groups = decode_groups(BUILT_IN, loaded.tokenizer, "test", 16, 64, 2, 1)
    runner = OnnxSelector(to_bytes(selector))
    budgets = sorted(map(float, selector.config.thresholds["kl"]))
    policies: list[Policy] = [selector.policy(budget) for budget in budgets]
    policies += [Exported(runner, budget) for budget in budgets]
    found = compare(loaded.model, find_moe_layers(loaded.model), groups, policies, 32)
    for own, exported in zip(found[: len(budgets)], found[len(budgets) :], strict=True):
        assert own.mean("kl") > 0
        for metric in ("kl", "nll", "agreement"):
            assert exported.mean(metric) == pytest.approx(own.mean(metric), rel=1e-3, abs=1e-6)
        assert exported.mean_stats()["experts"] == pytest.approx(own.mean_stats()["experts"], rel=1e-3)
