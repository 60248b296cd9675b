"""Decisions of a batch as they reach the experts."""

import torch

from lynx_learn.moe.decision import Decision, confine, used_experts

INDICES = torch.tensor([[[3, 1], [0, 2], [3, 2]]])
WEIGHTS = torch.tensor([[[0.5, 0.5], [0.7, 0.3], [0.6, 0.4]]])


def test_tokens_that_are_not_active_run_on_what_others_load_with_their_own_weights() -> None:
    active = torch.tensor([[True, False, True]])
    addition, answered = torch.ones(1, 3, 4), torch.ones_like(INDICES, dtype=torch.bool)
    done = confine(Decision(INDICES, WEIGHTS, addition, answered), active, 5)
    loaded = used_experts(done.indices, torch.ones_like(active), 5)
    assert loaded.tolist() == used_experts(INDICES, active, 5).tolist() == [[False, True, True, True, False]]
    torch.testing.assert_close(done.weights[0], torch.tensor([[0.5, 0.5], [0.0, 0.3], [0.6, 0.4]]))
    assert done.indices[0, 1, 1] == 2, "an expert that others load"
    assert done.indices[0, [0, 2]].tolist() == INDICES[0, [0, 2]].tolist()
    assert done.addition is addition
    assert done.answered is answered


def test_where_no_token_is_active_all_run_as_decided() -> None:
    done = confine(Decision(INDICES, WEIGHTS), torch.zeros(1, 3, dtype=torch.bool), 5)
    assert torch.equal(done.indices, INDICES)
    assert torch.equal(done.weights, WEIGHTS)
