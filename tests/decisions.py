"""Decisions of one layer: groups of tokens by hand and at random, and whether two decisions are the same."""

import torch
from tiny import HIDDEN
from torch.utils._pytree import tree_flatten

from lynx_learn.moe.decision import Decision, Routing
from lynx_learn.moe.families import MoeLayer
from lynx_learn.selector.layer import LayerSelector
from lynx_learn.selector.selector import LynxSelector


def own(selector: LynxSelector, layer: int = 0) -> LayerSelector:
    return selector.layers[layer]  # type: ignore[return-value]


def random_routing(layer: MoeLayer, batches: int = 3, tokens: int = 6, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batches, tokens, HIDDEN, generator=generator)
    logits = 2 * torch.randn(batches, tokens, layer.num_experts, generator=generator)
    active = torch.rand(batches, tokens, generator=generator) < 0.8
    return Routing(hidden, logits, *layer.rule.route(logits), active)


def same(a: Decision, b: Decision) -> bool:
    (x, form), (y, other) = tree_flatten(tuple(a)), tree_flatten(tuple(b))
    return form == other and all(p is q or torch.equal(p, q) for p, q in zip(x, y, strict=True))


# Three tokens of a layer with four experts. Costs by expert: 0: 5, 1: 0.25 + 0.25, 2: 0.375 + 0.125, 3: 1.
INDICES = torch.tensor([[[0, 1], [1, 2], [3, 2]]])
WEIGHTS = torch.tensor([[[0.75, 0.25], [0.625, 0.375], [0.6, 0.4]]])
COSTS = torch.tensor([[[5.0, 0.25], [0.25, 0.375], [1.0, 0.125]]])
