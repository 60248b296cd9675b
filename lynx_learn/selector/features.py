"""Features of one assignment (token, expert), from what the router computed. Pure; the same for training and decode."""

from typing import NamedTuple

import torch
from torch import Tensor

NAMES = (
    "log_weight",
    "weight_share",
    "rank",
    "logit_below_best",
    "logit_standardised",
    "logit_above_first_unchosen",
    "log_probability",
    "entropy",
    "logit_spread",
    "best_weight_share",
    "last_weight_share",
    "last_logit_above_first_unchosen",
    "log_partition",
)
LOG_WEIGHT = NAMES.index("log_weight")
# Every feature is a sum of quantities of the assignment and quantities of its token. `Parts` holds the quantities, these
# say with what sign they make up each feature. So a linear map of the features is one of the few quantities.
ASSIGNMENT_PARTS = ("log_weight", "weight_share", "rank", "logit", "scaled_logit")
TOKEN_PARTS = (
    "best_logit",
    "scaled_mean_logit",
    "first_unchosen_logit",
    "log_partition",
    "entropy",
    "logit_spread",
    "last_weight_share",
    "best_weight_share",
    "last_logit",
)
SUMS: dict[str, dict[str, float]] = {
    "log_weight": {"log_weight": 1.0},
    "weight_share": {"weight_share": 1.0},
    "rank": {"rank": 1.0},
    "logit_below_best": {"logit": 1.0, "best_logit": -1.0},
    "logit_standardised": {"scaled_logit": 1.0, "scaled_mean_logit": -1.0},
    "logit_above_first_unchosen": {"logit": 1.0, "first_unchosen_logit": -1.0},
    "log_probability": {"logit": 1.0, "log_partition": -1.0},
    "entropy": {"entropy": 1.0},
    "logit_spread": {"logit_spread": 1.0},
    "best_weight_share": {"best_weight_share": 1.0},
    "last_weight_share": {"last_weight_share": 1.0},
    "last_logit_above_first_unchosen": {"last_logit": 1.0, "first_unchosen_logit": -1.0},
    "log_partition": {"log_partition": 1.0},
}
# Weights below this are alike to a scorer; keeps the logarithm finite.
SMALLEST_WEIGHT = 1e-6


class Parts(NamedTuple):
    """What the features of a batch's assignments are sums of."""

    assignment: Tensor
    """(..., top_k, len(ASSIGNMENT_PARTS)), float32."""
    token: Tensor
    """(..., len(TOKEN_PARTS)), float32."""


def feature_parts(logits: Tensor, indices: Tensor, weights: Tensor) -> Parts:
    """The quantities that features are sums of; arguments as in `assignment_features`."""
    logits, weights = logits.float(), weights.float()
    experts, top_k = logits.shape[-1], indices.shape[-1]
    ordered = logits.topk(min(top_k + 1, experts), dim=-1).values
    chosen = logits.gather(-1, indices)
    spread, mean = torch.std_mean(logits, dim=-1, keepdim=True)
    spread = spread.clamp_min(1e-6)
    partition = logits.logsumexp(-1, keepdim=True)
    entropy = partition - torch.linalg.vecdot(logits.softmax(-1), logits).unsqueeze(-1)
    share = weights / weights.sum(-1, keepdim=True).clamp_min(SMALLEST_WEIGHT)
    rank = (weights.unsqueeze(-2) > weights.unsqueeze(-1)).sum(-1, dtype=torch.float32) / top_k
    assignment = (weights.clamp_min(SMALLEST_WEIGHT).log(), share, rank, chosen, chosen / spread)
    token = (
        ordered[..., :1],
        mean / spread,
        ordered[..., -1:],
        partition,
        entropy,
        spread,
        share.amin(-1, keepdim=True),
        share.amax(-1, keepdim=True),
        chosen.amin(-1, keepdim=True),
    )
    return Parts(torch.stack(assignment, dim=-1), torch.cat(token, dim=-1))


def part_maps(device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The signs in SUMS as matrices `(len(ASSIGNMENT_PARTS), len(NAMES))` and `(len(TOKEN_PARTS), len(NAMES))`."""
    maps = [
        [[SUMS[name].get(part, 0.0) for name in NAMES] for part in parts] for parts in (ASSIGNMENT_PARTS, TOKEN_PARTS)
    ]
    return torch.tensor(maps[0], device=device), torch.tensor(maps[1], device=device)


def assignment_features(logits: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Features `(..., top_k, len(NAMES))` in float32, finite for finite input.

    Args:
        logits: router logits `(..., experts)`.
        indices: chosen experts `(..., top_k)`.
        weights: their weights `(..., top_k)`, at least 0.
    """
    parts = feature_parts(logits, indices, weights)
    of_assignment, of_token = part_maps(logits.device)
    return parts.assignment @ of_assignment + (parts.token @ of_token).unsqueeze(-2)
