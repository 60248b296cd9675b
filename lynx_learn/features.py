"""Features of one assignment (token, expert), from what the router computed. Pure; the same for training and decode."""

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
# Weights below this are alike to a scorer; keeps the logarithm finite.
SMALLEST_WEIGHT = 1e-6


def assignment_features(logits: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Features `(..., top_k, len(NAMES))` in float32, finite for finite input.

    Args:
        logits: router logits `(..., experts)`.
        indices: chosen experts `(..., top_k)`.
        weights: their weights `(..., top_k)`, at least 0.
    """
    logits, weights = logits.float(), weights.float()
    experts, top_k = logits.shape[-1], indices.shape[-1]
    ordered = logits.topk(min(top_k + 1, experts), dim=-1).values
    unchosen = ordered[..., -1:]
    chosen = logits.gather(-1, indices)
    mean, spread = logits.mean(-1, keepdim=True), logits.std(-1, keepdim=True).clamp_min(1e-6)
    partition = logits.logsumexp(-1, keepdim=True)
    log_probabilities = logits - partition
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1, keepdim=True)
    share = weights / weights.sum(-1, keepdim=True).clamp_min(SMALLEST_WEIGHT)
    rank = (weights.unsqueeze(-2) > weights.unsqueeze(-1)).sum(-1).float()
    columns = (
        weights.clamp_min(SMALLEST_WEIGHT).log(),
        share,
        rank / top_k,
        chosen - ordered[..., :1],
        (chosen - mean) / spread,
        chosen - unchosen,
        chosen - partition,
        entropy.expand_as(chosen),
        spread.expand_as(chosen),
        share.amax(-1, keepdim=True).expand_as(chosen),
        share.amin(-1, keepdim=True).expand_as(chosen),
        (chosen.amin(-1, keepdim=True) - unchosen).expand_as(chosen),
        partition.expand_as(chosen),
    )
    return torch.stack(columns, dim=-1)
