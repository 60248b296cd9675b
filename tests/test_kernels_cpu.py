"""The compiled decision on a CPU against the PyTorch form."""

import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from decisions import COSTS, INDICES, WEIGHTS, random_routing
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BY_HAND,
    LARGE,
    check_loads_are_consistent,
    check_rewritten,
    decide_one,
    drawn,
    put_between,
    ready_for,
    routing_of,
)
from tiny import decode, random_selector, tiny_model, words
from torch import Tensor

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.errors import OptionError
from lynx_learn.moe.decision import Decision, Routing, each_tensor
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.selector.layer import Ready
from lynx_learn.selector.scorers import Folded
from lynx_learn.selector.selector import ThresholdPolicy

pytestmark = pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def compiled(ready: Ready) -> Any:
    from lynx_learn.selector.kernels.compiled import Compiled

    own = ready.selector
    return Compiled(ready.folded, own.surrogates, ready.thresholds, own.keep_top1)


def check_answer(done: Decision, ready: Ready, routing: Routing) -> None:
    """What surrogates answer, as a product with all of them in float32 says; of hidden states that are numbers."""
    assert done.answered is not None
    shares = torch.zeros(routing.logits.shape).scatter_add(
        -1, routing.indices, routing.weights.float() * done.answered.float()
    )
    surrogates = ready.selector.surrogates
    dtype = surrogates.down.dtype
    wanted = surrogates.float()(routing.hidden.float(), shares)
    surrogates.to(dtype)
    found = torch.zeros_like(wanted) if done.addition is None else done.addition
    assert (done.addition is not None) == bool(done.answered.any())
    real = routing.hidden.isfinite().all(-1)
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_decides_as_pytorch_does(data: st.DataObject) -> None:
    ready, routing, _, close = drawn(data.draw, rank=data.draw(st.sampled_from([1, 4, 7])))
    done = decide_one(compiled(ready), routing)
    check_loads_are_consistent(done, routing)
    check_answer(done, ready, routing)
    assume(not close)
    check_rewritten(done, ready.rewrite(routing))


@pytest.mark.parametrize("keep_top1", [False, True])
def test_exempt_tokens_keep_their_experts_and_are_not_counted(keep_top1: bool) -> None:
    routing, ready = routing_of(6, 12, 3, 8, active=0.9), ready_for(12, 3, 8, keep_top1=keep_top1)
    ready = replace(ready, thresholds=torch.tensor([0.0, 0.0, math.inf, 0.0]))
    exempt = torch.tensor([[True, False, False, True, True, True]])
    assert (routing.active & ~exempt).sum() == 2
    scale = torch.where(exempt, math.inf, 1.0)
    done = decide_one(compiled(ready), routing, scale)
    check_rewritten(done, ready.rewrite(routing, scale))
    assert done.answered.any()
    assert not done.answered[exempt].any()


def test_costs_count_as_many_times_as_their_token_says() -> None:
    routing, ready = routing_of(6, 12, 3, 8, active=0.9), ready_for(12, 3, 8)
    put_between(ready, routing)
    scale = torch.tensor([[0.1, 1.0, 10.0, math.inf, 0.1, 3.0]])
    done = decide_one(compiled(ready), routing, scale)
    check_rewritten(done, ready.rewrite(routing, scale))
    plain = decide_one(compiled(ready), routing)
    assert not torch.equal(done.weights, plain.weights)


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("surrogates", [torch.float32, torch.bfloat16])
def test_large_batches(case: str, surrogates: torch.dtype) -> None:
    tokens, experts, top_k, hidden, scorer, dtype, keep_top1 = LARGE[case]
    routing = routing_of(tokens, experts, top_k, hidden, (dtype,) * 3)
    ready = ready_for(experts, top_k, hidden, scorer, keep_top1, rank=5)
    ready.selector.surrogates.to(surrogates)
    put_between(ready, routing)
    done = decide_one(compiled(ready), routing)
    check_rewritten(done, ready.rewrite(routing))
    check_answer(done, ready, routing)
    assert 0 < done.loads[1].sum() < done.loads[0].sum()


def test_a_projection_that_is_large_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from lynx_learn.selector.kernels import compiled as module

    routing, ready = routing_of(9, 16, 4, 64), ready_for(16, 4, 64)
    put_between(ready, routing)
    inside = decide_one(compiled(ready), routing)
    monkeypatch.setattr(module, "_LARGE", 1)
    check_rewritten(decide_one(compiled(ready), routing), inside)


def costing(costs: Tensor) -> tuple[Folded, Tensor]:
    """A scorer, and logits `(1, T, 4)`, by which the assignments of INDICES cost so much: e^logit, and NaN by expert."""
    of_assignment, experts = torch.zeros(5, 1), torch.zeros(4, 1)
    of_assignment[3] = 1.0
    experts[INDICES[costs.isnan()]] = math.nan
    logits = torch.zeros(1, 3, 4).scatter(-1, INDICES, costs.nan_to_num(nan=1.0, posinf=1e38).log() + costs.isinf())
    logits = torch.where(logits > 80, 100.0, logits)  # e^100 is infinite
    return Folded(of_assignment, torch.zeros(9, 1), experts, torch.zeros(2, 0), torch.zeros(0)), logits


@pytest.mark.parametrize("active", [(True, True, True), (True, False, True), (False, False, False)])
@pytest.mark.parametrize("case", BY_HAND)
def test_the_rule_on_costs_by_hand(case: str, active: tuple[bool, ...]) -> None:
    threshold, changes, keep_top1 = BY_HAND[case]
    costs = 4 * COSTS  # a logarithm of 1 is exact, and the cost is 1 again
    if case == "a cost equal to the threshold":
        costs = torch.where(torch.isin(INDICES, torch.tensor([1, 2])), 1.0, costs)
    for place, value in changes.items():
        costs[0][place] = 4 * value
    folded, logits = costing(costs)
    ready = replace(ready_for(4, 2, 2, keep_top1=keep_top1), folded=folded, thresholds=torch.tensor([4 * threshold]))
    routing = Routing(torch.ones(1, 3, 2), logits, INDICES, WEIGHTS, torch.tensor([active]))
    done = decide_one(compiled(ready), routing)
    check_rewritten(done, ready.rewrite(routing))
    check_loads_are_consistent(done, routing)
    if all(active):
        gone = {"some": 4, "a cost equal to the threshold": 0, "everything": 5, "each first expert": 2}
        assert done.answered.sum() == gone.get(case, done.answered.sum())


def both(model: Any, routing: Routing, **options: Any) -> tuple[Decision, Decision]:
    """What a policy decides in PyTorch, and compiled."""
    layers, decisions = find_moe_layers(model), []
    one = each_tensor(lambda part: part[0], routing)
    for kernel in ("torch", "numba"):
        policy = ThresholdPolicy(random_selector(model, **options), {1: 2.0}, "", kernel)
        policy.bind(layers)
        decision = policy.decide_one(layers[0], one)
        decisions.append(each_tensor(lambda part: part.unsqueeze(0), decision))
    return decisions[0], decisions[1]


@pytest.mark.parametrize(("scorer", "rank"), [("formula", 0), ("linear", 4), ("mlp", 4)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_policy_decides_the_same(scorer: str, rank: int, contiguous: bool) -> None:
    model = tiny_model("qwen3_moe")
    routing = random_routing(find_moe_layers(model)[0], 1)
    if not contiguous:
        routing = routing._replace(
            logits=routing.logits.mT.contiguous().mT,
            hidden=routing.hidden.repeat(1, 1, 2)[..., : routing.hidden.shape[-1]],
        )
    plain, done = both(model, routing, rank=rank, scorer=scorer)
    assert (done.weights != routing.weights)[routing.active].any()
    assert torch.equal(done.indices, plain.indices)
    assert torch.equal(done.weights, plain.weights)
    if rank:
        torch.testing.assert_close(done.addition, plain.addition)
    else:
        assert done.addition is None
        assert done.answered is None


def test_a_step_in_bfloat16_decides_on_rounded_values_as_pytorch_does() -> None:
    model = tiny_model("qwen3_moe").bfloat16()
    layer = find_moe_layers(model)[0]
    routing = random_routing(layer, 1)
    routing = Routing(*(part.bfloat16() if part.is_floating_point() else part for part in routing))
    plain, done = both(model, routing)
    assert done.weights.dtype == torch.bfloat16
    assert torch.equal(done.indices, plain.indices)
    torch.testing.assert_close(done.addition, plain.addition.float(), rtol=0.05, atol=0.05)


def test_what_it_does_not_take() -> None:
    ready, routing = ready_for(8, 2, 4), routing_of(3, 8, 2, 4)
    takes, routing = compiled(ready).takes, each_tensor(lambda part: part[0], routing)
    assert takes(routing)
    assert not takes(routing._replace(weights=routing.weights.double()))
    assert not takes(routing._replace(indices=routing.indices.int()))
    assert not takes(Routing(*(part[:0] for part in routing)))
    assert not takes(routing._replace(weights=routing.weights.clone().requires_grad_()))


def test_where_numba_is_installed_a_cpu_decodes_with_it() -> None:
    from lynx_learn.selector.kernels.compiled import Compiled

    model = tiny_model("qwen3_moe")
    tokens, found = words(4, 12), {}
    for kernel in ("torch", "auto"):
        policy = random_selector(model).at_threshold(1.0, kernel)
        with (
            mock.patch.object(Compiled, "decide", autospec=True, side_effect=Compiled.decide) as used,
            skip_experts(model, policy) as skipping,
        ):
            used.reset_mock()
            found[kernel] = decode(model, tokens, 6)[1], skipping.stats
        assert used.call_count == (len(skipping.layers) * 6 if kernel == "auto" else 0)
    torch.testing.assert_close(found["auto"][0], found["torch"][0], rtol=1e-4, atol=1e-4)
    assert found["auto"][1] == found["torch"][1]
    assert found["auto"][1].bytes_ratio < 1


def test_it_runs_under_inference_mode() -> None:
    model = tiny_model("qwen3_moe")
    routing = random_routing(find_moe_layers(model)[0], 1)
    wanted = both(model, routing)[1]
    with torch.inference_mode():
        done = both(model, Routing(*(part.clone() for part in routing)))[1]
    check_rewritten(done, wanted)


def test_a_compiled_model_traces_the_pytorch_form() -> None:
    model = tiny_model("qwen3_moe")
    layer = find_moe_layers(model)[0]
    policy = random_selector(model).at_threshold(1.0, "numba")
    policy.bind(find_moe_layers(model))
    routing = each_tensor(lambda part: part[0], random_routing(layer, 1))
    traced: Callable[[Routing], Decision] = torch.compile(
        lambda routing: policy.decide_one(layer, routing), backend="eager", fullgraph=True
    )
    check_rewritten(traced(routing), policy.decide_one(layer, routing))


def test_threads_decide_side_by_side() -> None:
    ready = ready_for(32, 4, 64, rank=8)
    routings = [routing_of(16, 32, 4, 64, seed=seed) for seed in range(8)]
    put_between(ready, routings[0])
    decide = partial(decide_one, compiled(ready))
    alone = [decide(routing) for routing in routings]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for done, wanted in zip(pool.map(decide, routings), alone, strict=True):
                check_rewritten(done, wanted)
                assert torch.equal(done.addition, wanted.addition)


def test_what_is_compiled_is_kept_on_disk() -> None:
    from lynx_learn.selector.kernels import cpu

    compiled(ready_for(8, 2, 4))
    assert list(Path(cpu.decide.stats.cache_path).glob("cpu.decide*.nbi"))


def test_without_a_folder_that_can_be_written_it_is_compiled_each_time() -> None:
    from lynx_learn.selector.kernels import cpu

    real = cpu.numba.njit

    def njit(*signature: str, **options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(*signature, **options)

    with mock.patch.object(cpu.numba, "njit", njit):
        assert cpu.kept_on_disk(lambda x: x + 1)(1) == 2


def test_without_numba_pytorch_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_moe")
    monkeypatch.setitem(sys.modules, "lynx_learn.selector.kernels.compiled", None)
    policy = random_selector(model).at_threshold(1.0)
    policy.bind(find_moe_layers(model))
    assert not policy.compiled
    with pytest.raises(OptionError, match=r"'numba' is not usable: numba cannot be imported .* pip install"):
        random_selector(model).at_threshold(1.0, "numba").bind(find_moe_layers(model))


def test_numba_is_refused_for_types_it_does_not_know() -> None:
    model = tiny_model("qwen3_moe").half()
    with pytest.raises(
        OptionError, match="'numba' is not usable: it decides for layers on a CPU, in float32 or bfloat16"
    ):
        random_selector(model).at_threshold(1.0, "numba").bind(find_moe_layers(model))
