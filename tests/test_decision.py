"""Decisions of a batch as they reach the experts."""

import torch
from torch import Tensor

from lynx_learn.moe.decision import Decision, silence, used_experts


def test_silenced_tokens_point_at_a_loaded_expert_with_weight_zero() -> None:
    indices = torch.tensor([[[3, 1], [0, 2], [3, 2]]])
    active = torch.tensor([[True, False, True]])
    weights, addition = torch.full((1, 3, 2), 0.5), torch.ones(1, 3, 4)
    quiet = silence(Decision(indices, weights, addition, torch.ones_like(indices, dtype=torch.bool)), active, 5)
    loaded: Tensor = used_experts(quiet.indices, torch.ones_like(active), 5)
    assert loaded.tolist() == used_experts(indices, active, 5).tolist() == [[False, True, True, True, False]]
    assert quiet.weights[0].tolist() == [[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]]
    assert quiet.addition is not None
    assert quiet.addition[0, :, 0].tolist() == [1, 0, 1]
    assert quiet.answered is not None
    assert quiet.answered[0, :, 0].tolist() == [True, False, True]
    assert quiet.indices[0, [0, 2]].tolist() == indices[0, [0, 2]].tolist()
