"""The in-engine audit, without vLLM: a step that also runs with all experts, and what it counts."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lynx_learn.integrations.vllm.acting import audit as vllm_audit
from lynx_learn.integrations.vllm.acting.audit import MOST, Audit, check_forward
from lynx_learn.integrations.vllm.acting.rows import Rows
from lynx_learn.integrations.vllm.metrics import AUDIT_EDGES
from lynx_learn.integrations.vllm.settings import UnsupportedError

HIDDEN, WORDS, ROWS = 4, 50, 6


class Model(nn.Module):
    """Hidden states that rows which skip are moved in, and a cache that every run writes."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rows, self.cache = rows, torch.zeros(ROWS, HIDDEN)
        self.states = torch.randn(ROWS, HIDDEN, generator=generator)
        self.words = torch.randn(HIDDEN, WORDS, generator=generator)
        self.runs: list[bool] = []

    def forward(self) -> Tensor:
        self.runs.append(self.rows.acts)
        scale = self.rows.scale[:ROWS]
        self.cache = self.states + 0.1 * (scale.isfinite() & (scale > 0)).float()[:, None]
        return self.cache

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.words


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Rows]:
    def own_context(own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return own(*args, **kwargs)

    monkeypatch.setattr(vllm_audit, "_own_context", own_context)
    rows = Rows(ROWS, 0, torch.device("cpu"))
    return Model(rows), rows


def test_what_is_served_and_cached_is_the_second_run(made: tuple[Model, Rows]) -> None:
    model, rows = made
    audit = Audit(model, rows, 1)
    scale = np.array([1, np.inf, 1, 0.5], np.float32)
    rows.fill(scale)
    wanted = model().clone()
    before = rows.scale.clone()
    served = audit.run(model, np.array([0, 2]))
    assert model.runs[1:] == [False, True]
    assert torch.equal(served, wanted)
    assert torch.equal(model.cache, wanted)
    assert torch.equal(rows.scale, before)
    assert rows.acts
    untouched = functional.log_softmax(model.states[[0, 2]] @ model.words, -1)
    skipped = functional.log_softmax(wanted[[0, 2]] @ model.words, -1)
    kl = functional.kl_div(skipped, untouched, log_target=True, reduction="none").sum(-1)
    assert kl.min() > 1e-3
    assert audit.sums[-1].item() == pytest.approx(kl.sum().item(), rel=1e-4)
    place = [sum(value > edge for edge in AUDIT_EDGES) for value in kl.tolist()]
    assert audit.sums[:-1].tolist() == [place.count(i) for i in range(len(AUDIT_EDGES) + 1)]


def test_a_step_that_fails_leaves_no_row_keeping_everything(made: tuple[Model, Rows]) -> None:
    _, rows = made
    rows.fill(np.ones(2, np.float32))
    before = rows.scale.clone()

    def fails() -> None:
        with rows.paused():
            assert rows.scale.isposinf().all()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert torch.equal(rows.scale, before)


def test_which_steps_and_rows(made: tuple[Model, Rows]) -> None:
    model, rows = made
    audit = Audit(model, rows, 3)
    assert [acted for acted in range(8) if audit.due(acted)] == [0, 3, 6]
    audit.every = 0
    assert not audit.due(0)
    audit.every = 3
    many = np.arange(2 * MOST + 5)
    seen = [audit.choose(many, acted) for acted in (0, 3, 6)]
    assert all(len(part) == MOST and (np.diff(part) > 0).all() for part in seen)
    assert set(np.concatenate(seen)) == set(many)  # in turn
    assert audit.choose(many[:5], 3).tolist() == [0, 1, 2, 3, 4]


def test_a_model_that_is_compiled_as_a_whole_is_refused() -> None:
    """Its own `forward` is what is traced, and nothing that takes its place would be called."""

    class Whole(nn.Module):
        def __call__(self) -> None:
            pass

    check_forward(nn.Linear(1, 1))
    with pytest.raises(UnsupportedError, match=r"Whole is compiled as a whole.+LYNX_AUDIT_EVERY=0"):
        check_forward(Whole())


def test_workers_that_put_no_logits_together_count_nothing(made: tuple[Model, Rows]) -> None:
    model, rows = made
    rows.fill(np.ones(2, np.float32))
    audit = Audit(SimpleNamespace(compute_logits=lambda _: None), rows, 1)  # type: ignore[arg-type]
    audit.run(model, np.array([0]))
    assert not audit.sums.any()
