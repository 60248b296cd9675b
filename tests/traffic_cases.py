"""Small routings written out, for the tests of simulated hardware."""

import torch

from lynx_learn.hardware.traffic import Traffic

# Steps, then layers, then requests, each with its experts.
Routes = list[list[list[list[int]]]]


def traffic(routes: Routes, experts: int, cost: float = 1.0) -> Traffic:
    """Equal weights; every assignment costs the same."""
    indices = torch.tensor(routes)
    weights = torch.full(indices.shape, 1 / indices.shape[-1])
    active = torch.ones(indices.shape[:-1], dtype=torch.bool)
    steps, _, requests, _ = indices.shape
    return Traffic(indices, weights, torch.full(indices.shape, cost), active, experts, steps * requests)
