"""The vLLM plugin's own parts, without vLLM: stand-ins take the places of what it wraps."""

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import EXPERTS, HIDDEN, TOP_K, random_selector, tiny_model
from torch import Tensor
from vllm_stand_ins import CPURouter, engine_config, engine_runner, run_experts

from lynx_learn.errors import SelectorError
from lynx_learn.integrations.vllm import engine as vllm_engine
from lynx_learn.integrations.vllm import metrics as vllm_metrics
from lynx_learn.integrations.vllm.engine import Acting, Step
from lynx_learn.integrations.vllm.layers import EngineLayer
from lynx_learn.integrations.vllm.settings import Settings, UnsupportedError
from lynx_learn.moe.decision import Routing
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.identity import Passing
from lynx_learn.selector.selector import ThresholdPolicy

SOME = 2.0  # costs of typical assignments are around 1
ROWS, REAL = 10, 8


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "_logger", lambda: logging.getLogger("lynx_learn"))
    monkeypatch.setattr(vllm_engine, "_tensor_rank", lambda: 0)
    monkeypatch.delenv(vllm_metrics.FOLDER, raising=False)


def acting(policy_thresholds: dict[int, float] | None = None, **changes: Any) -> Acting:
    """Every MoE layer of a tiny model behind stand-ins, with a random selector."""
    model = tiny_model("qwen3_moe")
    selector = random_selector(model)
    layers = []
    for layer in find_moe_layers(model):
        runner = engine_runner(router=CPURouter(layer.rule.route), **changes)
        layers.append(
            EngineLayer(
                layer.index,
                layer.name,
                layer.router,
                runner,
                EXPERTS,
                TOP_K,
                HIDDEN,
                layer.expert_bytes,
                layer.device,
                layer.dtype,
            )
        )
    engine = SimpleNamespace(execute_model=None, _model_forward=None, reload_weights=None)
    found = Acting(engine, layers, ThresholdPolicy(selector, policy_thresholds or {1: SOME}, ""))
    found.attach(Settings("x", 0.01), first=False)
    return found


def inputs(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, HIDDEN, generator=generator), 2 * torch.randn(rows, EXPERTS, generator=generator)


def run_layer(found: Acting, hidden: Tensor, logits: Tensor, layer: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and experts that reach the kernel, and the layer's output."""
    runner = found.layers[layer].runner
    weights, ids = runner.router._compute_routing(hidden, logits, None)
    output = runner.routed_experts.forward_modular(x=hidden, topk_weights=weights, topk_ids=ids)
    return weights, ids, output


def test_without_a_decode_step_nothing_changes() -> None:
    found = acting()
    hidden, logits = inputs()
    indices, weights = found.layers[0].runner.router.rule(logits)
    ran = run_layer(found, hidden, logits)
    assert torch.equal(ran[0], weights)
    assert torch.equal(ran[1], indices.int())
    assert torch.equal(ran[2], run_experts(weights, indices))
    assert not found.sums.any()


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_decode_step_runs_the_policys_decision(scale: float, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the policy itself decides on the real rows with the weights that the experts' output is scaled by in the end."""
    monkeypatch.setattr(vllm_engine, "_tensor_rank", lambda: rank)
    found = acting(routed_scaling_factor=scale)
    hidden, logits = inputs()
    indices, weights = found.layers[0].runner.router.rule(logits)
    found.step, found.masks = Step(REAL, ()), None
    ran = run_layer(found, hidden, logits)
    real = slice(0, REAL)
    parts = (hidden[real], logits[real], indices[real], weights[real] * scale)
    routing = Routing(*(part.unsqueeze(0) for part in parts), active=torch.ones(1, REAL, dtype=torch.bool))
    ready = found.policy.ready[0]
    wanted = ready.selector.decide(routing, ready.threshold(routing.active), ready.costs(routing))
    assert wanted.addition is not None
    assert wanted.loads is not None
    torch.testing.assert_close(ran[0][real] * scale, wanted.weights[0])
    assert torch.equal(ran[1][real].long(), wanted.indices[0])
    added = wanted.addition[0] if rank == 0 else torch.zeros_like(wanted.addition[0])
    routed = run_experts(ran[0], ran[1])
    torch.testing.assert_close((ran[2] - routed)[real] * scale, added, rtol=1e-4, atol=1e-4)
    # The kernel is given no row that has nothing to say.
    assert found.layers[0].runner.routed_experts.called["topk_weights"].all()
    before, after = (int(part.sum()) for part in wanted.loads)
    assert after < before
    assert found.sums.tolist()[:3] == [before, after, REAL * TOP_K]
    # Rows of padding load nothing of their own.
    assert set(ran[1][REAL:].flatten().tolist()) <= set(ran[1][real].flatten().tolist())


def test_an_output_that_is_reduced_already_is_added_to_by_every_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "_tensor_rank", lambda: 1)
    found = acting(_fused_output_is_reduced=True)
    found.step = Step(ROWS, ())
    weights, ids, output = run_layer(found, *inputs())
    assert not torch.allclose(output, run_experts(weights, ids))


def test_rows_that_opted_out_keep_everything_and_do_not_vote() -> None:
    found = acting()
    hidden, logits = inputs()
    indices, weights = found.layers[0].runner.router.rule(logits)
    kept = (1, 4)
    found.step = Step(REAL, kept)
    ran = run_layer(found, hidden, logits)
    for row in kept:
        assert torch.equal(ran[0][row], weights[row])
        assert torch.equal(ran[1][row], indices[row].int())
        torch.testing.assert_close(ran[2][row], run_experts(weights[[row]], indices[[row]])[0])
    assert (ran[0][:REAL] == 0).any()  # the others skip
    few = acting({REAL: SOME})  # with two rows less than that, nothing may be skipped
    few.step = Step(REAL, kept)
    assert torch.equal(run_layer(few, hidden, logits)[0][:REAL], weights[:REAL])


def test_rows_of_padding_without_an_expert_stay_without() -> None:
    found = acting()
    hidden, logits = inputs()
    router = found.layers[0].runner.router
    rule = router.rule

    def nowhere(values: Tensor) -> tuple[Tensor, Tensor]:
        indices, weights = rule(values)
        indices[REAL:] = -1
        return indices, weights

    router.rule = nowhere
    found.step = Step(REAL, ())
    assert (run_layer(found, hidden, logits)[1][REAL:] == -1).all()


class Batch:
    """Requests of a step: how many tokens of each are scheduled, computed and prompt."""

    def __init__(self, planned: list[int], computed: list[int], prompt: list[int]) -> None:
        self.num_reqs = len(planned)
        self.req_ids = [str(i) for i in range(self.num_reqs)]
        self.num_computed_tokens_cpu = np.array([*computed, 99])
        self.num_prompt_tokens = np.array([*prompt, 0])
        self.planned = dict(zip(self.req_ids, planned, strict=True))


@pytest.mark.parametrize(
    ("batch", "opted", "outcome", "step"),
    [
        (Batch([1, 1, 1], [5, 9, 7], [5, 5, 5]), [], "acted", Step(3, ())),
        (Batch([1, 1, 1], [5, 9, 7], [5, 5, 5]), ["1"], "acted", Step(3, (1,))),
        (Batch([1, 1, 1], [5, 9, 7], [5, 5, 5]), ["0", "1", "2"], "opted_out", None),
        (Batch([1, 1, 1], [5, 9, 7], [5, 5, 5]), ["0", "2"], "below_smallest_size", None),
        (Batch([1, 1, 1], [5, 4, 7], [5, 5, 5]), [], "mixed", None),  # the last token of a prompt, by itself
        (Batch([1, 4, 1], [5, 0, 7], [5, 5, 5]), [], "mixed", None),
        (Batch([5, 3], [0, 2], [5, 5]), [], "prefill", None),
    ],
)
def test_steps(batch: Batch, opted: list[str], outcome: str, step: Step | None) -> None:
    found = acting({2: SOME})
    found.runner.input_batch, found.opted = batch, set(opted)
    found.scheduled = SimpleNamespace(num_scheduled_tokens=batch.planned)
    assert found._read_step() == (outcome, step)


def engine_steps(found: Acting, forward: Callable[[], None]) -> None:
    """One decode step of two requests through the wrapped runner."""
    found.runner.input_batch = Batch([1, 1], [5, 5], [5, 5])
    new = SimpleNamespace(req_id="7", sampling_params=SimpleNamespace(extra_args={"lynx": False}))
    scheduled = SimpleNamespace(
        scheduled_new_reqs=[new], num_scheduled_tokens={"0": 1, "1": 1}, finished_req_ids={"old"}
    )
    found.opted.add("old")
    found._execute_model(lambda *_: found._model_forward(forward), scheduled)


def test_self_check_passes_when_every_layer_ran_the_decision() -> None:
    found = acting()
    hidden, logits = inputs(2)
    engine_steps(found, lambda: [run_layer(found, hidden, logits, i) for i in range(len(found.layers))] and None)
    assert found.proven
    assert found.outcomes["acted"] == 1
    assert found.opted == {"7"}
    assert found.step is None


def test_a_name_that_comes_back_is_a_new_request() -> None:
    """In the very step that ends the last request of that name."""
    found = acting()
    for out in (True, False, True):
        new = SimpleNamespace(req_id="7", sampling_params=SimpleNamespace(extra_args={"lynx": not out}))
        scheduled = SimpleNamespace(scheduled_new_reqs=[new], num_scheduled_tokens={"7": 1}, finished_req_ids={"7"})
        found._execute_model(lambda _: None, scheduled)
        assert found.opted == ({"7"} if out else set())


def test_weights_that_are_replaced_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = acting()
    found.runner.get_model = lambda: None
    found.runner.model_config = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=2))
    monkeypatch.setattr(vllm_engine, "find_layers", lambda *_: found.layers)
    monkeypatch.setattr(vllm_engine, "looking", lambda _: nullcontext())
    found._reload_weights(lambda: None)
    assert found.undo
    found.layers[0].router.weight.data[0, 0] += 1
    with pytest.raises(UnsupportedError, match="differs in its routers"):
        found._reload_weights(lambda: None)
    assert not found.undo
    assert found.layers[1].runner.router._compute_routing.__func__ is CPURouter._compute_routing


def test_self_check_fails_when_a_layer_did_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vllm_metrics.FOLDER, str(tmp_path / "lynx-learn-1-x"))
    monkeypatch.setattr(vllm_metrics, "parent_process", lambda: True)  # a worker's process
    found = acting()
    hidden, logits = inputs(2)
    with pytest.raises(UnsupportedError, match=r"experts of 1 of 2 layers \(model.layers.1.mlp, …\)"):
        engine_steps(found, lambda: run_layer(found, hidden, logits) and None)
    assert "first decode step" in (tmp_path / "lynx-learn-1-x" / vllm_metrics.REFUSED).read_text()
    assert found.layers[0].runner.router._compute_routing.__func__ is CPURouter._compute_routing


def test_self_check_fails_when_other_experts_are_run() -> None:
    found = acting()
    hidden, logits = inputs(2)

    def forward() -> None:
        for layer in found.layers:
            weights, ids = layer.runner.router._compute_routing(hidden, logits, None)
            other = (ids + 1) % EXPERTS
            layer.runner.routed_experts.forward_modular(x=hidden, topk_weights=weights, topk_ids=other)

    with pytest.raises(UnsupportedError, match="2 of 2 layers"):
        engine_steps(found, forward)


@pytest.mark.parametrize("action", ["fail", "warn"])
def test_an_engine_that_is_built_otherwise_is_refused_or_left_alone(
    action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something that the plugin reaches for is not there: half attached would be worse than not at all."""
    known = acting()
    known.detach()
    del known.layers[1].runner._fused_output_is_reduced
    engine = SimpleNamespace(vllm_config=engine_config(), model_runner=known.runner, rank=0)
    known.runner.get_model, known.runner.input_batch = lambda: None, None
    warned: list[str] = []
    settings = Settings("x", 0.01, action)
    monkeypatch.setattr(vllm_engine, "find_layers", lambda *_: known.layers)
    if action == "warn":
        monkeypatch.setattr(vllm_engine, "refuse", lambda _, reason: warned.append(str(reason)))
        vllm_engine.attach(engine, settings, known.policy, Passing(EXPERTS, 2))
        assert "_fused_output_is_reduced" in warned[0]
    else:
        with pytest.raises(
            UnsupportedError, match=r"built otherwise than the plugin expects .+_fused_output_is_reduced"
        ):
            vllm_engine.attach(engine, settings, known.policy, Passing(EXPERTS, 2))
    assert known.layers[0].runner.router._compute_routing.__func__ is CPURouter._compute_routing


def test_a_selector_of_another_shape_is_refused() -> None:
    """Before anything is compared by fingerprint."""
    other = random_selector(tiny_model("qwen3_moe"))
    assert os.environ.get(vllm_metrics.FOLDER) is None
    with pytest.raises(SelectorError, match="load the model it was trained for"):
        Acting(SimpleNamespace(), acting().layers[:1], other.at_threshold(SOME))
