"""The Triton kernels against the PyTorch form.

Triton reads whether it interprets when it is imported, so the kernels run in processes of their own: the setting
reaches no other test, and this process never imports triton.
"""

import copy
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any
from unittest import mock

import pytest
import torch
from decisions import COSTS, INDICES, WEIGHTS, random_routing, same
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BY_HAND,
    DTYPES,
    LARGE,
    check_loads_are_consistent,
    check_rewritten,
    check_rows,
    drawn,
    is_close_call,
    put_between,
    ready_for,
    routing_of,
)
from tiny import random_selector, tiny_model
from torch import Tensor

from lynx_learn.decode.tally import Tally
from lynx_learn.errors import OptionError
from lynx_learn.moe.decision import Decision, Routing, each_tensor
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.selector.layer import Ready
from lynx_learn.selector.prices import Price
from lynx_learn.selector.selector import ThresholdPolicy

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Run = Callable[..., Any]


def answer(request: bytes) -> bytes:
    """In the other process: call a function of this module, or of the kernels by name."""
    from lynx_learn.selector.kernels import triton as kernels

    function, arguments = pickle.loads(request)
    with torch.no_grad():
        done = (getattr(kernels, function) if isinstance(function, str) else function)(*arguments)
    return pickle.dumps(done)


@contextmanager
def process(interpret: bool) -> Iterator[Run]:
    """Calls functions in another process, whose triton interprets kernels or does not."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:

        def run(function: str | Callable[..., Any], *arguments: Any) -> Any:
            # Pickled here, so that tensors travel as values and not as shared memory.
            return pickle.loads(pool.submit(answer, pickle.dumps((function, arguments))).result())

        with mock.patch.dict(os.environ, TRITON_INTERPRET=str(int(interpret))):
            assert run(os.getpid) != os.getpid()
        yield run


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Run]:
    with process(interpret=True) as run:
        yield run


@pytest.fixture(scope="module")
def compiler() -> Iterator[Run]:
    with process(interpret=False) as run:
        yield run


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_decides_as_pytorch_does(interpreter: Run, data: st.DataObject) -> None:
    ready, routing, _, close = drawn(data.draw)
    keep_top1 = ready.selector.keep_top1
    rows = interpreter("costs_by_expert", ready.folded, routing, keep_top1)
    check_rows(rows, ready, routing)
    done = rewritten(interpreter("rewrite_by", rows, routing, ready.thresholds, keep_top1), routing)
    check_loads_are_consistent(done, routing)
    assume(not close)
    check_rewritten(done, ready.rewrite(routing))


@pytest.mark.parametrize("keep_top1", [False, True])
@pytest.mark.parametrize("exempt", [(0,), (1, 4), (0, 1, 2, 3, 4, 5)])
def test_exempt_tokens_keep_their_experts(interpreter: Run, exempt: tuple[int, ...], keep_top1: bool) -> None:
    """And the threshold is that of the others' number, as in PyTorch; whether exempt ones are active or not."""
    routing = routing_of(6, 12, 3, 8)
    routing = routing._replace(active=torch.tensor([[True, True, False, True, True, True]]))
    kept = torch.zeros(1, 6, dtype=torch.bool)
    kept[0, list(exempt)] = True
    scale = torch.where(kept, math.inf, 1.0)
    counted = int((routing.active & ~kept).sum())
    ready = ready_for(12, 3, 8, keep_top1=keep_top1, table={max(counted, 1): math.inf, counted + 1: 0.0})
    done = rewritten(interpreter("rewrite", ready.folded, routing, ready.thresholds, keep_top1, scale), routing)
    check_rewritten(done, ready.rewrite(routing, scale))
    live = (routing.active & kept)[0]
    assert torch.equal(done.weights[0, live], routing.weights[0, live])
    assert torch.equal(done.indices[0, live], routing.indices[0, live])
    if counted:
        assert (done.weights == 0)[routing.active].any()
    else:
        assert torch.equal(done.weights[routing.active], routing.weights[routing.active])


def test_costs_count_as_many_times_as_their_token_says(interpreter: Run) -> None:
    routing, ready = routing_of(6, 12, 3, 8, active=1), ready_for(12, 3, 8)
    put_between(ready, routing)
    scale = torch.tensor([[0.1, 1.0, 10.0, math.inf, 0.1, 3.0]])
    done = rewritten(interpreter("rewrite", ready.folded, routing, ready.thresholds, False, scale), routing)
    check_rewritten(done, ready.rewrite(routing, scale))
    assert not torch.equal(done.weights, ready.rewrite(routing).weights)


@pytest.mark.parametrize(
    "price", [Price(each=(torch.arange(12) % 3 > 0).float()), Price(devices=torch.arange(12) // 4)]
)
def test_prices_are_read_as_pytorch_does(interpreter: Run, price: Price) -> None:
    routing, ready = routing_of(6, 12, 3, 8, active=1), ready_for(12, 3, 8)
    put_between(ready, routing)
    done = rewritten(interpreter("rewrite", ready.folded, routing, ready.thresholds, False, None, price), routing)
    check_rewritten(done, ready.rewrite(routing, None, price))
    assert not torch.equal(done.indices, ready.rewrite(routing).indices)


@pytest.mark.parametrize("case", LARGE)
def test_large_batches(interpreter: Run, case: str) -> None:
    tokens, experts, top_k, hidden, scorer, dtype, keep_top1 = LARGE[case]
    routing = routing_of(tokens, experts, top_k, hidden, (dtype,) * 3)
    ready = ready_for(experts, top_k, hidden, scorer, keep_top1)
    put_between(ready, routing)
    done = rewritten(interpreter("rewrite", ready.folded, routing, ready.thresholds, keep_top1), routing)
    check_rewritten(done, ready.rewrite(routing))
    assert 0 < done.loads[1].sum() < done.loads[0].sum()


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(512, 512, 16), (300, 60, 6)])
def test_totals_of_many_tokens(interpreter: Run, tokens: int, experts: int, top_k: int) -> None:
    """Costs that float32 adds up exactly, so that nothing is a close call."""
    generator = torch.Generator().manual_seed(0)
    routing = routing_of(tokens, experts, top_k, 1)
    costs = torch.randint(1, 64, routing.indices.shape, generator=generator).float()
    live = routing.active.unsqueeze(-1)
    rows = torch.zeros(tokens, experts).scatter(1, routing.indices[0], torch.where(live, costs, 0.0)[0])
    ready = ready_for(experts, top_k, 1)
    threshold = ready.selector.totals(routing, costs).median().unsqueeze(0)
    done = rewritten(interpreter("rewrite_by", rows, routing, threshold, False), routing)
    check_rewritten(done, ready.selector.rewrite(routing, threshold, costs))
    assert 0 < done.loads[1].sum() < done.loads[0].sum()


@pytest.mark.parametrize("active", [(True, True, True), (True, False, True), (False, False, False)])
@pytest.mark.parametrize("case", BY_HAND)
def test_the_rule_on_costs_by_hand(interpreter: Run, case: str, active: tuple[bool, ...]) -> None:
    threshold, changes, keep_top1 = BY_HAND[case]
    costs = COSTS.clone()
    for place, value in changes.items():
        costs[0][place] = value
    live = torch.tensor([active])
    routing = Routing(torch.ones(1, 3, 2), torch.zeros(1, 3, 4), INDICES, WEIGHTS, live)
    signed = torch.where(WEIGHTS.amax(-1, keepdim=True) > WEIGHTS, costs, -costs) if keep_top1 else costs
    rows = torch.zeros(3, 4).scatter(1, INDICES[0], torch.where(live.unsqueeze(-1), signed, 0.0)[0])
    ready = ready_for(4, 2, 2, keep_top1=keep_top1)
    limits = torch.tensor([threshold])
    done = rewritten(interpreter("rewrite_by", rows, routing, limits, keep_top1), routing)
    check_rewritten(done, ready.selector.rewrite(routing, limits, costs))
    check_loads_are_consistent(done, routing)


def one(routing: Routing) -> Routing:
    """Without the leading dimension."""
    return each_tensor(lambda part: part[0], routing)


def rewritten(found: tuple[Decision, Tensor | None], routing: Routing) -> Decision:
    """The decision, when what it says to count and to answer is right."""
    decision, left_out = found
    assert decision.counts is not None
    assert decision.loads is not None
    assert decision.answered is not None
    live = routing.active
    answered = (decision.answered & live.unsqueeze(-1)).sum()
    counted = [torch.ones_like(answered), live.sum(), answered]
    loads = [part.flatten().long() for part in decision.loads]
    assert torch.equal(decision.counts, torch.cat([torch.stack(counted), *loads]))
    assert left_out is not None
    wanted = torch.where(decision.answered, routing.weights, torch.zeros_like(routing.weights))
    assert torch.equal(left_out.nan_to_num(7.0), wanted.nan_to_num(7.0))
    return decision


def same_decisions(done: Decision, wanted: Decision) -> bool:
    """Whether they are the same but for rounding of what surrogates answer."""
    if (done.addition is None) != (wanted.addition is None):
        return False
    if done.addition is not None and wanted.addition is not None:
        error = 2e-2 if done.addition.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(done.addition, wanted.addition, rtol=error, atol=error * wanted.addition.abs().max())
    return same(*(decision._replace(addition=None, counts=None) for decision in (done, wanted)))


def decide_twice(scorer: str, dtype: torch.dtype, contiguous: bool = True, rank: int = 4) -> tuple[bool, bool, int]:
    """Whether both forms of a policy decide the same, whether that skips, and how often the kernels ran."""
    from lynx_learn.selector.kernels import triton as kernels

    model = tiny_model("qwen3_moe").to(dtype)
    layers = find_moe_layers(model)
    routing = one(random_routing(layers[0], 1))
    routing = routing._replace(hidden=routing.hidden.to(dtype))
    if not contiguous:
        routing = routing._replace(
            logits=routing.logits.mT.contiguous().mT,
            hidden=routing.hidden.repeat(1, 2)[..., : routing.hidden.shape[-1]],
        )
    decisions = []
    with mock.patch.object(kernels, "rewrite", wraps=kernels.rewrite) as used:
        for kernel in ("torch", "triton"):
            policy = ThresholdPolicy(random_selector(model, rank, scorer), {1: 2.0}, "", kernel)
            policy.bind(layers)
            decisions.append(policy.decide_one(layers[0], routing))
    wanted, done = decisions
    skips = bool((wanted.weights != routing.weights)[routing.active].any())
    return same_decisions(done, wanted), skips, used.call_count


@pytest.mark.parametrize(("scorer", "rank"), [("formula", 0), ("linear", 4), ("mlp", 4)])
def test_a_policy_decides_the_same(interpreter: Run, scorer: str, rank: int) -> None:
    assert interpreter(decide_twice, scorer, torch.bfloat16, True, rank) == (True, True, 1)


def test_a_policy_takes_tensors_that_are_not_contiguous(interpreter: Run) -> None:
    assert interpreter(decide_twice, "mlp", torch.float32, False) == (True, True, 1)


def test_what_is_not_supported_is_refused(interpreter: Run) -> None:
    ready, routing = ready_for(8, 2, 4), routing_of(3, 8, 2, 4)

    def can(ready: Ready, routing: Routing) -> bool:
        return interpreter("supported", ready.folded, routing)

    assert can(ready, routing)
    assert can(ready_for(512, 16, 4), routing_of(512, 512, 16, 4))
    assert not can(ready, routing_of(513, 8, 2, 4))
    assert not can(ready_for(513, 2, 4), routing_of(3, 513, 2, 4))
    assert not can(ready_for(20, 17, 4), routing_of(3, 20, 17, 4))
    assert not can(ready, routing._replace(weights=routing.weights.double()))
    assert not can(ready, routing._replace(indices=routing.indices.int()))
    assert not can(ready, Routing(*(torch.cat([part, part]) for part in routing)))
    half = ready.folded._replace(outer=ready.folded.outer.half())
    assert not interpreter("supported", half, routing)


def test_weights_that_want_a_gradient_stay_with_pytorch(interpreter: Run) -> None:
    assert interpreter(supported_with_gradient) == (False, True)


def supported_with_gradient() -> tuple[bool, bool]:
    from lynx_learn.selector.kernels import triton as kernels

    ready, routing = ready_for(8, 2, 4), routing_of(3, 8, 2, 4)
    routing.weights.requires_grad_()
    with torch.enable_grad():
        wanted = kernels.supported(ready.folded, routing)
    return wanted, kernels.supported(ready.folded, routing)


def test_on_a_cpu_the_kernels_are_not_used() -> None:
    model = tiny_model("mixtral")
    policy = random_selector(model).at_threshold(1.0)
    policy.bind(find_moe_layers(model))
    assert policy.kernel == "auto"
    assert not policy.fused


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(OptionError, match="'cuda' is unknown: expected one of auto, torch, triton"):
        ThresholdPolicy(random_selector(tiny_model("mixtral")), {1: 0.5}, "", "cuda")


def verdicts() -> list[tuple[bool, int]]:
    """What is found faster, and how many times were taken until then, call by call; no device is there."""
    from lynx_learn.selector.kernels import triton as kernels

    times, seen, taken = {"fused": 1.0, "plain": 2.0}, [], []

    def milliseconds(form: Callable[[Routing], str], routing: Routing) -> float:
        taken.append(form(routing))
        return times[taken[-1]]

    def ask(tokens: int, capturing: bool = False) -> None:
        folded, routing = ready_for(8, 2, 4).folded, routing_of(tokens, 8, 2, 4)
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=capturing):
            verdict = kernels.is_faster(folded, routing, lambda routing: "fused", lambda routing: "plain")
        seen.append((verdict, len(taken)))

    with (
        mock.patch.object(kernels, "milliseconds", milliseconds),
        mock.patch("torch.cuda.device", return_value=nullcontext()),
    ):
        ask(3, capturing=True)  # never timed in a capture
        ask(3)
        ask(4)  # the same power of two
        times["fused"] = 3.0
        ask(4)  # remembered
        ask(5)
        ask(5, capturing=True)  # what was found out holds in a capture too
        times.clear()
        with warnings.catch_warnings(record=True) as caught:
            ask(9)  # fails
            ask(9)
    assert [str(warning.message) for warning in caught] == ["deciding without Triton kernels: KeyError: 'fused'"]
    return seen


def test_which_form_is_faster_is_found_out_once(compiler: Run) -> None:
    found = [(True, 0), (True, 2), (True, 2), (True, 2), (False, 4), (False, 4), (False, 5), (False, 5)]
    assert compiler(verdicts) == found


TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1"}
TYPES |= {torch.int32: "i32", torch.int64: "i64"}


class Compile:
    """Stands in for a kernel: compiles for what it is launched with, and notes bytes of code and of shared memory."""

    def __init__(self, kernel: Any, done: dict[str, tuple[int, int]]) -> None:
        self.kernel, self.done = kernel, done

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        def launch(*arguments: Any, num_warps: int, num_stages: int = 3, **constants: Any) -> None:
            given = dict(zip(self.kernel.arg_names, arguments, strict=False))
            kinds = {int: "i32", float: "fp32"}
            signature = {n: f"*{TYPES[a.dtype]}" if isinstance(a, Tensor) else kinds[type(a)] for n, a in given.items()}
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(self.kernel, signature, constants)
            options = {"num_warps": num_warps, "num_stages": num_stages}
            built = triton.compile(source, GPUTarget("cuda", 90, 32), options)
            self.done[self.kernel.__name__] = (len(built.asm["cubin"]), built.metadata.shared)

        return launch


DECIDING, ANSWERING = ("_costs_by_expert", "_rewrite"), ("_codes", "_outputs", "_sum")


def compile_for_hopper(
    tokens: int, experts: int, top_k: int, hidden: int, scorer: str, dtype: torch.dtype, keep_top1: bool
) -> dict[str, tuple[int, int]]:
    """Bytes of machine code and of shared memory, by kernel."""
    from lynx_learn.selector.kernels import answers
    from lynx_learn.selector.kernels import triton as kernels

    done: dict[str, tuple[int, int]] = {}
    ready = ready_for(experts, top_k, hidden, scorer, keep_top1, {1: 1.0, 4: 2.0})
    routing = routing_of(tokens, experts, top_k, hidden, (dtype,) * 3)
    with ExitStack() as stack:
        for module, name in [(kernels, name) for name in DECIDING] + [(answers, name) for name in ANSWERING]:
            stack.enter_context(mock.patch.object(module, name, Compile(getattr(module, name), done)))
        ready.selector.surrogates.to(dtype)
        kernels.Fused(ready.folded, ready.selector.surrogates, ready.thresholds, keep_top1).decide(routing)
    return done


@pytest.mark.parametrize(
    "sizes",
    [
        (64, 128, 8, 2048, "mlp", torch.bfloat16, False),
        (512, 512, 16, 7168, "mlp", torch.float32, True),
        (1, 60, 1, 100, "formula", torch.float16, True),
        (3, 2, 2, 64, "linear", torch.bfloat16, False),
    ],
)
def test_the_kernels_compile_without_a_device(compiler: Run, sizes: tuple[Any, ...]) -> None:
    """What the interpreter does not show: that the compiler takes them, down to machine code."""
    done = compiler(compile_for_hopper, *sizes)
    assert done.keys() == {*DECIDING, *ANSWERING}
    for code, shared in done.values():
        assert code > 0
        assert shared <= 48 * 1024  # what every device gives without asking


def on(device: str, routing: Routing) -> Routing:
    return Routing(*(part.to(device) for part in routing))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (33, 60, 6), (64, 128, 8), (512, 512, 16)])
def test_compiled_kernels_decide_as_pytorch_does(tokens: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    from lynx_learn.selector.kernels import triton as kernels

    for scorer, keep_top1 in (("mlp", False), ("linear", True), ("formula", False)):
        ready = ready_for(experts, top_k, 2048, scorer, keep_top1, device="cuda")
        routing = on("cuda", routing_of(tokens, experts, top_k, 2048, (dtype,) * 3, active=0.9))
        rows = kernels.costs_by_expert(ready.folded, routing, keep_top1)
        check_rows(rows, ready, routing)
        costs = rows.abs().gather(1, routing.indices[0]).unsqueeze(0)
        total = ready.selector.totals(routing, costs)[0]
        wanted = total[total > 0].median() * 1.0003
        if is_close_call(total, float(wanted)):
            wanted = torch.tensor(math.inf, device="cuda")
        ready.thresholds[0] = wanted
        done = rewritten(kernels.rewrite(ready.folded, routing, ready.thresholds, keep_top1), routing)
        check_rewritten(done, ready.selector.rewrite(routing, ready.thresholds, costs))
        for _ in range(20):
            again = kernels.rewrite(ready.folded, routing, ready.thresholds, keep_top1)
            check_rewritten(rewritten(again, routing), done)
            assert torch.equal(kernels.costs_by_expert(ready.folded, routing, keep_top1), rows)


def answers_of(
    tokens: int, experts: int, top_k: int, hidden: int, rank: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Surrogates of uneven rank answer as a product with all of them does, and those that do not answer are not read."""
    from lynx_learn.selector.kernels.answers import Maps, answer

    surrogates = ready_for(experts, top_k, hidden, rank=rank, device=device).selector.surrogates
    routing = on(device, one(routing_of(tokens, experts, top_k, hidden, (dtype,) * 3)))
    answers = torch.rand(experts, generator=torch.Generator().manual_seed(0)) < 0.5
    answers[0], answers[-1] = True, False
    answers = answers.to(device)
    left_out = torch.where(answers[routing.indices], routing.weights, 0.0).to(dtype)
    surrogates.to(dtype)
    shares = torch.zeros(tokens, experts, device=device).scatter_add(1, routing.indices, left_out.float())
    wanted = copy.deepcopy(surrogates).float()(routing.hidden.float(), shares)
    surrogates.constant[~answers] = math.nan
    surrogates.down[~answers[surrogates.owner]] = surrogates.up[~answers[surrogates.owner]] = math.nan
    maps = Maps.of(surrogates)
    assert maps is not None
    done = answer(maps, routing.hidden, routing.indices, left_out)
    assert done.dtype == dtype
    error = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(done.float(), wanted, rtol=error, atol=error * float(wanted.abs().max()))
    for _ in range(20 if device == "cuda" else 0):
        assert torch.equal(answer(maps, routing.hidden, routing.indices, left_out), done)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "rank"), [(1, 4, 2, 8, 1), (5, 12, 5, 300, 9), (40, 6, 3, 33, 80)]
)
def test_surrogates_answer_as_pytorch_does(
    interpreter: Run, tokens: int, experts: int, top_k: int, hidden: int, rank: int, dtype: torch.dtype
) -> None:
    interpreter(answers_of, tokens, experts, top_k, hidden, rank, dtype)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "rank"),
    [(1, 8, 2, 64, 3), (16, 128, 8, 2048, 92), (33, 60, 6, 1000, 17), (300, 64, 16, 512, 8)],
)
def test_compiled_kernels_answer_as_pytorch_does(
    tokens: int, experts: int, top_k: int, hidden: int, rank: int, dtype: torch.dtype
) -> None:
    answers_of(tokens, experts, top_k, hidden, rank, dtype, "cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_a_captured_policy_decides_and_counts_for_new_inputs(kernel: str) -> None:
    model = tiny_model("qwen3_moe").bfloat16().cuda()
    layers = find_moe_layers(model)
    policy = ThresholdPolicy(random_selector(model), {1: 2.0, 4: 4.0}, "", kernel)
    policy.bind(layers)
    batches = [on("cuda", one(random_routing(layers[0], 1, 12, seed))) for seed in range(5)]
    held = Routing(*(part.clone() for part in batches[0]))
    counted, wanted = Tally(layers, policy), Tally(layers, policy)
    with torch.no_grad():
        policy.decide_one(layers[0], held)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = policy.decide_one(layers[0], held)
            counted.add(layers[0], held, captured)
        for batch in batches:
            for place, part in zip(held, batch, strict=True):
                place.copy_(part)
            graph.replay()
            decision = policy.decide_one(layers[0], batch)
            assert same(captured, decision)
            wanted.add(layers[0], batch, decision._replace(counts=None))
    assert counted.stats() == wanted.stats()
    assert counted.stats().steps == len(batches)
