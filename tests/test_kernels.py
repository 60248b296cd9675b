"""The Triton kernels against the PyTorch form.

Triton reads whether it interprets when it is imported, so the kernels run in processes of their own: the setting
reaches no other test, and this process never imports triton.
"""

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
from tiny import random_selector, randomise, tiny_model
from torch import Tensor

from lynx_learn.errors import OptionError
from lynx_learn.moe.decision import Decision, Routing
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.selector.config import SelectorConfig, by_active
from lynx_learn.selector.layer import LayerSelector, Ready
from lynx_learn.selector.selector import LynxSelector, ThresholdPolicy

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Run = Callable[..., Any]


def answer(request: bytes) -> bytes:
    """In the other process: call a function of this module, or of the kernels by name."""
    from lynx_learn.selector import kernels

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


def ready_for(
    experts: int,
    top_k: int,
    hidden: int,
    scorer: str = "mlp",
    keep_top1: bool = False,
    table: dict[int, float] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Ready:
    """One layer's selector with random parameters, costs of typical assignments around 1."""
    config = SelectorConfig("", "", "", "", ("layer",), experts, top_k, hidden, 1, scorer, 1, keep_top1)
    selector = LynxSelector(config)
    randomise(selector, seed)
    own: LayerSelector = selector.layers[0]  # type: ignore[assignment]
    own.scorer.log_residual -= 2 * math.log(1 / top_k)
    own.to(device)
    return Ready(own, own.scorer.fold(own.sensitivity), torch.tensor(by_active(table or {}), device=device))


def routing_of(
    tokens: int,
    experts: int,
    top_k: int,
    hidden: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 3,
    active: float = 0.8,
    seed: int = 0,
    coarse: bool = False,
    unlike: bool = False,
) -> Routing:
    """A random decode batch.

    Args:
        tokens, experts, top_k, hidden: sizes.
        dtypes: of hidden states, logits and weights.
        active: about this share of the tokens.
        seed: of everything.
        coarse: few values of logits and weights, so that there are ties.
        unlike: experts are chosen by something else than the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1, tokens, experts, generator=generator)
    if coarse:
        logits = logits.clamp(-2, 2).round()
        logits[..., 0] += 3  # not all alike: then the spread is the smallest allowed, and rounding is blown up by it
    logits = logits.to(dtypes[1])
    scores = torch.rand(logits.shape, generator=generator) if unlike else logits.float()
    indices = scores.topk(top_k, -1).indices
    weights = logits.float().softmax(-1).gather(-1, indices)
    if coarse:
        weights = (4 * weights).ceil() / 4
    states = torch.randn(1, tokens, hidden, generator=generator)
    live = torch.rand(1, tokens, generator=generator) < active
    return Routing(states.to(dtypes[0]), logits, indices, weights.to(dtypes[2]), live)


def check_rows(rows: Tensor, ready: Ready, routing: Routing) -> None:
    """Costs by expert as the PyTorch form has them."""
    costs = torch.where(routing.active[0].unsqueeze(-1), ready.costs(routing)[0], 0.0)
    wanted = torch.zeros(rows.shape, device=rows.device).scatter(1, routing.indices[0], costs)
    torch.testing.assert_close(rows.abs(), wanted, rtol=1e-4, atol=0.0, equal_nan=True)
    weights = routing.weights[0]
    first = (weights == weights.amax(-1, keepdim=True)) & ready.selector.keep_top1 & (costs > 0)
    assert torch.equal((rows < 0).gather(1, routing.indices[0]), first)


def check_rewritten(done: Decision, wanted: Decision) -> None:
    assert done.loads is not None
    assert wanted.loads is not None
    parts = ((d.indices, d.weights, d.answered, *d.loads) for d in (done, wanted))
    for got, other in zip(*parts, strict=True):
        assert got.dtype == other.dtype
        torch.testing.assert_close(got, other, rtol=0, atol=0, equal_nan=True)


def check_loads_are_consistent(done: Decision, routing: Routing) -> None:
    before, after = done.loads
    live = routing.active[0]
    assert before[0].nonzero().flatten().tolist() == routing.indices[0, live].unique().tolist()
    assert after[0].nonzero().flatten().tolist() == done.indices[0, live].unique().tolist()


def is_close_call(total: Tensor, threshold: float) -> bool:
    """Whether rounding may decide which experts stay, or which one stays in any case."""
    real = total[(total > 0) & total.isfinite()]
    near = ((real - threshold).abs() <= 1e-3 * real).any()
    top = total.topk(2).values
    return bool(near or (top[0] > 0 and (top[0] - top[1]).abs() <= 1e-3 * top[0]))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_decides_as_pytorch_does(interpreter: Run, data: st.DataObject) -> None:
    draw = data.draw
    experts = draw(st.sampled_from([2, 3, 4, 8, 12]))
    top_k = draw(st.integers(1, min(experts, 5)))
    tokens, hidden = draw(st.integers(1, 6)), draw(st.sampled_from([1, 8, 21]))
    dtypes = draw(st.tuples(*[st.sampled_from(DTYPES)] * 3))
    seed, coarse, unlike = draw(st.integers(0, 99)), draw(st.booleans()), draw(st.booleans())
    active = draw(st.sampled_from([0.0, 0.7, 0.7, 1.0]))
    routing = routing_of(tokens, experts, top_k, hidden, dtypes, active, seed, coarse, unlike)
    spoilt = draw(st.sampled_from([None, None, routing.hidden, routing.logits]))
    if spoilt is not None:
        spoilt[0, draw(st.integers(0, tokens - 1)), 0] = math.nan
    scorer, keep_top1 = draw(st.sampled_from(["formula", "linear", "mlp"])), draw(st.booleans())
    ready = ready_for(experts, top_k, hidden, scorer, keep_top1, seed=seed)
    total = ready.selector.totals(routing, ready.costs(routing))[0]
    # A middle threshold lies between the totals of two experts; those of other numbers of tokens decide otherwise.
    middle = float(total[total > 0].nanmedian()) * 1.01 if (total > 0).any() else 1.0
    threshold = draw(st.sampled_from([0.0, middle, middle, math.inf]))
    table = draw(st.lists(st.sampled_from([0.0, math.inf]), min_size=1, max_size=tokens + 2))
    table[min(int(routing.active.sum()), len(table) - 1)] = threshold
    ready = Ready(ready.selector, ready.folded, torch.tensor(table))
    rows = interpreter("costs_by_expert", ready.folded, routing, keep_top1)
    check_rows(rows, ready, routing)
    done = interpreter("rewrite_by", rows, routing, ready.thresholds, keep_top1)
    check_loads_are_consistent(done, routing)
    assume(total.isnan().any() or not is_close_call(total, threshold))
    check_rewritten(done, ready.rewrite(routing))


@pytest.mark.parametrize("keep_top1", [False, True])
@pytest.mark.parametrize("exempt", [(0,), (1, 4), (0, 1, 2, 3, 4, 5)])
def test_exempt_tokens_keep_their_experts(interpreter: Run, exempt: tuple[int, ...], keep_top1: bool) -> None:
    """And the threshold is that of the others' number, as in PyTorch; whether exempt ones are active or not."""
    routing = routing_of(6, 12, 3, 8)
    routing = routing._replace(active=torch.tensor([[True, True, False, True, True, True]]))
    kept = torch.zeros(1, 6, dtype=torch.bool)
    kept[0, list(exempt)] = True
    counted = int((routing.active & ~kept).sum())
    ready = ready_for(12, 3, 8, keep_top1=keep_top1, table={max(counted, 1): math.inf, counted + 1: 0.0})
    done = interpreter("rewrite", ready.folded, routing, ready.thresholds, keep_top1, kept)
    check_rewritten(done, ready.rewrite(routing, kept))
    live = (routing.active & kept)[0]
    assert torch.equal(done.weights[0, live], routing.weights[0, live])
    assert torch.equal(done.indices[0, live], routing.indices[0, live])
    if counted:
        assert (done.weights == 0)[routing.active].any()
    else:
        assert torch.equal(done.weights[routing.active], routing.weights[routing.active])


LARGE = {
    "common": (40, 128, 8, 300, "mlp", torch.bfloat16, False),
    "most experts": (3, 512, 16, 1500, "mlp", torch.float32, True),
    "one more than a power of two": (5, 65, 5, 257, "linear", torch.float16, True),
    "one expert each": (9, 60, 1, 64, "formula", torch.bfloat16, False),
}


@pytest.mark.parametrize("case", LARGE)
def test_large_batches(interpreter: Run, case: str) -> None:
    tokens, experts, top_k, hidden, scorer, dtype, keep_top1 = LARGE[case]
    routing = routing_of(tokens, experts, top_k, hidden, (dtype,) * 3)
    ready = ready_for(experts, top_k, hidden, scorer, keep_top1)
    total = ready.selector.totals(routing, ready.costs(routing))[0]
    ordered = total[total > 0].sort().values
    gaps = ordered[1:] / ordered[:-1]
    cut = len(gaps) // 4 + int(gaps[len(gaps) // 4 : -1].argmax())
    assert gaps[cut] > 1.001, "no threshold that rounding does not touch"
    ready.thresholds[0] = ordered[cut : cut + 2].mean()
    done = interpreter("rewrite", ready.folded, routing, ready.thresholds, keep_top1)
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
    done = interpreter("rewrite_by", rows, routing, threshold, False)
    check_rewritten(done, ready.selector.rewrite(routing, threshold, costs))
    assert 0 < done.loads[1].sum() < done.loads[0].sum()


NAN, INF = math.nan, math.inf
BY_HAND: dict[str, tuple[float, dict[tuple[int, int], float], bool]] = {
    "some": (0.75, {}, False),
    "a cost equal to the threshold": (0.5, {}, False),
    "everything": (INF, {}, False),
    "each first expert": (INF, {}, True),
    "the first of two that cost most": (INF, {(0, 0): 1.0}, False),
    "no number": (2.0, {(0, 1): NAN, (2, 1): NAN}, False),
    "no number, the later expert": (INF, {(2, 0): NAN}, False),
    "infinite": (INF, {(1, 1): INF, (2, 0): INF}, False),
    "no number beside infinite": (INF, {(0, 0): INF, (2, 1): NAN}, False),
}


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
    done = interpreter("rewrite_by", rows, routing, limits, keep_top1)
    check_rewritten(done, ready.selector.rewrite(routing, limits, costs))
    check_loads_are_consistent(done, routing)


def decide_twice(
    scorer: str, batches: int, dtype: torch.dtype, contiguous: bool = True, rank: int = 4
) -> tuple[bool, bool, int]:
    """Whether both forms of a policy decide the same, whether that skips, and how often the kernels ran."""
    from lynx_learn.selector import kernels

    model = tiny_model("qwen3_moe").to(dtype)
    layers = find_moe_layers(model)
    routing = random_routing(layers[0], batches)
    routing = routing._replace(hidden=routing.hidden.to(dtype))
    if not contiguous:
        routing = routing._replace(
            logits=routing.logits.mT.contiguous().mT,
            hidden=routing.hidden.repeat(1, 1, 2)[..., : routing.hidden.shape[-1]],
        )
    decisions = []
    with mock.patch.object(kernels, "rewrite", wraps=kernels.rewrite) as used:
        for kernel in ("torch", "triton"):
            policy = ThresholdPolicy(random_selector(model, rank, scorer), {1: 2.0, 6: 0.0}, "", kernel)
            policy.bind(layers)
            decisions.append(policy.decide(layers[0], routing))
    skips = bool((decisions[0].weights != routing.weights)[routing.active].any())
    return same(*decisions), skips, used.call_count


@pytest.mark.parametrize(("scorer", "rank"), [("formula", 0), ("linear", 4), ("mlp", 4)])
def test_a_policy_decides_the_same(interpreter: Run, scorer: str, rank: int) -> None:
    assert interpreter(decide_twice, scorer, 1, torch.bfloat16, True, rank) == (True, True, 1)


def test_a_policy_takes_tensors_that_are_not_contiguous(interpreter: Run) -> None:
    assert interpreter(decide_twice, "mlp", 1, torch.float32, False) == (True, True, 1)


def test_many_batches_at_once_stay_with_pytorch(interpreter: Run) -> None:
    assert interpreter(decide_twice, "mlp", 3, torch.float32) == (True, True, 0)


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
    from lynx_learn.selector import kernels

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
    assert policy.kernels is None


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(OptionError, match="'cuda' is unknown: expected one of auto, torch, triton"):
        ThresholdPolicy(random_selector(tiny_model("mixtral")), {1: 0.5}, "", "cuda")


def verdicts() -> list[tuple[bool, int]]:
    """What is found faster, and how many times were taken until then, call by call; no device is there."""
    from lynx_learn.selector import kernels

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


def compile_for_hopper(
    tokens: int, experts: int, top_k: int, hidden: int, scorer: str, dtype: torch.dtype, keep_top1: bool
) -> dict[str, tuple[int, int]]:
    """Bytes of machine code and of shared memory, by kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lynx_learn.selector import kernels

    types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.bool: "i1"}
    done = {}

    class Compile:
        """Stands in for a kernel: compiles for what it is launched with."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
                given = dict(zip(self.kernel.arg_names, arguments, strict=False))
                signature = {n: f"*{types[a.dtype]}" if isinstance(a, Tensor) else "i32" for n, a in given.items()}
                signature |= dict.fromkeys(constants, "constexpr")
                source = ASTSource(self.kernel, signature, constants)
                built = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": num_warps})
                done[self.kernel.__name__] = (len(built.asm["cubin"]), built.metadata.shared)

            return launch

    ready = ready_for(experts, top_k, hidden, scorer, keep_top1, {1: 1.0, 4: 2.0})
    routing = routing_of(tokens, experts, top_k, hidden, (dtype,) * 3)
    with ExitStack() as stack:
        for name in ("_costs_by_expert", "_rewrite"):
            stack.enter_context(mock.patch.object(kernels, name, Compile(getattr(kernels, name))))
        kernels.rewrite(ready.folded, routing, ready.thresholds, keep_top1)
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
    assert done.keys() == {"_costs_by_expert", "_rewrite"}
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
    from lynx_learn.selector import kernels

    for scorer, keep_top1 in (("mlp", False), ("linear", True), ("formula", False)):
        ready = ready_for(experts, top_k, 2048, scorer, keep_top1, device="cuda")
        routing = on("cuda", routing_of(tokens, experts, top_k, 2048, (dtype,) * 3, active=0.9))
        rows = kernels.costs_by_expert(ready.folded, routing, keep_top1)
        # float32 products may be rounded to fewer bits on such a device.
        with mock.patch.object(torch.backends.cuda.matmul, "allow_tf32", False):
            check_rows(rows, ready, routing)
        costs = rows.abs().gather(1, routing.indices[0]).unsqueeze(0)
        total = ready.selector.totals(routing, costs)[0]
        wanted = total[total > 0].median() * 1.0003
        if is_close_call(total, float(wanted)):
            wanted = torch.tensor(math.inf, device="cuda")
        ready.thresholds[0] = wanted
        done = kernels.rewrite(ready.folded, routing, ready.thresholds, keep_top1)
        check_rewritten(done, ready.selector.rewrite(routing, ready.thresholds, costs))
        for _ in range(20):
            again = kernels.rewrite(ready.folded, routing, ready.thresholds, keep_top1)
            check_rewritten(again, done)
            assert torch.equal(kernels.costs_by_expert(ready.folded, routing, keep_top1), rows)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_a_captured_policy_decides_for_new_inputs(kernel: str) -> None:
    model = tiny_model("qwen3_moe").bfloat16().cuda()
    layers = find_moe_layers(model)
    policy = ThresholdPolicy(random_selector(model), {1: 2.0, 4: 4.0}, "", kernel)
    policy.bind(layers)
    batches = [on("cuda", random_routing(layers[0], 1, 12, seed)) for seed in range(5)]
    held = Routing(*(part.clone() for part in batches[0]))
    with torch.no_grad():
        policy.decide(layers[0], held)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = policy.decide(layers[0], held)
        for batch in batches:
            for place, part in zip(held, batch, strict=True):
                place.copy_(part)
            graph.replay()
            assert same(captured, policy.decide(layers[0], batch))
