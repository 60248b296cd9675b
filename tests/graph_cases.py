"""Selectors with random parameters, their graphs, and batches to ask both about."""

import functools
from typing import Any

import pytest
import torch
from tiny import randomise

from lynx_learn.graph.graph import random_batch, to_bytes
from lynx_learn.graph.onnx_runtime import OnnxSelector
from lynx_learn.moe.decision import Routing
from lynx_learn.selector.config import SelectorConfig
from lynx_learn.selector.layer import LayerSelector
from lynx_learn.selector.selector import LynxSelector

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
EXPERTS, TOP_K, HIDDEN, LAYERS = 8, 2, 32, 3
SIZES = (1, 2, 3, 16, 17, 64, 511, 512)
THRESHOLDS = {"kl": {"0.01": {"4": 0.5, "8": 2.0}, "0.1": {"1": 3.0}}, "nll": {"0.01": {"2": 0.25}}}
# (scorer, every token keeps its first expert, experts, top_k); the first two have no surrogates
KINDS = [
    ("formula", True, EXPERTS, TOP_K),
    ("linear", False, EXPERTS, TOP_K),
    ("mlp", True, EXPERTS, TOP_K),
    ("mlp", False, 4, 4),
]
Kind = tuple[str, bool, int, int]
MLP = KINDS[2]


@functools.cache
def selector_of(kind: Kind) -> LynxSelector:
    scorer, keep_top1, experts, top_k = kind
    names = tuple(f"layers.{layer}" for layer in range(LAYERS))
    shape = (experts, top_k, HIDDEN, 1000, scorer, 4 if scorer == "mlp" else 0, keep_top1)
    config = SelectorConfig(
        "base", "revision", "tiny", {"routers": [{}] * LAYERS}, names, *shape, THRESHOLDS, {"kl": {"seed": 1}}
    )
    selector = LynxSelector(config)
    randomise(selector)
    return selector


@functools.cache
def content(kind: Kind) -> bytes:
    return to_bytes(selector_of(kind))


@functools.cache
def runner_of(kind: Kind) -> OnnxSelector:
    return OnnxSelector(content(kind))


def own(kind: Kind, layer: int) -> LayerSelector:
    return selector_of(kind).layers[layer]  # type: ignore[return-value]


def batch(kind: Kind, layer: int, tokens: int, seed: int = 0) -> Routing:
    return random_batch(selector_of(kind), layer, tokens, torch.Generator().manual_seed(seed))


def in_front(routing: Routing) -> Routing:
    """With the leading dimension that selectors expect."""
    return Routing(*(part.unsqueeze(0) for part in routing))


def ask(runner: OnnxSelector, layer: int, routing: Routing, threshold: float) -> Any:
    return runner.run(
        layer, routing.logits, routing.indices, routing.weights, threshold, routing.hidden, routing.active
    )


def changed() -> LynxSelector:
    """As the one of MLP, but one layer's costs off by half a percent."""
    other = LynxSelector(selector_of(MLP).config)
    other.load_state_dict(selector_of(MLP).state_dict())
    other.layers[2].scorer.log_residual += 0.005  # type: ignore[union-attr,operator]
    return other
