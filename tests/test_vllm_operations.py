"""A vLLM layer that skips, in PyTorch and through the policy's kernels: that both do the same, and how many operations they take.

As in `test_kernels_triton`, kernels run in a process of their own.
"""

import math
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import numpy as np
import pytest
import test_vllm_engine
import torch
from kernel_cases import ready_for, routing_of
from launches import Launches
from test_kernels_triton import Compile, Run, compiler, interpreter, needs_gpu, one
from test_vllm_engine import acting
from tiny import EXPERTS, HIDDEN, TOP_K, random_selector, tiny_model
from torch import Tensor

from lynx_learn.integrations.vllm.acting.acting import Acting
from lynx_learn.moe.decision import Sums
from lynx_learn.selector.selector import ThresholdPolicy

__all__ = ["compiler", "interpreter"]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

REAL, PADDED = 7, 10
DECIDING, ANSWERING, LAST = ("_costs_by_expert", "_act"), ("_codes", "_outputs"), ("_finish",)


@dataclass(frozen=True)
class Case:
    """A decode step of one layer; rows behind `scale` are padding, which name no expert."""

    scale: tuple[float, ...] = (1.0,) * REAL
    factor: float = 1.0
    rank: int = 4
    worker: int = 0
    keep_top1: bool = False
    wider: int = 0
    ids: torch.dtype = torch.int32
    dtype: torch.dtype = torch.float32
    plain: bool = False
    """Whether nothing is left out."""


CASES = {
    "plain": Case(),
    "levels and requests that opted out": Case(scale=(1.0, math.inf, 0.4, 3.0, 1.0, math.inf, 1.0)),
    "all opted out, as a graph is captured": Case(scale=(math.inf,) * REAL, plain=True),
    "nothing but padding": Case(scale=(), plain=True),
    "an output that is scaled": Case(factor=2.5, keep_top1=True),
    "another worker's surrogates": Case(worker=1),
    "no surrogates": Case(rank=0, ids=torch.int64),
    "wider hidden states in fewer bits": Case(wider=8, dtype=torch.bfloat16),
}


def layer_of(kernel: str, case: Case, device: str = "cpu") -> Acting:
    policy, selector = partial(ThresholdPolicy, kernel=kernel), partial(random_selector, keep_top1=case.keep_top1)
    with mock.patch.multiple(
        test_vllm_engine,
        ThresholdPolicy=policy,
        random_selector=partial(selector, rank=case.rank),
        tiny_model=lambda name: tiny_model(name).to(device),
    ):
        found = acting(rank=case.worker, routed_scaling_factor=case.factor)
    found.layers[0].runner.lynx_learn.gathers = False  # which is for CPUs
    return found


def step(found: Acting, case: Case, seed: int = 0, meanwhile: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and experts that are run, and what a layer returns."""
    generator, device = torch.Generator().manual_seed(seed), found.rows.scale.device
    hidden = torch.randn(PADDED, HIDDEN + case.wider, generator=generator).to(device, case.dtype)
    logits = 2 * torch.randn(PADDED, EXPERTS, generator=generator).to(device)
    runner, output = found.layers[0].runner, torch.zeros_like(hidden)
    indices, weights = runner.router.rule(logits)
    ids, logits = indices.to(case.ids), logits.to(case.dtype)
    ids[len(case.scale) :] = -1
    hook = runner.lynx_learn
    hook.experts = lambda **_: output
    found.rows.fill(np.array(case.scale, np.float32))
    with meanwhile or nullcontext():
        hook.decide(hidden, logits, weights, ids)
        hook.run_experts(hidden, weights, ids)
    return weights, ids, output


def both(case: Case, device: str = "cpu") -> list[tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]]:
    """What two steps give and count, in PyTorch and through kernels."""
    from lynx_learn.selector.kernels.in_place import InPlace

    done = []
    with mock.patch.object(InPlace, "decide", autospec=True, side_effect=InPlace.decide) as used:
        for kernel in ("torch", "triton"):
            found = layer_of(kernel, case, device)
            done.append(([step(found, case, seed) for seed in range(2)], found.sums[0].clone()))
    assert used.call_count == 2
    return done


def check(case: Case, done: list[tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]]) -> None:
    (wanted, counted), (found, sums) = done
    real, skips = len(case.scale), not case.plain
    assert torch.equal(sums, counted)
    assert sums[Sums.CHECK] == 0
    assert sums[Sums.ASSIGNMENTS] == 2 * real * TOP_K * skips
    assert bool(sums[Sums.ANSWERED]) is (skips and case.rank > 0)
    for (weights, ids, output), (own_weights, own_ids, own_output) in zip(wanted, found, strict=True):
        assert torch.equal(own_weights, weights)
        assert torch.equal(own_ids, ids)
        assert (own_ids[real:] == -1).all()
        assert bool((own_weights[:real] == 0).any()) is skips
        error = 2e-2 if case.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(own_output[:real], output[:real], rtol=error, atol=error * float(output.abs().max()))
        assert bool(own_output[:real, :HIDDEN].any()) is (skips and case.rank > 0 and not case.worker)
        assert not own_output[:, HIDDEN:].any()


@pytest.mark.parametrize("name", CASES)
def test_kernels_do_what_pytorch_does(interpreter: Run, name: str) -> None:
    check(CASES[name], interpreter(both, CASES[name]))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_do_what_pytorch_does(name: str) -> None:
    check(CASES[name], both(CASES[name], "cuda"))


def operations(kernel: str, rank: int) -> Counter[str]:
    """Of a decode step in one layer, as if it were on a device."""
    found, counted = layer_of(kernel, Case(rank=rank)), Launches()
    step(found, Case())  # the first time makes what is kept
    step(found, Case(), meanwhile=counted)
    return counted.seen


@pytest.mark.parametrize("rank", [0, 4])
def test_a_layer_takes_five_launches(interpreter: Run, rank: int) -> None:
    """Two decide, rewrite and count, two answer, and the last one adds that to the output and checks what was run."""
    plain, fused = interpreter(operations, "torch", rank), interpreter(operations, "triton", rank)
    print(f"{sum(plain.values())} operations in PyTorch, {sum(fused.values())} through kernels: {dict(fused)}")
    assert fused == dict.fromkeys((*DECIDING, *(ANSWERING if rank else ()), *LAST), 1)
    assert not fused.keys() & plain.keys()


def compile_for_hopper(tokens: int, experts: int, top_k: int, hidden: int, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes of machine code and of shared memory, by kernel."""
    from lynx_learn.selector.kernels import answers, in_place, triton

    done: dict[str, Any] = {}
    ready = ready_for(experts, top_k, hidden, table={1: 1.0, 4: 2.0})
    ready.selector.surrogates.to(dtype)
    routing = one(routing_of(tokens, experts, top_k, hidden, (dtype, dtype, torch.float32)))
    routing = routing._replace(indices=routing.indices.int(), active=routing.active.float())
    fused = triton.Fused(ready.folded, ready.selector.surrogates, ready.thresholds, False)
    with ExitStack() as stack:
        kernels = {triton: DECIDING[:1], answers: ANSWERING, in_place: (*DECIDING[1:], *LAST)}
        for module, name in [(module, name) for module, names in kernels.items() for name in names]:
            stack.enter_context(mock.patch.object(module, name, Compile(getattr(module, name), done)))
        finish = in_place.InPlace(fused, 2.5, True).decide(routing, torch.zeros(len(Sums), dtype=torch.int64))
        finish(routing.hidden, routing.indices)
    return done


@pytest.mark.parametrize("sizes", [(64, 128, 8, 2048, torch.bfloat16), (512, 512, 16, 7168, torch.float32)])
def test_the_kernels_compile_without_a_device(compiler: Run, sizes: tuple[Any, ...]) -> None:
    done = compiler(compile_for_hopper, *sizes)
    assert done.keys() == {*DECIDING, *ANSWERING, *LAST}
    for code, shared in done.values():
        assert code > 0
        assert shared <= 48 * 1024
