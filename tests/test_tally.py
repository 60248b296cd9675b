"""Counting, against sums made by hand."""

import pytest
import torch
from rule_cases import RULE
from torch import Tensor, nn

from lynx_learn.decode.tally import Stats, Tally
from lynx_learn.moe.decision import Decision, Routing
from lynx_learn.moe.families import Layer, MoeLayer

# Bytes of one expert in the first and in the second layer.
BYTES = (100, 300)


class Priced:
    """A policy that reads 10 bytes for each expert that was skipped, and 1 for each batch."""

    name = setting = "priced"

    def bind(self, layers: list[MoeLayer]) -> None: ...

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        raise NotImplementedError

    def own_bytes(self, layer: Layer, skipped: Tensor, batches: int) -> float:
        return 10 * float(skipped.sum()) + batches


def layers() -> list[MoeLayer]:
    """Two layers of four experts, of which a token takes two."""
    return [
        MoeLayer(i, f"mlp.{i}", nn.Identity(), nn.Linear(2, 4), nn.ParameterList([torch.zeros(size)]), 4, 2, 2, RULE, 0)
        for i, size in enumerate(BYTES)  # four bytes a number, four experts
    ]


def routing(indices: list[list[list[int]]], active: list[list[bool]]) -> Routing:
    """Batches of tokens with these experts."""
    chosen = torch.tensor(indices)
    return Routing(
        torch.zeros(*chosen.shape[:2], 2),
        torch.zeros(*chosen.shape[:2], 4),
        chosen,
        torch.full(chosen.shape, 0.5),
        torch.tensor(active),
    )


def decision(indices: list[list[list[int]]], answered: list[list[list[bool]]] | None = None) -> Decision:
    chosen = torch.tensor(indices)
    given = None if answered is None else torch.tensor(answered)
    return Decision(chosen, torch.full(chosen.shape, 0.5), answered=given)


def filled(policy: Priced | None) -> Tally:
    """Two batches of three tokens in one layer, one of them in the other; the last token is padding."""
    first, second = layers()
    tally = Tally([first, second], policy)
    live = [[True, True, False], [True, True, False]]
    # Loaded by the first two tokens: experts 0, 1, 2, and then 0, 1; as run: 0, 1, and then 0.
    wanted = routing([[[0, 1], [1, 2], [3, 0]], [[0, 1], [1, 0], [2, 3]]], live)
    answered = [[[False, False], [False, True], [True, True]], [[False, True], [True, False], [False, False]]]
    tally.add(first, wanted, decision([[[0, 1], [1, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]]], answered))
    tally.add(second, routing([[[0, 1], [2, 3], [0, 0]]], live[:1]), decision([[[0, 1], [1, 0], [0, 0]]]))
    return tally


def test_distinct_experts_bytes_and_answers_are_counted() -> None:
    stats = filled(None).stats()
    assert stats.steps == 2
    assert stats.experts_before == [2.5, 4.0]
    assert stats.experts_after == [1.5, 2.0]
    assert stats.bytes_ratio == pytest.approx((3 * 100 + 2 * 300) / (5 * 100 + 4 * 300))
    # Active: 4 tokens in the first layer and 2 in the second, 2 assignments each; 3 of them answered.
    assert stats.answered_share == pytest.approx(3 / 12)


def test_what_the_policy_reads_itself_is_counted_too() -> None:
    own = (10 * 2 + 2) + (10 * 2 + 1)
    assert filled(Priced()).stats().bytes_ratio == pytest.approx((900 + own) / 1700)


def test_the_sums_on_a_device_are_those_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    host = filled(None).stats()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert filled(None).stats() == host


def test_loads_that_the_decision_brings_are_taken_as_they_are() -> None:
    first, second = layers()
    tally = Tally([first, second], None)
    own = decision([[[0, 1]]])._replace(
        loads=(torch.tensor([[True, True, True, True]]), torch.tensor([[True, False, False, True]]))
    )
    tally.add(first, routing([[[0, 1]]], [[True]]), own)
    assert tally.stats().experts_before[0] == 4.0
    assert tally.stats().experts_after[0] == 2.0


def test_where_nothing_was_decided_nothing_was_saved() -> None:
    stats = Tally(layers(), Priced()).stats()
    assert (stats.steps, stats.bytes_ratio, stats.answered_share) == (0, 1.0, 0.0)
    assert str(stats) == "no decode step was acted on"


def test_calls_that_were_passed_by_are_said_by_their_reason() -> None:
    tally = filled(None)
    for _ in range(2):
        tally.pass_by("drafts")
    tally.pass_by("no cache")
    stats = tally.stats()
    assert stats.passed_by == {"drafts": 2, "no cache": 1}
    assert str(stats).endswith("; 2 calls not acted on: drafts; 1 calls not acted on: no cache")


def test_statistics_are_one_line() -> None:
    stats = Stats(31, [10.0, 10.8], [6.0, 6.1], 0.624, 0.391)
    assert str(stats) == (
        "31 decode steps: 10.4 -> 6.0 distinct experts per layer, 62% of the bytes, "
        "39% of assignments answered by surrogates"
    )
