"""Experts grouped and combined by kernels, against PyTorch; and how many launches a decode step with skipping takes.

As in `test_kernels_triton`, kernels run in a process of their own.
"""

from collections import Counter
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
from launches import Launches
from test_kernels_triton import Compile, Run, compiler, interpreter, needs_gpu
from tiny import EXPERTS, FAMILIES, HIDDEN, TOP_K, random_selector, tiny_model, words
from torch import Tensor

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.moe import experts
from lynx_learn.moe.families import find_moe_layers

__all__ = ["compiler", "interpreter"]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
DTYPES = (torch.float32, torch.bfloat16)


def batch(tokens: int, top_k: int, count: int, dtype: torch.dtype, left_out: float) -> tuple[Tensor, Tensor]:
    """Random experts `(tokens, top_k)` and their weights, about so many of them 0."""
    generator = torch.Generator().manual_seed(tokens)
    weights = torch.rand(tokens, top_k, generator=generator)
    weights = weights.masked_fill(torch.rand(tokens, top_k, generator=generator) < left_out, 0.0)
    return torch.randint(count, (tokens, top_k), generator=generator), weights.to(dtype)


def grouped(indices: Tensor, weights: Tensor, count: int) -> tuple[Any, Tensor]:
    """In the other process: groups, and what is combined of rows that say where they lie."""
    from lynx_learn.moe.kernels import grouping

    groups = grouping.group(indices, weights, count)
    rows = torch.arange(3.0 * indices.numel()).view(-1, 3).to(weights.dtype)
    silent = int((weights == 0).sum())
    rows[len(rows) - silent :] = torch.nan  # as whatever lies in memory
    return tuple(groups), grouping.combine(rows, groups, weights, torch.float32)


@pytest.mark.parametrize("left_out", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("tokens", "top_k", "count"), [(1, 1, 1), (5, 3, 7), (16, 8, 128), (300, 7, 60)])
def test_groups_are_a_stable_sort_without_what_is_left_out(
    interpreter: Run, tokens: int, top_k: int, count: int, left_out: float
) -> None:
    indices, weights = batch(tokens, top_k, count, torch.float32, left_out)
    (expert, token, ends, places), combined = interpreter(grouped, indices, weights, count)
    wanted, order = indices.masked_fill(weights == 0, count).flatten().sort(stable=True)
    assert torch.equal(expert, wanted.clamp_max(count - 1))
    assert torch.equal(token, order // top_k)
    assert torch.equal(places[order], torch.arange(len(order)))
    assert torch.equal(ends, torch.searchsorted(wanted, torch.arange(count), right=True, out_int32=True))
    rows = torch.arange(3.0 * len(order)).view(-1, 3)[places].view(tokens, top_k, 3)
    torch.testing.assert_close(combined, (rows * weights.unsqueeze(-1)).sum(1))


def both(name: str, dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor]:
    """What a layer's experts give in PyTorch and by kernels, where an expert that is left out holds no numbers."""
    from lynx_learn.moe.kernels import grouping

    layer = find_moe_layers(tiny_model(name).to(dtype))[0]
    hidden = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    indices, weights = batch(rows, TOP_K, EXPERTS, dtype, 0.3)
    weights[indices == 3] = 0.0
    for parameter in layer.experts.parameters():
        parameter[3] = torch.nan
    assert grouping.takes(hidden, indices, weights)
    forms = experts._grouped, partial(experts._in_kernels, grouping)
    wanted, found = (form(layer.experts, hidden, indices, weights) for form in forms)
    return wanted, found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_same(interpreter: Run, name: str, dtype: torch.dtype) -> None:
    wanted, found = interpreter(both, name, dtype, 9)
    assert found.dtype == wanted.dtype
    error = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, rtol=error, atol=error * float(wanted.abs().max()))


def test_what_they_do_not_take(interpreter: Run) -> None:
    assert interpreter(taken) == [True, False, False, False, False, False]


def taken() -> list[bool]:
    from lynx_learn.moe.kernels import grouping

    hidden, (indices, weights) = torch.zeros(4, 8), batch(4, 2, 6, torch.float32, 0.0)
    many = torch.zeros(grouping.MOST_ASSIGNMENTS, 2, dtype=torch.int64)
    with torch.enable_grad():
        learning = grouping.takes(hidden, indices, weights)
    return [
        grouping.takes(hidden, indices, weights),
        grouping.takes(hidden, indices.int(), weights),
        grouping.takes(hidden, indices.T.contiguous().T, weights),
        grouping.takes(hidden.double(), indices, weights),
        grouping.takes(torch.zeros(len(many), 8), many, many.float()),
        learning,
    ]


def launches(rank: int | None) -> tuple[Counter[str], int]:
    """Of one decode step of a model, as if it were on a device; None: untouched. And how many MoE layers that is."""
    from lynx_learn.moe.kernels import grouping

    model, text = tiny_model("qwen3_moe").bfloat16(), words(6, 5)
    with mock.patch.object(experts, "_by_distinct", partial(experts._in_kernels, grouping)):
        policy = None if rank is None else random_selector(model, rank).at_threshold(2.0, "triton")
        with nullcontext() if policy is None else skip_experts(model, policy):
            cache = model(text[:, :4]).past_key_values
            with Launches() as counted:
                model(text[:, 4:], past_key_values=cache)
    return counted.seen, len(find_moe_layers(model))


DECIDING = {"_costs_by_expert": 1, "_rewrite": 1, "add_": 1}
ANSWERING = {"_codes": 1, "_outputs": 1, "_sum": 1, "add": 1}
RUNNING = {"_place": 1, "index_select": 1, "_combine": 1}
# What transformers' own path launches and this one does not: it sorts, counts, weighs and sums by single operations.
GONE = {"sort": 1, "floor_divide": 1, "index": 3, "_to_copy": 1, "histc": 1, "cumsum": 1, "arange": 1}
GONE |= {"index_put_": 1, "mul": 1, "sum": 1}


@pytest.mark.parametrize("rank", [0, 8])
def test_a_decision_costs_no_more_launches_than_its_experts_save(interpreter: Run, rank: int) -> None:
    """Deciding, rewriting and counting are three launches for each layer, and what surrogates answer four."""
    (off, layers), (on, _) = interpreter(launches, None), interpreter(launches, rank)
    more = Counter(on)
    more.subtract(off)
    assert more.pop("ne") == 1, "once a step: whose token is padding"
    wanted = Counter(DECIDING) + Counter(RUNNING) + Counter(ANSWERING if rank else {})
    wanted.subtract(GONE)
    assert {name: count / layers for name, count in more.items() if count} == {k: v for k, v in wanted.items() if v}
    assert sum(more.values()) <= 0


def compile_for_hopper(
    tokens: int, count: int, top_k: int, hidden: int, dtype: torch.dtype
) -> dict[str, tuple[int, int]]:
    """Bytes of machine code and of shared memory, by kernel."""
    from lynx_learn.moe.kernels import grouping

    indices, weights = batch(tokens, top_k, count, dtype, 0.5)
    done: dict[str, tuple[int, int]] = {}
    with mock.patch.multiple(
        grouping, _place=Compile(grouping._place, done), _combine=Compile(grouping._combine, done)
    ):
        groups = grouping.group(indices, weights, count)
        grouping.combine(torch.empty(indices.numel(), hidden, dtype=dtype), groups, weights, dtype)
    return done


@pytest.mark.parametrize("sizes", [(16, 128, 8, 2048, torch.bfloat16), (512, 512, 16, 7168, torch.float32)])
def test_the_kernels_compile_without_a_device(compiler: Run, sizes: tuple[Any, ...]) -> None:
    done = compiler(compile_for_hopper, *sizes)
    assert done.keys() == {"_place", "_combine"}
    for code, shared in done.values():
        assert code > 0
        assert shared <= 48 * 1024


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1, 16, 64, 500])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_compiled_kernels_give_what_pytorch_does(name: str, rows: int) -> None:
    model = tiny_model(name).bfloat16().cuda()
    layer = find_moe_layers(model)[0]
    hidden = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
    indices, weights = (part.cuda() for part in batch(rows, TOP_K, EXPERTS, torch.bfloat16, 0.3))
    kernels = experts._kernels(layer.device)
    assert kernels is not None
    with torch.no_grad():
        wanted = experts._grouped(layer.experts, hidden, indices, weights)
        found = experts._in_kernels(kernels, layer.experts, hidden, indices, weights)
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))
        for _ in range(20):
            assert torch.equal(experts._in_kernels(kernels, layer.experts, hidden, indices, weights), found)
