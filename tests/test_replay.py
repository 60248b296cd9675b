"""Traces replayed through fast memory: the best possible by trying all, rules against it, and what is foreseen."""

from typing import Any

import numpy as np
import pytest
import torch
from flows import tiny_flow
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx_learn.errors import OptionError, TraceError
from lynx_learn.offload.predict import Correlated, Learned, Popular, Seen
from lynx_learn.offload.replay import Farthest, ReplayOptions, Steps, hits, rates, recall, replay
from lynx_learn.offload.slots import LeastExpected, LeastRecent


def most_hits(requests: list[int], count: int) -> int:
    """By trying every choice of what makes room."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for wanted in requests:
        after: dict[frozenset[int], int] = {}
        for held, found in states.items():
            if wanted in held:
                choices = [held]
            elif len(held) < count:
                choices = [held | {wanted}]
            else:
                choices = [held - {gone} | {wanted} for gone in held]
            for choice in choices:
                after[choice] = max(after.get(choice, -1), found + (wanted in held))
        states = after
    return max(states.values())


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=9), st.integers(1, 4))
def test_the_best_possible_is_that(steps: list[tuple[int, int]], count: int) -> None:
    """Two layers of four experts, of which a step uses one each."""
    needed = np.zeros((len(steps), 2, 4), np.bool_)
    for step, chosen in enumerate(steps):
        for layer, e in enumerate(chosen):
            needed[step, layer, e] = True
    requests = [layer * 4 + e for chosen in steps for layer, e in enumerate(chosen)]
    best = hits(needed, count, Farthest(needed)) * len(requests)
    assert round(best) == most_hits(requests, count)
    for rule in (LeastRecent(), LeastExpected(rates(needed))):
        assert hits(needed, count, rule) * len(requests) <= best + 1e-9


def test_hits_by_hand() -> None:
    needed = np.zeros((4, 1, 3), np.bool_)
    for step, experts in enumerate([(0, 1), (0, 2), (0, 1), (0, 1)]):
        needed[step, 0, list(experts)] = True
    # 8 are needed: 0 three times more; 1 is there again in the last step only, whoever goes.
    assert hits(needed, 2, LeastRecent()) == 4 / 8
    assert hits(needed, 3, LeastRecent()) == 5 / 8
    assert hits(needed, 2, LeastExpected([[1.0, 0.9, 0.1]])) == 4 / 8


def seen(rows: int = 400) -> Seen:
    """Which experts are used follows from the hidden state; those before say half of it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 6, generator=generator)
    routed = (hidden @ torch.randn(6, 8, generator=generator)).topk(2).indices
    before = (routed + torch.randint(0, 2, routed.shape, generator=generator)) % 8
    return Seen(hidden, before, routed, 8)


def test_what_is_learned_foresees_more_than_tables() -> None:
    whole = seen()
    fitted, rest = whole.of(torch.arange(200)), whole.of(torch.arange(200, 400))
    needed = torch.zeros(200, 8).scatter(1, rest.routed, 1.0).bool()
    steps = Steps(torch.arange(200).unsqueeze(1), needed.unsqueeze(1).numpy())
    found: dict[Any, float] = {
        make: recall(make.fit(fitted).scores(rest.hidden, rest.before), steps, 0)["foreseen"]
        for make in (Popular, Correlated, Learned)
    }
    assert found[Learned] > found[Correlated] > found[Popular]
    assert found[Learned] > 0.8


def test_a_table_votes_for_the_most_frequent_successors() -> None:
    before = torch.tensor([[0], [0], [0], [0], [1]])
    routed = torch.tensor([[2], [2], [3], [3], [1]])
    predictor = Correlated.fit(Seen(torch.zeros(5, 1), before, routed, 4))
    scores = predictor.scores(torch.zeros(1, 1), torch.tensor([[0]]))
    assert set(scores.topk(2).indices[0].tolist()) == {2, 3}


def test_a_trace_is_replayed(tmp_path: Any) -> None:
    report = tmp_path / "replay.json"
    found = replay(ReplayOptions(str(tiny_flow().trace), [0.5], [2], 40, str(report)))
    (row,) = found["hits"]
    assert 0 < max(row["lru"], row["expected"]) <= row["best possible"] < 1
    assert {row["predictor"] for row in found["foreseen"]} == {"popularity", "correlation", "learned"}
    assert all(0 < row["half"] <= row["foreseen"] <= 1 for row in found["foreseen"])
    assert report.exists()
    with pytest.raises(TraceError, match="batches of 500 need more"):
        replay(ReplayOptions(str(tiny_flow().trace), [0.5], [500]))


@pytest.mark.parametrize("change", [{"shares": [0.0]}, {"shares": [1.5]}, {"batch_sizes": [0]}, {"steps": 0}], ids=str)
def test_options_that_cannot_be_used(change: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"--{next(iter(change))}"):
        ReplayOptions("trace", **change)
