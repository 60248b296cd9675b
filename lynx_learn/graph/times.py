"""Time of a layer's decision in PyTorch and in onnxruntime."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..moe.decision import Routing
from ..selector.features import feature_parts
from ..selector.layer import LayerSelector
from ..selector.scorers import Folded
from ..selector.selector import LynxSelector
from .check import middle
from .graph import decide, quiet, random_batch, surrogates_of
from .onnx_runtime import OnnxSelector

# Rounds of timing that are thrown away.
WARM_UP = 50


@torch.inference_mode()
def time_layers(
    selector: LynxSelector, runner: OnnxSelector, tokens: int, rounds: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Microseconds of one layer's decision, surrogates included, by PyTorch and by onnxruntime, on one CPU thread.

    Every round runs each of them on the same batch, in an order that turns, one layer after the other. Given are
    median and 10th and 90th percentile, by name: `eager`, `compiled` (None where it cannot be compiled, with the
    `reason`), `onnxruntime` (its plain call with arrays), `bound` (IO binding, inputs and outputs in place) and `runner`
    (`OnnxSelector.run` with tensors).
    """
    generator = torch.Generator().manual_seed(seed)
    routing = random_batch(selector, 0, tokens, generator)._replace(active=torch.ones(tokens, dtype=torch.bool))
    rule: LayerSelector = selector.layers[0]  # type: ignore[assignment]
    folded: list[Folded] = [own.scorer.fold(own.sensitivity) for own in selector.layers]  # type: ignore[union-attr,operator]
    surrogates = [surrogates_of(own) for own in selector.layers]  # type: ignore[arg-type]
    costs = folded[0].costs(
        feature_parts(routing.logits, routing.indices, routing.weights), routing.indices, routing.hidden
    )
    tau = middle(rule.totals(routing, costs))
    threshold = torch.tensor(tau)
    feeds = {
        given.name: np.ascontiguousarray(getattr(routing, given.name).numpy())
        for given in runner.session.get_inputs()
        if given.name in Routing._fields
    }
    feeds["prices"] = np.ones(routing.logits.shape[-1], np.float32)
    feeds["devices"] = np.zeros(routing.logits.shape[-1], np.int64)
    feeds["threshold"] = threshold.numpy()
    place = np.zeros((), np.int64)
    binding, outputs = runner.session.io_binding(), list(runner.outputs)
    for name, array in {**feeds, "layer": place}.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    answers = runner.session.run(outputs, {**feeds, "layer": place})
    for name, array in zip(outputs, answers, strict=True):
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def bound(layer: int) -> None:
        place[...] = layer
        runner.session.run_with_iobinding(binding)

    def run(layer: int) -> None:
        runner.run(layer, routing.logits, routing.indices, routing.weights, tau, routing.hidden, routing.active)

    layers = [{**feeds, "layer": np.asarray(layer)} for layer in range(len(folded))]
    contenders: dict[str, Callable[[int], object]] = {
        "eager": lambda layer: decide(rule, folded[layer], routing, threshold, surrogates[layer]),
        "onnxruntime": lambda layer: runner.session.run(outputs, layers[layer]),
        "bound": bound,
        "runner": run,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reason = None
    try:
        compiled = torch.compile(decide, dynamic=False)
        with quiet():
            compiled(rule, folded[0], routing, threshold, surrogates[0])
        contenders["compiled"] = lambda layer: compiled(rule, folded[layer], routing, threshold, surrogates[layer])
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
