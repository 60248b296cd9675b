"""What each row of a step asks for: a buffer that the model runner fills and every layer reads.

Nothing else tells layers about the step, so that a compiled or captured graph of them stays as it is when requests, levels
and phases change.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from ....selector.config import SelectorConfig, by_active
from ..metrics import ACTED

# Bounds of a scale: 0 and infinity have meanings of their own.
_LEAST, _MOST = 1e-30, 1e30


class Rows:
    """`scale` says how many times each row's costs count: infinite where it keeps all its experts, 0 where it is padding.

    While nothing is skipped all of it is infinite. `acts` says on the host whether anything may be.
    """

    def __init__(self, most: int, captured: int, device: torch.device) -> None:
        """Of at most so many rows; `captured` is the largest number that graphs are captured of, or 0."""
        self.scale = torch.full((most,), math.inf, device=device)
        self.captured = captured
        self.acts = False

    def decide(self, rows: int) -> bool:
        """Whether a layer has to decide. While a graph is captured it has, for steps to come."""
        return rows <= (len(self.scale) if self.acts else self.captured)

    def fill(self, scale: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> None:
        """The first rows' scale; all others are padding."""
        # In memory of its own each time: the copy may still wait when the next step is planned.
        found = torch.from_numpy(scale)
        found = found.pin_memory() if self.scale.is_cuda else found
        self.scale.zero_()
        self.scale[: len(scale)].copy_(found, non_blocking=True)
        self.acts = True

    def clear(self) -> None:
        if self.acts:
            self.scale.fill_(math.inf)
            self.acts = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Everything is kept meanwhile."""
        scale = self.scale.clone()
        self.clear()
        try:
            yield
        finally:
            self.scale.copy_(scale)
            self.acts = True


class Levels:
    """How many times costs count for requests that ask for other budgets than the server's.

    A level is as much stricter as its threshold at the step's size is lower. What it bounds is relative: budgets are
    calibrated on batches of one level.
    """

    def __init__(self, thresholds: Mapping[int, float], budget: float, config: SelectorConfig) -> None:
        """The server's thresholds and the budget that they belong to; `config` knows those of others."""
        self.config = config
        self.tables = {budget: by_active(dict(thresholds)), 0.0: [0.0]}

    def threshold(self, budget: float, active: int) -> float:
        """In nats, for a number of active tokens; 0 for a budget that is not calibrated."""
        if budget not in self.tables:
            known = {float(text): text for text in self.config.thresholds.get("kl", {})}
            self.tables[budget] = by_active(self.config.calibrated(budget)) if budget in known else [0.0]
        table = self.tables[budget]
        return table[min(active, len(table) - 1)]

    def scales(
        self, asked: "np.ndarray[tuple[int], np.dtype[np.float64]]", server: float
    ) -> "tuple[str, np.ndarray[tuple[int], np.dtype[np.float32]]]":
        """What becomes of a step, and each row's scale.

        Args:
            asked: each row's budget, 0 where it keeps everything.
            server: the server's budget.
        """
        found = np.full(len(asked), math.inf, np.float32)
        asks = asked > 0
        if not asks.any():
            return "opted_out", found
        # Rows that a level leaves no threshold do not count for the others', which then is that of a smaller batch.
        while active := int(asks.sum()):
            own = self.threshold(server, active)
            each = {budget: self.threshold(budget, active) for budget in np.unique(asked[asks]).tolist()}
            strict = [budget for budget, threshold in each.items() if not threshold]
            if not own:
                break
            if not strict:
                ratios = {b: 1.0 if b == server else min(max(own / t, _LEAST), _MOST) for b, t in each.items()}
                found[asks] = [ratios[budget] for budget in asked[asks].tolist()]
                return ACTED, found
            asks &= ~np.isin(asked, strict)
        return "below_smallest_size", found
