"""`lynx-learn export`: a selector's decision as one ONNX graph for all layers, checked before it is written.

The graph answers what decode does with a batch of one layer, but for the surrogates: those are a product with the hidden
state that belongs to the serving engine's own kernels, and what is left out adds nothing without them.
"""

import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LynxError, OptionError
from ..moe.decision import Groups
from ..selector.features import feature_parts
from ..selector.scorers import Folded, Scorer
from ..selector.selector import LayerSelector, LynxSelector, run_instead
from ..traces.format import write_atomically
from .onnx_runtime import CONFIG_KEY, FORMAT_VERSION, OUTPUTS, VERSION_KEY, OnnxSelector, Provider, runtime_with

FILE = "selector.onnx"
OPSET = 20
# A file of protocol buffers ends there; some room is left for the graph itself.
LARGEST = 2**31 - 2**24
# Costs may differ by so much, relatively: float32 in another order, then the exponential. Bits this close to the
# threshold may differ. Below the floor, far from any threshold, a cost is as good as nothing.
TOLERANCE, FLOOR = 1e-3, 1e-30
CHECKED_TOKENS = (1, 16, 512)
# Rounds of timing that are thrown away.
WARM_UP = 50


@dataclass(frozen=True)
class ExportOptions:
    """Options of `lynx-learn export`.

    Attributes:
        selector: folder or Hub id.
        out: file to write; by default `selector.onnx` in the selector's folder.
        format: what is written; `onnx` alone.
        provider: where onnxruntime runs the graph to check it, `cpu` or `cuda`.
        time_tokens: size of the batch at which the graph is timed against PyTorch, on one CPU thread; 0: not timed.
        report: JSON file for what was found.
    """

    selector: str
    out: str | None = None
    format: Literal["onnx"] = "onnx"
    provider: Provider = "cpu"
    time_tokens: int = 0
    report: str | None = None

    def __post_init__(self) -> None:
        if self.time_tokens < 0:
            raise OptionError(f"--time_tokens {self.time_tokens} is not usable: expected 0 or more")


class Answer(NamedTuple):
    """What the graph answers, as `OnnxDecision`."""

    keep: Tensor
    costs: Tensor
    run_indices: Tensor
    run_weights: Tensor


def decide(rule: LayerSelector, folded: Folded, groups: Groups, threshold: Tensor) -> Answer:
    """Decode's decision but for surrogates and statistics; `rule` gives no more than whether first experts stay.

    `groups` and `threshold` have one leading dimension less than elsewhere: this is one batch.
    """
    costs = folded.costs(feature_parts(*groups[1:4]), groups.indices, groups.hidden)
    anchor, keep = rule.keep(groups, rule.totals(groups, costs), threshold)
    indices, weights, _ = run_instead(groups, anchor, keep)
    return Answer(keep, costs, indices, weights)


class Graph(nn.Module):
    """All layers' folded scorers, stacked, and the threshold rule: what is exported.

    Inputs: `layer` () int64; `logits` (tokens, experts) before the activation, `indices` and `weights` (tokens, top_k)
    as the router chose them, `active` (tokens,), `threshold` () in nats, and for a scorer that looks at it `hidden`
    (tokens, hidden). Outputs: `keep` (experts,), `costs` (tokens, top_k) in nats, and `run_indices`, `run_weights`
    (tokens, top_k), in which an assignment that is left out points at the dearest expert with weight 0. Surrogates are
    not part of it.
    """

    def __init__(self, selector: LynxSelector) -> None:
        super().__init__()
        folded = [own.scorer.fold(own.sensitivity) for own in selector.layers]  # type: ignore[union-attr,operator]
        for name, tensors in zip(Folded._fields, zip(*folded, strict=True), strict=True):
            self.register_buffer(name, torch.stack(tensors))
        # In a list, so that its parameters are not taken for the graph's.
        self.rule: list[LayerSelector] = [selector.layers[0]]  # type: ignore[list-item]

    @property
    def uses_hidden(self) -> bool:
        return self.get_buffer("projection").shape[-1] > 0

    def forward(
        self,
        layer: Tensor,
        logits: Tensor,
        indices: Tensor,
        weights: Tensor,
        active: Tensor,
        threshold: Tensor,
        hidden: Tensor | None = None,
    ) -> Answer:
        folded = Folded(*(getattr(self, name)[layer] for name in Folded._fields))
        # Where there is no hidden state, it is not looked at.
        groups = Groups(logits if hidden is None else hidden, logits, indices, weights, active)
        return decide(self.rule[0], folded, groups, threshold)


def export(options: ExportOptions) -> dict[str, Any]:
    """Export a selector; the file is written once the graph has been found to decide as PyTorch does on every layer.

    Raises:
        LynxError: the extra `onnx` is not installed, the provider is not usable, or the graph decides otherwise.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise LynxError(f"{error.name} is not installed: pip install 'lynx-learn[onnx]'") from None
    runtime_with(options.provider)
    selector = LynxSelector.from_pretrained(options.selector)
    if options.out is None and not Path(options.selector).is_dir():
        raise OptionError(f"--out is missing: {options.selector} is no folder here to put {FILE} into")
    target = Path(options.out or Path(options.selector) / FILE)
    data = to_bytes(selector)
    runner = OnnxSelector(data, options.provider)
    found: dict[str, Any] = {
        "file": str(target),
        "bytes": len(data),
        "provider": runner.provider,
        "versions": _versions(),
        "parity": asdict(check(selector, runner)),
    }
    write_atomically(target, data)
    if options.time_tokens:
        found["times"] = time_layers(selector, OnnxSelector(target), options.time_tokens)
    if options.report:
        write_atomically(Path(options.report), (json.dumps(found, indent=2) + "\n").encode())
    return found


def to_bytes(selector: LynxSelector) -> bytes:
    """The content of an .onnx file, which holds everything: weights, and the configuration as metadata.

    Raises:
        LynxError: it would be larger than one file can be.
    """
    import onnx

    graph = Graph(selector).eval()
    size = sum(buffer.numel() * buffer.element_size() for buffer in graph.buffers())
    if size > LARGEST:
        raise LynxError(f"the scorers take {size / 2**30:.1f} GiB: an .onnx file holds 2 GiB; train smaller scorers")
    batch = random_batch(selector, 0, 5, torch.Generator().manual_seed(0))
    example = {"layer": torch.tensor(0), **batch._asdict(), "threshold": torch.tensor(1.0)}
    names = ["layer", "logits", "indices", "weights", "active", "threshold", *["hidden"] * graph.uses_hidden]
    tokens = {0: torch.export.Dim("tokens", min=1)}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            tuple(example[name] for name in names),
            dynamo=True,
            dynamic_shapes=tuple(None if example[name].ndim == 0 else tokens for name in names),
            opset_version=OPSET,
            input_names=names,
            output_names=OUTPUTS,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    values = {VERSION_KEY: FORMAT_VERSION, CONFIG_KEY: replace(selector.config, calibration={}).to_json()}
    onnx.helper.set_model_props(proto, values)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that are not there and on its own internals."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def random_batch(selector: LynxSelector, layer: int, tokens: int, generator: torch.Generator) -> Groups:
    """A random decode batch, without leading dimension, of a router that takes the softmax.

    Hidden states are spread as the scorer has seen them; about one token in five is not active.
    """
    config, scorer = selector.config, cast(Scorer, selector.layers[layer].scorer)
    hidden = torch.randn(tokens, config.hidden_size, generator=generator) * scorer.hidden_spread + scorer.hidden_mean
    logits = 2 * torch.randn(tokens, config.num_experts, generator=generator)
    weights, indices = logits.softmax(-1).topk(config.top_k)
    active = torch.rand(tokens, generator=generator) < 0.8
    active[0] = True
    return Groups(hidden, logits, indices, weights, active)


def middle(totals: Tensor) -> float:
    """A threshold that half of the experts in use stay below, between two of their totals `(experts,)`."""
    rising = totals[totals > 0].sort().values
    half = len(rising) // 2
    return float(rising[max(half - 1, 0) : half + 1].mean())


@dataclass(frozen=True)
class Parity:
    """How far onnxruntime is from PyTorch."""

    layers: int
    tokens: tuple[int, ...]
    absolute: float
    """Largest difference of two costs, in nats."""
    relative: float
    """Largest difference of two costs, relative to PyTorch's."""
    bits: int
    """Keep bits compared."""
    differing: int
    """Of these differ; each within rounding of the threshold."""


def check(selector: LynxSelector, runner: OnnxSelector, sizes: tuple[int, ...] = CHECKED_TOKENS) -> Parity:
    """Compare onnxruntime with PyTorch, on random batches of every layer.

    PyTorch runs the scorers as they are trained, not as they are folded, so this checks the folding too.

    Raises:
        LynxError: they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(1)
    found = []
    for layer, own in enumerate(selector.layers):
        for tokens in sizes:
            groups = random_batch(selector, layer, tokens, generator)
            found.append(compare(own, runner, layer, groups))  # type: ignore[arg-type]
    absolute, relative, bits, differing = zip(*found, strict=True)
    return Parity(len(selector.layers), sizes, max(absolute), max(relative), sum(bits), sum(differing))


@torch.no_grad()
def compare(
    own: LayerSelector, runner: OnnxSelector, layer: int, groups: Groups, threshold: float | None = None
) -> tuple[float, float, int, int]:
    """Of one batch: the largest absolute and relative difference of costs, keep bits, and those that differ.

    `groups` without leading dimension; the threshold is by default `middle`.

    Raises:
        LynxError: the two differ by more than rounding.
    """
    one = Groups(*(part.unsqueeze(0) for part in groups))
    costs = own.costs(one)
    total = own.totals(one, costs)
    tau = middle(total) if threshold is None else threshold
    keep = own.keep(one, total, torch.tensor([tau]))[1].squeeze(0)
    costs, total = costs.squeeze(0), total.squeeze(0)
    answer = runner.run(layer, groups.logits, groups.indices, groups.weights, tau, groups.hidden, groups.active)
    got = Answer(*(torch.from_numpy(part) for part in answer))

    difference = torch.where(got.costs == costs, 0.0, (got.costs - costs).abs())
    relative = float((difference / costs.clamp_min(FLOOR)).max())
    differing = got.keep != keep
    # Rounding may carry a total over the threshold, or make another expert the dearest one, which stays.
    dearest = float(total.max())
    unsure = _close(total, tau) | _close(total, dearest)
    kept = got.keep[groups.indices] & groups.active.unsqueeze(-1)
    stand_in = got.run_indices[~kept]
    faults = {
        "costs": not relative <= TOLERANCE,
        "keep bits": bool((differing & ~unsure).any()),
        "weights": not torch.equal(got.run_weights, groups.weights.float() * kept),
        "indices": not (
            torch.equal(got.run_indices[kept], groups.indices[kept])
            and bool((got.keep[stand_in] & _close(total[stand_in], dearest)).all())
        ),
    }
    if any(faults.values()):
        wrong = ", ".join(name for name, fault in faults.items() if fault)
        raise LynxError(
            f"onnxruntime does not compute what PyTorch does ({wrong} of layer {layer}, {len(groups.active)} tokens, costs "
            f"apart by {relative:.1e} relatively): nothing was written; take the versions in constraints.txt"
        )
    return float(difference.max()), relative, differing.numel(), int(differing.sum())


def _close(totals: Tensor, value: float) -> Tensor:
    return (totals - value).abs() <= TOLERANCE * totals.clamp_min(abs(value))


@torch.inference_mode()
def time_layers(
    selector: LynxSelector, runner: OnnxSelector, tokens: int, rounds: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Microseconds of one layer's decision (no surrogates) by PyTorch and by onnxruntime, on one CPU thread.

    Every round runs each of them on the same batch, in an order that turns, one layer after the other. Given are
    median and 10th and 90th percentile, by name: `eager`, `compiled` (None where it cannot be compiled, with the
    `reason`), `onnxruntime` (its plain call with arrays), `bound` (IO binding, inputs and outputs in place) and `runner`
    (`OnnxSelector.run` with tensors).
    """
    generator = torch.Generator().manual_seed(seed)
    groups = random_batch(selector, 0, tokens, generator)._replace(active=torch.ones(tokens, dtype=torch.bool))
    rule: LayerSelector = selector.layers[0]  # type: ignore[assignment]
    folded: list[Folded] = [own.scorer.fold(own.sensitivity) for own in selector.layers]  # type: ignore[union-attr,operator]
    costs = folded[0].costs(feature_parts(*groups[1:4]), groups.indices, groups.hidden)
    tau = middle(rule.totals(groups, costs))
    threshold = torch.tensor(tau)
    feeds = {
        given.name: np.ascontiguousarray(getattr(groups, given.name).numpy())
        for given in runner.session.get_inputs()
        if given.name not in ("layer", "threshold")
    }
    feeds["threshold"] = threshold.numpy()
    place = np.zeros((), np.int64)
    binding, outputs = runner.session.io_binding(), list(OUTPUTS)
    for name, array in {**feeds, "layer": place}.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    answers = runner.session.run(outputs, {**feeds, "layer": place})
    for name, array in zip(outputs, answers, strict=True):
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def bound(layer: int) -> None:
        place[...] = layer
        runner.session.run_with_iobinding(binding)

    def run(layer: int) -> None:
        runner.run(layer, groups.logits, groups.indices, groups.weights, tau, groups.hidden, groups.active)

    layers = [{**feeds, "layer": np.asarray(layer)} for layer in range(len(folded))]
    contenders: dict[str, Callable[[int], object]] = {
        "eager": lambda layer: decide(rule, folded[layer], groups, threshold),
        "onnxruntime": lambda layer: runner.session.run(outputs, layers[layer]),
        "bound": bound,
        "runner": run,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reason = None
    try:
        compiled = torch.compile(decide, dynamic=False)
        with _quiet():
            compiled(rule, folded[0], groups, threshold)
        contenders["compiled"] = lambda layer: compiled(rule, folded[layer], groups, threshold)
    except Exception as error:  # whatever a missing or broken compiler raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    times: dict[str, list[float]] = {name: [] for name in contenders}
    try:
        for turn in range(WARM_UP + rounds):
            layer, names = turn % len(folded), list(contenders)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                contenders[name](layer)  # not timed: caches are then as it leaves them, not as another one does
                start = time.perf_counter()
                contenders[name](layer)
                times[name].append(1e6 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    figures: dict[str, Any] = {name: _spread(values[WARM_UP:]) for name, values in times.items()}
    if reason is not None:
        figures["compiled"], figures["reason"] = None, reason
    config = selector.config
    shape = {"experts": config.num_experts, "top_k": config.top_k, "hidden": config.hidden_size}
    return {
        "microseconds": figures,
        "tokens": tokens,
        **shape,
        "scorer": config.scorer,
        "layers": len(folded),
        "rounds": rounds,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "threads": 1},
    }


def _spread(values: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(values, n=10)
    return {"median": statistics.median(values), "low": tenths[0], "high": tenths[-1]}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
