"""`lynx-learn bench`: the time of a decode step with skipping on and off, and where it goes.

A decode step takes about a + b·T, T the distinct experts that each MoE layer loads. The line is measured in the same
run, by sending the untouched routing to fewer experts without deciding anything. It says what skipping could save; what
it does save is measured by steps with skipping on and off in turns, and the price of deciding by a policy that decides
everything and leaves out nothing.
"""

import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..files import check_writable, write_json
from ..moe.decision import Decision, Policy, Routing, used_experts
from ..moe.families import Layer, MoeLayer, find_moe_layers
from ..moe.loading import DTYPES, REFERENCE, environment, fast_dtype, load_model, pick_device
from ..selector.selector import KERNELS, LynxSelector, ThresholdPolicy
from ..show.figures import step_times
from ..show.progress import track
from ..traces import corpus as corpora
from ..traces.groups import decode_groups
from .shapes import SHAPES, random_selector, shaped_model
from .simulate import METRICS, compare
from .timing import Called, Graphed, Steps, clock, paired_ratio, take_turns, take_turns_generating, with_threads

# Shares of a layer's experts that the line is measured at.
LINE = (1.0, 0.75, 0.5, 0.25, 0.125)
OFF, ON, DECIDING = "off", "on", "deciding"
# Below every total that a scorer can give: with it all is decided and nothing left out.
NOTHING = 1e-37
WARM_UP = 4
# Tokens of each sequence whose loss is measured.
SCORED = 96
# Steps that a threshold is tried on when a share of the experts is asked for, how often at most, and how close is enough.
TRIAL_STEPS, TRIALS, CLOSE = 6, 24, 0.005


@dataclass(frozen=True)
class BenchOptions:
    """Time decode steps with skipping on and off in turns."""

    out: str
    """folder for bench.json, bench.svg and bench.png"""
    model: str | None = None
    """folder or Hub id, or reference-moe; not with --shape"""
    shape: str | None = None
    """a known shape with random weights, for timing only"""
    layers: int = 4
    """layers of a --shape"""
    selector: str | None = None
    """folder or Hub id; without one, a selector with random parameters takes its place"""
    budget: float | None = None
    """budget of the selector, in nats of KL per token; not with --fraction"""
    fraction: float | None = None
    """share of the untouched model's distinct experts to keep, by a threshold that is searched for it"""
    surrogate_share: float = 0.08
    """size of a random selector's surrogates, as a share of the experts' bytes"""
    kernel: str = "auto"
    """what computes decisions: auto, torch, triton or numba"""
    batch_sizes: list[int] = field(default_factory=lambda: [16])
    """sequences that decode together"""
    dtypes: list[str] = field(default_factory=lambda: ["auto"])
    """types of the model, each float32, bfloat16, float16 or auto, as in collect; a shape is stored as bfloat16"""
    implementations: list[str] = field(default_factory=lambda: ["grouped_mm"])
    """how experts run, as transformers names it"""
    device: str = "auto"
    """a torch device, or auto"""
    corpus: str = corpora.BUILT_IN
    """text that a --model decodes; a --shape decodes random tokens"""
    bos: corpora.Bos = "auto"
    """begin every sequence with the BOS token: auto as the tokenizer begins a text, yes, or no"""
    held_out: str | None = None
    """text, all of it used for nothing else, on which the loss of the same policy is measured by simulated decode; without
    one no loss is measured"""
    held_out_tokens: int = 20_000
    """tokens whose loss is measured, about"""
    prompt: int = 32
    """tokens of prefill"""
    steps: int = 40
    """decode steps that are counted, after a few that are not"""
    threads: int = 1
    """threads of torch; on a CPU two stall at random"""
    generate: int = 0
    """new tokens of whole generate calls, on and off in turns; 0 for none"""
    graph: bool = False
    """time replays of a CUDA graph instead of calls of the model; skipped, with the reason, without a GPU"""
    seed: int = 0
    """seed of random weights and tokens"""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise OptionError(f"give one of --model and --shape ({', '.join(SHAPES)})")
        if (self.budget is None) == (self.fraction is None):
            raise OptionError(
                "give one of --budget (of a calibrated --selector) and --fraction (share of experts to keep)"
            )
        if self.budget is not None and self.selector is None:
            raise OptionError("--budget needs a calibrated --selector; a random one takes --fraction")
        if self.kernel not in KERNELS:
            raise OptionError(f"--kernel {self.kernel!r} is not usable: expected one of {', '.join(KERNELS)}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise OptionError(f"--fraction {self.fraction:g} is not usable: expected above 0, at most 1")
        if self.held_out is not None and self.model is None:
            raise OptionError("--held_out needs a trained --model: random weights have no loss")
        for name in ("layers", "prompt", "steps", "threads", "held_out_tokens"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)} is not usable: expected 1 or more")
        if not 0 <= self.surrogate_share < 1:
            raise OptionError(f"--surrogate_share {self.surrogate_share:g} is not usable: expected 0 or more, below 1")
        if self.generate < 0:
            raise OptionError(f"--generate {self.generate} is not usable: expected 0 or more")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise OptionError(f"--batch_sizes {self.batch_sizes} is not usable: expected numbers of 1 or more")
        for name in ("dtypes", "implementations"):
            if not getattr(self, name):
                raise OptionError(f"--{name} is empty: expected one or more")
        if other := [name for name in self.dtypes if name not in DTYPES]:
            raise OptionError(f"--dtypes {other[0]!r} is not usable: expected {', '.join(DTYPES)}")


class Fewer:
    """The untouched routing folded onto the first `count` experts: fewer are loaded, and nothing is decided."""

    name = "fewer"

    def __init__(self, count: int) -> None:
        self.count, self.setting = count, f"experts={count}"

    def bind(self, layers: list[MoeLayer]) -> None:
        pass

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        indices = routing.indices % self.count
        used, run = (used_experts(part, routing.active, layer.num_experts) for part in (routing.indices, indices))
        return Decision(indices, routing.weights, loads=(used, run))

    def own_bytes(self, layer: MoeLayer, skipped: Tensor, batches: int) -> float:
        return 0.0


class Watched(ThresholdPolicy):
    """A selector's policy that waits for the device before and after each decision, and keeps the times."""

    def __init__(self, policy: ThresholdPolicy) -> None:
        self.__dict__.update(policy.__dict__)
        self.microseconds: list[float] = []

    def decide_one(self, layer: Layer, routing: Routing, scale: Tensor | None = None) -> Decision:
        start = clock(layer.device)
        decision = super().decide_one(layer, routing, scale)
        self.microseconds.append(1e6 * (clock(layer.device) - start))
        return decision


@dataclass(frozen=True)
class Subject:
    """What is timed: a model, its text, and the policy that skips, at one batch size."""

    model: nn.Module
    tokens: Tensor
    policy: ThresholdPolicy
    selector: LynxSelector


def bench(options: BenchOptions) -> dict[str, Any]:
    """Measure every combination of dtype, implementation and batch size; writes and returns the report.

    Raises:
        ModelError, SelectorError, OptionError: what was asked for cannot be timed; nothing is written.
    """
    out = Path(options.out)
    check_writable(out)
    device = pick_device(options.device)
    report: dict[str, Any] = {
        "options": asdict(options),
        "environment": {**environment(), "device": str(device), "threads": options.threads},
        "weights": "random" if options.shape else "trained",
        "cases": [],
    }
    if options.graph and device.type != "cuda":
        report["skipped"] = "CUDA graphs: no GPU is visible to torch"
        write_json(out / "bench.json", report)
        return report
    cases = [
        (dtype, name, size)
        for dtype in options.dtypes
        for name in options.implementations
        for size in options.batch_sizes
    ]
    model, loaded = None, ""
    with with_threads(options.threads):
        for dtype, implementation, size in track(cases, "bench", len(cases), unit="cases"):
            if model is None or dtype != loaded:
                model, tokenizer = _load(options, device, dtype)
                loaded = dtype
            _set_implementation(model, implementation)
            subject = _subject(options, model, tokenizer, device, size)
            loss = {} if options.held_out is None else {"loss": _loss(options, subject, tokenizer)}
            case = {"dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "batch_size": size}
            case |= {"implementation": implementation, **_measure(options, subject), **loss}
            report["cases"].append(case)
    write_json(out / "bench.json", report)
    step_times(report, out)
    return report


def _load(options: BenchOptions, device: torch.device, dtype: str) -> tuple[nn.Module, Any]:
    if options.shape is not None:
        precision = fast_dtype(torch.bfloat16, device) if dtype == "auto" else getattr(torch, dtype)
        return shaped_model(options.shape, options.layers, device, precision, options.seed), None
    loaded = load_model(options.model or REFERENCE, str(device), dtype)
    return loaded.model, loaded.tokenizer


def _set_implementation(model: nn.Module, name: str) -> None:
    try:
        model.set_experts_implementation(name)  # type: ignore[operator]
    except (KeyError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OptionError(f"--implementations {name!r} is not usable with this model: {reason[0]}") from None


def _subject(options: BenchOptions, model: nn.Module, tokenizer: Any, device: torch.device, size: int) -> Subject:
    length = options.prompt + WARM_UP + options.steps
    if tokenizer is None:
        generator = torch.Generator().manual_seed(options.seed)
        vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
        tokens = torch.randint(3, vocabulary, (size, length), generator=generator)
    else:
        tokens, _ = decode_groups(
            options.corpus, tokenizer, "test", size, length, 1, options.seed + 1, fewest=1, bos=options.bos
        )[0]
    tokens = tokens.to(device)
    selector = (
        random_selector(model, options.surrogate_share, options.seed)
        if options.selector is None
        else LynxSelector.from_pretrained(options.selector)
    )
    if options.budget is not None:
        policy = selector.policy(options.budget, kernel=options.kernel)
    else:
        policy = keeping(model, selector, tokens, options)
    return Subject(model, tokens, policy, selector)


@torch.no_grad()
def keeping(model: nn.Module, selector: LynxSelector, tokens: Tensor, options: BenchOptions) -> ThresholdPolicy:
    """The policy whose threshold keeps the wanted share of the untouched model's distinct experts, by bisection."""
    assert options.fraction is not None
    part = tokens[:, : options.prompt + TRIAL_STEPS]
    low, high = math.log(NOTHING), -math.log(NOTHING)
    for _ in range(TRIALS):
        middle = (low + high) / 2
        policy = selector.at_threshold(math.exp(middle))
        stats = take_turns(model, {ON: policy}, part, options.prompt, 0, options.threads)[ON].stats
        assert stats is not None
        share = sum(stats.experts_after) / sum(stats.experts_before)
        low, high = (middle, high) if share > options.fraction else (low, middle)
        if abs(share - options.fraction) < CLOSE:
            break
    return selector.at_threshold(math.exp(middle), options.kernel)


def _measure(options: BenchOptions, subject: Subject) -> dict[str, Any]:
    experts = subject.selector.config.num_experts
    counts = sorted({max(round(share * experts), 1) for share in LINE})
    deciding = subject.selector.at_threshold(NOTHING, options.kernel)
    policies: dict[str, Policy | None] = {OFF: None, ON: subject.policy, DECIDING: deciding}
    policies |= {f"{count}": Fewer(count) for count in counts}
    stepping = Graphed if options.graph else Called
    steps = take_turns(subject.model, policies, subject.tokens, options.prompt, WARM_UP, options.threads, stepping)
    result = summary(steps, [str(count) for count in counts])
    watched = Watched(subject.policy)
    part = subject.tokens[:, : options.prompt + WARM_UP + min(options.steps, 10)]
    take_turns(subject.model, {ON: watched}, part, options.prompt, 0, options.threads)
    moe = len(watched.ready)
    result["microseconds_per_layer"] = {
        "scorer, rewrite and surrogates": statistics.median(watched.microseconds[moe * WARM_UP :]),
        "all": 1e3 * result["deciding_ms"] / moe,
    }
    result["moe_layers"], result["threshold"] = moe, [tau for _, tau in sorted(subject.policy.thresholds.items())]
    if options.generate:
        prompt = subject.tokens[:, : options.prompt]
        result["generate"] = take_turns_generating(subject.model, subject.policy, prompt, options.generate)
    return result


def _loss(options: BenchOptions, subject: Subject, tokenizer: Any) -> dict[str, Any]:
    """Mean losses and bytes of the same policy on text that nothing else has used."""
    size = len(subject.tokens)
    most = max(round(options.held_out_tokens / (size * SCORED)), 2)
    assert options.held_out is not None
    groups = decode_groups(
        options.held_out, tokenizer, "all", size, options.prompt + SCORED, most, options.seed, bos=options.bos
    )
    groups = [(tokens.to(subject.tokens.device), sources) for tokens, sources in groups]
    (found,) = compare(subject.model, find_moe_layers(subject.model), groups, [subject.policy], options.prompt)
    means = {metric: found.mean(metric) for metric in METRICS}
    return {"corpus": options.held_out, "tokens": found.tokens, **means, **found.mean_stats()}


def summary(steps: dict[str, Steps], line: list[str]) -> dict[str, Any]:
    """What the steps of OFF, ON, DECIDING and of the policies of the line say."""
    off, on = steps[OFF], steps[ON]
    assert on.stats is not None
    wanted, run = (sum(v) / len(v) for v in (on.stats.experts_before, on.stats.experts_after))
    points = [(_experts(steps[name]), steps[name].median) for name in line]
    a, b = fit_line(points)
    saved = statistics.median(x - y for x, y in zip(off.ms, on.ms, strict=True))
    possible = b * (wanted - run)
    extra = statistics.median(x - y for x, y in zip(steps[DECIDING].ms, off.ms, strict=True))
    low, high = median_interval([x / y for x, y in zip(off.ms, on.ms, strict=True)])
    return {
        "steps": len(off.ms),
        "off_ms": off.median,
        "on_ms": on.median,
        "ratio": paired_ratio(off, on),
        "ratio_low": low,
        "ratio_high": high,
        "experts_off": wanted,
        "experts_on": run,
        "bytes": on.stats.bytes_ratio,
        "line": {"a_ms": a, "b_ms": b, "points": points},
        "realised": saved / possible if possible > 0 else None,
        "deciding_ms": extra,
        "overhead": extra / off.median,
    }


def _experts(steps: Steps) -> float:
    assert steps.stats is not None
    return sum(steps.stats.experts_after) / len(steps.stats.experts_after)


def fit_line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares a and b of y = a + b·x; b is 0 where all x are the same."""
    xs, ys = zip(*points, strict=True)
    if len(set(xs)) < 2:
        return statistics.fmean(ys), 0.0
    b, a = statistics.linear_regression(xs, ys)
    return a, b


def median_interval(values: list[float]) -> tuple[float, float]:
    """95% interval of the median by order statistics; the whole range where the values are too few for one."""
    from scipy.stats import quantile_test

    interval = quantile_test(values, p=0.5).confidence_interval(0.95)
    low, high = float(interval.low), float(interval.high)
    return min(values) if math.isnan(low) else low, max(values) if math.isnan(high) else high
