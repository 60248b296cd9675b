"""The vLLM plugin's own parts, without vLLM: stand-ins take the places of what it wraps."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
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
from lynx_learn.integrations.vllm.acting import acting as vllm_acting
from lynx_learn.integrations.vllm.acting import audit as vllm_audit
from lynx_learn.integrations.vllm.acting.acting import Acting
from lynx_learn.integrations.vllm.acting.layer import NAME
from lynx_learn.integrations.vllm.acting.rows import Levels
from lynx_learn.integrations.vllm.layers import EngineLayer
from lynx_learn.integrations.vllm.settings import Settings, UnsupportedError
from lynx_learn.moe.decision import Routing, Sums
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.identity import Passing
from lynx_learn.selector.selector import ThresholdPolicy

SOME = 2.0  # costs of typical assignments are around 1
ROWS, REAL = 10, 8
BUDGET = 0.01


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (vllm_engine, vllm_acting):
        monkeypatch.setattr(module, "logger", lambda: logging.getLogger("lynx_learn"))
    monkeypatch.setattr(vllm_engine, "_tensor_rank", lambda: 0)
    monkeypatch.delenv(vllm_metrics.FOLDER, raising=False)


def acting(policy_thresholds: dict[int, float] | None = None, rank: int = 0, **changes: Any) -> Acting:
    """Every MoE layer of a tiny model behind stand-ins, with a random selector."""
    model = tiny_model("qwen3_moe")
    selector = random_selector(model)
    # Half and twice as strict as the server's budget.
    table = {"0.03": {"1": 2 * SOME}, "0.003": {"1": SOME / 2, "3": SOME / 2, "4": 0.0}, "0.001": {"1": 0.0}}
    selector.config = replace(selector.config, thresholds={"kl": table})
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
    engine = SimpleNamespace(execute_model=None, _model_forward=None, reload_weights=None, vllm_config=engine_config())
    found = Acting(engine, layers, ThresholdPolicy(selector, policy_thresholds or {1: SOME}, ""), Settings("x", BUDGET))
    found.attach(1, rank)
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


def step(found: Acting, rows: int, kept: tuple[int, ...] = ()) -> None:
    """A decode step whose first rows are real, and some of them keep everything."""
    scale = np.ones(rows, np.float32)
    scale[list(kept)] = math.inf
    found.rows.fill(scale)


def untouched(found: Acting, hidden: Tensor, logits: Tensor) -> bool:
    """Whether a layer runs as if nothing were attached."""
    indices, weights = found.layers[0].runner.router.rule(logits)
    before = found.sums.clone()
    ran = run_layer(found, hidden, logits)
    same = torch.equal(ran[0], weights) and torch.equal(ran[1], indices.int())
    return same and torch.equal(ran[2], run_experts(weights, indices)) and torch.equal(found.sums, before)


def test_without_a_decode_step_nothing_changes() -> None:
    found = acting()
    assert untouched(found, *inputs())
    step(found, ROWS)
    assert not untouched(found, *inputs())
    found.rows.clear()
    assert found.rows.scale.isposinf().all()
    assert untouched(found, *inputs())


def test_what_a_graph_captures_decides_by_the_buffer_alone() -> None:
    """Rows that all keep everything run to the last bit as they are, and a value that is written later acts."""
    found = acting()
    found.rows.captured = ROWS
    hidden, logits = inputs()
    indices, weights = found.layers[0].runner.router.rule(logits)
    ran = run_layer(found, hidden, logits)
    assert torch.equal(ran[0], weights)
    assert torch.equal(ran[1], indices.int())
    assert torch.equal(ran[2], run_experts(weights, indices))
    assert not found.sums.any()
    found.rows.scale.fill_(1)
    assert (run_layer(found, hidden, logits)[0] == 0).any()
    larger = inputs(ROWS + 1)
    assert torch.equal(run_layer(found, *larger)[0], found.layers[0].runner.router.rule(larger[1])[1])


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_decode_step_runs_the_policys_decision(scale: float, rank: int) -> None:
    """As the policy itself decides on the real rows with the weights that the experts' output is scaled by in the end."""
    found = acting(rank=rank, routed_scaling_factor=scale)
    hidden, logits = inputs()
    indices, weights = found.layers[0].runner.router.rule(logits)
    step(found, REAL)
    ran = run_layer(found, hidden, logits)
    real = slice(0, REAL)
    parts = (hidden[real], logits[real], indices[real], weights[real] * scale)
    routing = Routing(*(part.unsqueeze(0) for part in parts), active=torch.ones(1, REAL, dtype=torch.bool))
    ready = found.policy.ready[0]
    wanted = ready.selector.decide(routing, ready.threshold(routing.active), ready.costs(routing))
    assert wanted.addition is not None
    assert wanted.loads is not None
    # What stays is the router's own, to the last bit.
    assert torch.equal(ran[0][real], weights[real].where(wanted.weights[0] > 0, 0))
    assert torch.equal(ran[1][real].long(), wanted.indices[0])
    added = wanted.addition[0] if rank == 0 else torch.zeros_like(wanted.addition[0])
    routed = run_experts(ran[0], ran[1])
    torch.testing.assert_close((ran[2] - routed)[real] * scale, added, rtol=1e-4, atol=1e-4)
    # The kernel is given no row that has nothing to say.
    assert found.layers[0].runner.routed_experts.called["topk_weights"].all()
    before, after = (int(part.sum()) for part in wanted.loads)
    assert after < before
    assert found.sums[0].tolist()[:3] == [before, after, REAL * TOP_K]
    # Rows of padding load nothing of their own.
    assert set(ran[1][REAL:].flatten().tolist()) <= set(ran[1][real].flatten().tolist())


def test_an_output_that_is_reduced_already_is_added_to_by_every_worker() -> None:
    found = acting(rank=1, _fused_output_is_reduced=True)
    step(found, ROWS)
    weights, ids, output = run_layer(found, *inputs())
    assert not torch.allclose(output, run_experts(weights, ids))


def test_rows_that_opted_out_keep_everything_and_do_not_vote() -> None:
    found = acting()
    hidden, logits = inputs()
    indices, weights = found.layers[0].runner.router.rule(logits)
    kept = (1, 4)
    step(found, REAL, kept)
    ran = run_layer(found, hidden, logits)
    for row in kept:
        assert torch.equal(ran[0][row], weights[row])
        assert torch.equal(ran[1][row], indices[row].int())
        torch.testing.assert_close(ran[2][row], run_experts(weights[[row]], indices[[row]])[0])
    assert (ran[0][:REAL] == 0).any()  # the others skip
    few = acting({REAL: SOME})  # with two rows less than that, nothing may be skipped
    step(few, REAL, kept)
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
    step(found, REAL)
    assert (run_layer(found, hidden, logits)[1][REAL:] == -1).all()


def scheduled(**own: Any) -> Any:
    """As much of what vLLM schedules for a step as is looked at; by default nothing."""
    plain = {"scheduled_new_reqs": [], "num_scheduled_tokens": {}, "finished_req_ids": set()}
    return SimpleNamespace(**{**plain, "scheduled_spec_decode_tokens": {}, **own})


class Batch:
    """Requests of a step: how many tokens of each are scheduled, computed, prompt, and drafts."""

    def __init__(self, planned: list[int], computed: list[int], prompt: list[int], drafts: Sequence[int] = ()) -> None:
        self.num_reqs = len(planned)
        self.req_ids = [str(i) for i in range(self.num_reqs)]
        self.num_computed_tokens_cpu = np.array([*computed, 99])
        self.num_prompt_tokens = np.array([*prompt, 0])
        self.scheduled = scheduled(
            num_scheduled_tokens=dict(zip(self.req_ids, planned, strict=True)),
            scheduled_spec_decode_tokens={str(i): [-1] * count for i, count in enumerate(drafts) if count},
        )
        # As the second model runner has it.
        self.num_scheduled_tokens = np.array(planned)
        self.is_prefilling_np = np.array(computed) < np.array(prompt)


DECODE = Batch([1, 1, 1], [5, 9, 7], [5, 5, 5])
KEPT = math.inf


@pytest.mark.parametrize("second", [False, True], ids=["first runner", "second runner"])
@pytest.mark.parametrize(
    ("batch", "asked", "outcome", "scale"),
    [
        (DECODE, {}, "acted", [1, 1, 1]),
        (DECODE, {"1": 0}, "acted", [1, KEPT, 1]),
        (DECODE, {"1": 0.03}, "acted", [1, 0.5, 1]),
        (DECODE, {"1": 0.003}, "acted", [1, 2, 1]),
        (DECODE, {"1": 0.001}, "acted", [1, KEPT, 1]),  # which skips nothing at any size
        (DECODE, {"1": 0.7}, "acted", [1, KEPT, 1]),  # and one that nothing is known of
        (DECODE, {"0": 0, "1": 0, "2": 0}, "opted_out", None),
        (DECODE, {"0": 0, "2": 0}, "below_smallest_size", None),
        (DECODE, {"0": 0, "2": 0.001}, "below_smallest_size", None),
        # The last token of a prompt, by itself; and a prompt of as many tokens as leave experts alone.
        (Batch([1, 1, 1], [5, 4, 7], [5, 5, 5]), {}, "acted", [1, KEPT, 1]),
        (Batch([1, 3, 1], [5, 0, 7], [5, 5, 5]), {}, "acted", [1, KEPT, KEPT, KEPT, 1]),
        (Batch([1, 9, 1], [5, 0, 7], [5, 9, 5]), {}, "mixed", None),
        (Batch([5, 3], [0, 2], [5, 5]), {}, "prefill", None),
        # Text that is computed again after a preemption.
        (Batch([1, 3, 1], [5, 5, 7], [5, 5, 5]), {}, "acted", [1, KEPT, KEPT, KEPT, 1]),
        # Drafts are rows of their requests.
        (Batch([3, 1, 2], [5, 9, 7], [5, 5, 5], [2, 0, 1]), {}, "acted", [1] * 6),
        (Batch([3, 1, 2], [5, 9, 7], [5, 5, 5], [2, 0, 1]), {"0": 0, "2": 0.03}, "acted", [KEPT] * 3 + [1, 0.5, 0.5]),
        (Batch([3, 4], [5, 0], [5, 5], [2, 0]), {}, "acted", [1] * 3 + [KEPT] * 4),
        (Batch([3, 1], [5, 4], [5, 5], [2, 0]), {"0": 0}, "opted_out", None),
        (Batch([2], [5], [5], [1]), {}, "acted", [1, 1]),  # a batch of two rows
    ],
)
def test_steps(batch: Batch, asked: dict[str, float], outcome: str, scale: list[float] | None, second: bool) -> None:
    found = acting({2: SOME})
    found.asked = asked
    found.scheduled = batch.scheduled
    if second:
        assert found._prepare_inputs(lambda: batch) is batch
    else:
        found.runner.input_batch = batch
        found._model_forward(lambda: None)
    assert found.outcome == outcome
    assert found.rows.acts is (scale is not None)
    wanted = torch.full_like(found.rows.scale, math.inf if scale is None else 0)
    wanted[: len(scale or ())] = torch.tensor(scale or ())
    assert torch.equal(found.rows.scale, wanted)


def test_an_audit_compares_the_first_row_of_each_request() -> None:
    """Those behind it may be drafts that are not taken."""
    found = acting()
    batch = Batch([3, 1, 2, 2], [5, 9, 7, 7], [5, 5, 5, 5], [2, 0, 1, 1])
    found.asked, found.scheduled, found.runner.input_batch = {"1": 0, "2": 0.03}, batch.scheduled, batch
    found._model_forward(lambda: None)
    assert found.own_budget.tolist() == [0, 6]
    assert found.tokens == {"budget": 5, "level": 2, "opted_out": 1}


@pytest.mark.parametrize(
    ("calibrated", "drafts", "line"),
    [
        ({}, 0, ""),
        ({}, 2, "speculative_tokens 2 (certified: 0): run `lynx-learn calibrate --speculative_tokens 2`"),
        ({"speculative_tokens": 2}, 2, ""),
        ({"speculative_tokens": 2}, 0, "speculative_tokens 0 (certified: 2)"),
    ],
)
def test_an_engine_that_speculates_otherwise_says_so(
    calibrated: dict[str, int], drafts: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    log = SimpleNamespace(warning_once=lambda text, *args: said.append(text % args))
    monkeypatch.setattr(vllm_engine, "logger", lambda: log)
    own = replace(acting().policy.selector.config, calibration={"kl": calibrated})
    vllm_engine.say_of_drafts(SimpleNamespace(num_speculative_tokens=drafts) if drafts else None, own)
    assert len(said) == bool(line)
    assert line in "".join(said)


def test_a_level_counts_with_the_rows_that_may_skip() -> None:
    """One that leaves its requests nothing at this size makes the others a smaller batch."""
    own = acting().policy.selector.config
    levels = Levels({1: SOME, 4: 4 * SOME}, BUDGET, own)
    asked = np.array([BUDGET, BUDGET, 0.003, 0.003])
    outcome, scale = levels.scales(asked, BUDGET)
    assert (outcome, scale.tolist()) == ("acted", [1, 1, KEPT, KEPT])  # four rows: 0.003 has no threshold there
    twice = levels.threshold(BUDGET, 3) / (SOME / 2)
    assert levels.scales(asked[1:], BUDGET)[1].tolist() == pytest.approx([1, twice, twice])


def engine_steps(found: Acting, forward: Callable[[], None], steps: int = 1) -> None:
    """Decode steps of two requests through the wrapped runner."""
    found.runner.input_batch = Batch([1, 1], [5, 5], [5, 5])
    for _ in range(steps):
        new = SimpleNamespace(req_id="7", sampling_params=SimpleNamespace(extra_args={"lynx": False}))
        tokens = {"0": 1, "1": 1}
        step = scheduled(scheduled_new_reqs=[new], num_scheduled_tokens=tokens, finished_req_ids={"old"})
        found.asked["old"] = 0.0
        found._execute_model(lambda *_: found._model_forward(forward), step)


def test_self_check_passes_when_every_layer_ran_the_decision() -> None:
    found = acting()
    hidden, logits = inputs(2)

    def forward() -> None:
        assert found.rows.acts
        for layer in range(len(found.layers)):
            run_layer(found, hidden, logits, layer)

    engine_steps(found, forward)
    assert found.checked is not None
    before = found.checked.clone()
    engine_steps(found, forward, vllm_acting.CHECK_EVERY)
    assert (found.checked > before).all()
    assert found.outcomes["acted"] == 1 + vllm_acting.CHECK_EVERY
    assert found.asked == {"7": 0.0}
    assert not found.rows.acts
    assert not found.sums[:, Sums.CHECK].any()


@pytest.mark.parametrize("second", [False, True], ids=["first runner", "second runner"])
def test_an_audited_step_is_run_twice_and_counted_once(second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found, plain = acting(), acting()
    hidden, logits = inputs(2)
    batch, runs = Batch([1, 1], [5, 5], [5, 5]), []
    monkeypatch.setattr(vllm_audit, "_own_context", lambda own: own())
    model = SimpleNamespace(compute_logits=lambda states: states)
    found.audit = vllm_audit.Audit(model, found.rows, 2)  # type: ignore[arg-type]

    def forward(skipping: Acting) -> Tensor:
        runs.append(skipping.rows.acts)
        return [run_layer(skipping, hidden, logits, layer)[2] for layer in range(len(skipping.layers))][-1]

    def step(skipping: Acting) -> Any:
        new = batch.scheduled
        skipping.runner.input_batch = batch
        own = partial(forward, skipping)
        if second:
            return skipping._execute_model(
                lambda _: (skipping._prepare_inputs(lambda: batch), skipping._forward(own))[1], new
            )
        return skipping._execute_model(lambda _: skipping._model_forward(own), new)

    for audited in (True, False, True):
        runs.clear()
        served = step(found)
        assert runs == ([False, True] if audited else [True])
        assert torch.equal(served, step(plain))
    assert torch.equal(found.sums, plain.sums)
    assert found.audit.sums[:-1].sum() == 2 * 2
    assert found.tokens == {"budget": 6, "level": 0, "opted_out": 0}
    found.asked = {"0": 0.0, "1": 0.03}  # nobody asks for the server's budget
    for _ in range(2):
        step(found)
    assert found.audit.sums[:-1].sum() == 2 * 2
    assert found.tokens == {"budget": 6, "level": 2, "opted_out": 2}


def test_what_lagged_behind_is_counted_when_the_engine_has_nothing_left_to_run(tmp_path: Path) -> None:
    found = acting()
    found.first, found.slots = True, vllm_metrics.open_slots(tmp_path, "worker")
    found.sums += 1  # what the device did after the last step was published
    found._execute_model(lambda _: None, scheduled(finished_req_ids={"7"}))
    totals = vllm_metrics.read_totals(tmp_path)
    assert all(totals[name] == len(found.layers) for name in vllm_metrics.SUMS)


def test_a_name_that_comes_back_is_a_new_request() -> None:
    """In the very step that ends the last request of that name."""
    found = acting()
    for out in (True, False, True):
        new = SimpleNamespace(req_id="7", sampling_params=SimpleNamespace(extra_args={"lynx": not out}))
        step = scheduled(scheduled_new_reqs=[new], num_scheduled_tokens={"7": 1}, finished_req_ids={"7"})
        found._execute_model(lambda _: None, step)
        assert found.asked == ({"7": 0.0} if out else {})


def test_weights_that_are_replaced_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = acting()
    found.runner.get_model = lambda: None
    found.runner.model_config = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=2))
    monkeypatch.setattr(vllm_acting, "find_layers", lambda *_: found.layers)
    monkeypatch.setattr(vllm_acting, "looking", lambda *_: nullcontext())
    found._reload_weights(lambda: None)
    assert not found.stopped
    found.layers[0].router.weight.data[0, 0] += 1
    with pytest.raises(UnsupportedError, match="differs in its routers"):
        found._reload_weights(lambda: None)
    engine_steps(found, lambda: None)
    assert not any(found.outcomes.values())
    assert untouched(found, *inputs())


def test_self_check_fails_when_a_layer_did_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vllm_metrics.FOLDER, str(tmp_path / "lynx-learn-1-x"))
    monkeypatch.setattr(vllm_metrics, "parent_process", lambda: True)  # a worker's process
    found = acting()
    hidden, logits = inputs(2)
    with pytest.raises(UnsupportedError, match=r"experts of 1 of 2 layers \(model.layers.1.mlp, …\)"):
        engine_steps(found, lambda: run_layer(found, hidden, logits) and None)
    assert "in decode steps" in (tmp_path / "lynx-learn-1-x" / vllm_metrics.REFUSED).read_text()
    assert untouched(found, *inputs())


@pytest.mark.parametrize("late", [False, True])
def test_self_check_fails_when_other_experts_are_run(late: bool) -> None:
    """Also long after it has passed."""
    found = acting()
    hidden, logits = inputs(2)
    sound = late

    def forward() -> None:
        for layer in found.layers:
            weights, ids = layer.runner.router._compute_routing(hidden, logits, None)
            other = ids if sound else (ids + 1) % EXPERTS
            layer.runner.routed_experts.forward_modular(x=hidden, topk_weights=weights, topk_ids=other)

    if late:
        engine_steps(found, forward)
        sound = False
    with pytest.raises(UnsupportedError, match="2 of 2 layers"):
        engine_steps(found, forward, vllm_acting.CHECK_EVERY)
    assert found.outcomes["acted"] == (1 + vllm_acting.CHECK_EVERY if late else 1)
    assert found.stopped


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
    assert not any(hasattr(layer.runner, NAME) for layer in known.layers)


def test_a_selector_of_another_shape_is_refused() -> None:
    """Before anything is compared by fingerprint."""
    other = random_selector(tiny_model("qwen3_moe"))
    assert os.environ.get(vllm_metrics.FOLDER) is None
    with pytest.raises(SelectorError, match="load the model it was trained for"):
        Acting(SimpleNamespace(), acting().layers[:1], other.at_threshold(SOME), Settings("x", BUDGET))
