"""A decode batch's decision on a CPU as one compiled function: what `Ready.rewrite` and `Surrogates.answer` give.

In PyTorch a decision is dozens of small operations, each of which costs more in being called than in computing. Numba
compiles this one the first time that a machine needs it, which takes some seconds, and keeps it on disk beside its
source; where that is read-only, in the user's cache folder or in NUMBA_CACHE_DIR. Importing this module needs numba.

Nothing is copied that float32 already holds: tensors are read where they lie.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...moe.decision import Decision, Routing
from ..prices import Price
from ..scorers import Folded
from ..surrogates import Surrogates
from .cpu import Arrays, decide

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The inner layer is padded to whole vectors: what remains of a row would be computed number by number.
_COLUMNS = 16
# Multiplications from which on the projection of the hidden states is BLAS's.
_LARGE = 400_000


def _columns(matrix: Tensor, width: int) -> tuple[Any, Any]:
    """The inner layer's columns, padded, and the last one, which is none of them."""
    padded = functional.pad(matrix[:, :width], (0, -width % _COLUMNS))
    return _array(padded), _array(matrix[:, width])


def _array(tensor: Tensor) -> Any:
    """What NumPy sees of a tensor, of bfloat16 the bits: where it lies if it is contiguous."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


class Compiled:
    """One layer's decision as a compiled function, everything that no step changes laid out for it."""

    def __init__(self, folded: Folded, surrogates: Surrogates, thresholds: Tensor, keep_top1: bool) -> None:
        """Arguments as in `triton.rewrite`. Loads the compiled function, and compiles it first where nobody has yet."""
        self.made_of = (folded, surrogates, thresholds, keep_top1)
        width = folded.outer.shape[0]
        self.own = Arrays(
            *_columns(folded.assignment, width),
            *_columns(folded.token, width),
            *_columns(folded.experts, width),
            projection=_array(folded.projection.T),
            outer=_array(functional.pad(folded.outer, (0, -width % _COLUMNS))),
            thresholds=_array(thresholds),
            down=_array(surrogates.down),
            up=_array(surrogates.up),
            constant=_array(surrogates.constant),
            starts=_array(surrogates.starts),
        )
        self.projection, self.answers = folded.projection, len(surrogates.down) > 0
        own, (experts, hidden) = self.own, (folded.experts.shape[0], folded.projection.shape[0])
        sizes = [experts, hidden, len(own.outer), len(own.projection), len(own.down), len(own.token)]
        sizes += [len(own.assignment), len(own.thresholds), keep_top1]
        self.table = np.array(sizes + [part.ctypes.data for part in own], np.int64)
        one = torch.zeros(1, 1)
        self.decide(Routing(torch.zeros(1, hidden), torch.zeros(1, experts), one.long(), one, torch.ones(1).bool()))

    def __reduce__(self) -> Any:
        return Compiled, self.made_of  # addresses hold in one process only

    @staticmethod
    def is_for(folded: Folded, surrogates: Surrogates) -> bool:
        """Whether a layer's scorer and surrogates lie where and in types that the function was written for."""
        parts = (*folded, surrogates.down)
        return all(part.device.type == "cpu" for part in parts) and (
            all(part.dtype == torch.float32 for part in folded) and surrogates.down.dtype in FLOATS[:2]
        )

    def takes(self, routing: Routing) -> bool:
        """Whether it can decide for these: plain tensors that want no gradient, and at least one token and two experts."""
        hidden, logits, indices, weights, _ = routing
        return (
            type(hidden) is Tensor
            and not torch.compiler.is_compiling()
            and 0 < len(logits) != logits.numel()
            and hidden.dtype in FLOATS
            and logits.dtype in FLOATS
            and weights.dtype in FLOATS
            and indices.dtype == torch.int64
            and not (hidden.requires_grad or logits.requires_grad or weights.requires_grad)
        )

    def decide(self, routing: Routing, scale: Tensor | None = None, price: Price | None = None) -> Decision:
        """The whole decision, with what surrogates answer, for what it `takes`: one decode batch without a leading dimension.

        `scale` is `(T,)`, and as in `ThresholdPolicy`.
        """
        each, devices = price or (None, None)
        hidden, logits, weights = _floats(routing.hidden), _floats(routing.logits), _floats(routing.weights)
        indices, active = _plain(routing.indices), _plain(routing.active)
        scale = None if scale is None else _floats(scale)
        tokens, top_k = indices.shape
        projected = None
        if hidden.numel() * self.projection.shape[1] >= _LARGE:
            projected = hidden @ self.projection
        new_indices, new_weights = torch.empty_like(indices), torch.empty_like(weights)
        answered = torch.empty(tokens, top_k, dtype=torch.bool)
        loads = torch.empty(2, logits.shape[1], dtype=torch.bool)
        addition = torch.empty_like(hidden) if self.answers else None
        left_out = decide(
            self.table,
            self.own.down,
            tokens,
            top_k,
            *map(_address, (hidden, logits, indices, weights, active, scale, projected, each, devices)),
            *map(_address, (new_indices, new_weights, answered, loads, addition)),
        )
        return Decision(
            new_indices,
            new_weights if routing.weights.dtype == torch.float32 else new_weights.to(routing.weights.dtype),
            addition if left_out else None,
            answered if self.answers else None,
            (loads[0], loads[1]),
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _plain(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _floats(tensor: Tensor) -> Tensor:
    """In float32 and without gaps: itself, if it is that already."""
    return _plain(tensor if tensor.dtype == torch.float32 else tensor.float())
