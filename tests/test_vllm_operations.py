"""How many operations a vLLM layer that skips takes more than an untouched one: in PyTorch, and through the policy's kernels.

As in `test_kernels_triton`, kernels run in a process of their own.
"""

from collections import Counter
from functools import partial
from importlib.util import find_spec
from unittest import mock

import numpy as np
import pytest
import test_vllm_engine
import torch
from launches import Launches
from test_kernels_triton import Run, interpreter
from test_vllm_engine import acting, inputs

from lynx_learn.selector.selector import ThresholdPolicy

__all__ = ["interpreter"]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

ROWS = 8
KERNELS = {"_costs_by_expert": 1, "_rewrite": 1, "_codes": 1, "_outputs": 1, "_sum": 1}


def operations(kernel: str) -> Counter[str]:
    """Of a decode step in one layer, as if it were on a device."""
    with mock.patch.object(test_vllm_engine, "ThresholdPolicy", partial(ThresholdPolicy, kernel=kernel)):
        found = acting()
    hidden, logits = inputs(ROWS)
    runner = found.layers[0].runner
    hook = runner.lynx_learn
    hook.gathers = False  # which is for CPUs
    found.rows.fill(np.ones(ROWS, np.float32))
    counted = []
    for _ in range(2):  # the first time makes what is kept
        indices, weights = runner.router.rule(logits)
        ids, output = indices.int(), torch.zeros_like(hidden)
        hook.experts = lambda output=output, **_: output
        with Launches() as launches:
            hook.decide(hidden, logits, weights, ids)
            hook.run_experts(hidden, weights, ids)
        counted.append(launches.seen)
    return counted[-1]


def test_kernels_take_a_third_of_the_operations(interpreter: Run) -> None:
    plain, fused = interpreter(operations, "torch"), interpreter(operations, "triton")
    print(f"{sum(plain.values())} operations in PyTorch, {sum(fused.values())} through kernels: {dict(fused)}")
    assert {name: fused[name] for name in KERNELS} == KERNELS
    assert not KERNELS.keys() & plain.keys()
    assert sum(fused.values()) <= 40
    assert 3 * sum(fused.values()) < sum(plain.values())
