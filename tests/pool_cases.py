"""Pools that are made up: what is true of them is known."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lynx_learn.measure.bound import Curve
from lynx_learn.measure.calibrate import pilot_thresholds
from lynx_learn.measure.pools import Pool, grid

SIZE = 2


def made_up(groups: int, seed: int, spread: float = 0.15, scale: float = 1.0) -> Pool:
    """Losses that grow with the threshold, each group's by a factor of its own, with the long upper tail of losses."""
    taus = grid(power_law(), [0.01, 0.03])
    factors = np.random.default_rng(seed).gamma(spread**-2, spread**2, size=groups) * scale
    losses = doubles([[0.0] * groups, *((loss_at(tau) * factors).tolist() for tau in taus)])
    kept = doubles([[1.0] * groups, *([1 / (1 + 50 * tau)] * groups for tau in taus)])
    return pool_of([0.0, *taus], losses, kept)


def pool_of(taus: list[float], losses: Tensor, kept: Tensor) -> Pool:
    """One in which every group has one token, and the mean is all that is guarded."""
    return Pool(doubles(taus), losses.unsqueeze(1), torch.ones(1, losses.shape[1]), kept)


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_at(tau: float) -> float:
    return float(2.0 * tau**1.3)


def power_law() -> Curve:
    return [(tau, loss_at(tau)) for tau in pilot_thresholds([0.01, 0.03], SIZE)]
