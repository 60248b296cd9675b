"""What skipping costs, measured while it serves: now and again a step also runs with all experts."""

from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..metrics import AUDIT_EDGES
from ..settings import UnsupportedError
from .rows import Rows

MOST = 16
"""Tokens of a step that are compared: logits of a whole batch may not fit beside everything else."""


class Audit:
    """Runs a step twice and compares the next token's distribution, in a histogram.

    First with all experts, then as it is served, which writes the same keys and values anew: what is served, now and later,
    is what it would be without. Both read the keys and values of earlier steps as these were served.
    """

    def __init__(self, model: nn.Module, rows: Rows, every: int) -> None:
        """`every` so many steps acted on; 0: never."""
        self.model, self.rows, self.every = model, rows, every
        self.edges = torch.tensor(AUDIT_EDGES, dtype=torch.float64, device=rows.scale.device)
        self.sums = torch.zeros(len(AUDIT_EDGES) + 2, dtype=torch.float64, device=rows.scale.device)
        """Tokens up to each edge and above the one before, tokens above the last, and the sum of all divergences."""
        self.host = torch.zeros_like(self.sums, device="cpu", pin_memory=self.sums.is_cuda)

    def due(self, acted: int) -> bool:
        """Before a step that is acted on, behind so many others."""
        return self.every > 0 and acted % self.every == 0

    def run(
        self, own: Callable[..., Tensor], rows: "np.ndarray[Any, np.dtype[np.int64]]", *args: Any, **kw: Any
    ) -> Any:
        """`own` for the step that `Rows` is filled for, and twice; `rows` are those to compare.

        Returns:
            What is served: hidden states `(tokens, hidden)`.
        """
        place = torch.from_numpy(rows).to(self.sums.device)
        with self.rows.paused():
            untouched = _own_context(own, *args, **kw)[place]
        served = _own_context(own, *args, **kw)
        # Every worker that shares the model comes here: logits are put together from all of them.
        logits = self.model.compute_logits(torch.cat([untouched, served[place]]))  # type: ignore[operator]
        if logits is not None:
            self.count(*logits.chunk(2))
        return served

    def count(self, untouched: Tensor, served: Tensor) -> None:
        """Logits `(tokens, vocabulary)`: nats of KL from the untouched model to the served one, without waiting for the device."""
        wanted, found = (part.float().log_softmax(-1) for part in (untouched, served))
        # Rounding may leave a difference of 0 a little below it.
        kl = (wanted.exp() * (wanted - found)).sum(-1).clamp_min(0).double()
        self.sums[:-1].index_add_(0, torch.bucketize(kl, self.edges), torch.ones_like(kl))
        self.sums[-1] += kl.sum()

    def choose(self, rows: "np.ndarray[Any, np.dtype[np.int64]]", acted: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Up to `MOST` of these, in turn."""
        return np.sort(np.roll(rows, -(acted // self.every) * MOST)[:MOST])


def check_forward(model: nn.Module) -> None:
    """Refuse a model whose `forward` is only traced: it cannot be wrapped on the instance.

    Raises:
        UnsupportedError: vLLM compiles the whole of it.
    """
    if type(model).__call__ is not nn.Module.__call__:
        raise UnsupportedError(
            f"{type(model).__name__} is compiled as a whole, which model runner V2 cannot audit: set LYNX_AUDIT_EVERY=0"
        )


def _own_context(own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """With a copy of what vLLM says of the step, in which operations count the layers that have been run."""
    from vllm.forward_context import get_forward_context, override_forward_context

    with override_forward_context(copy(get_forward_context())):
        return own(*args, **kwargs)
