"""Times of a layer's decision: by a clock that ticks as told, and what is put back."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph_cases import EXPERTS, HIDDEN, LAYERS, MLP, TOP_K, runner_of, selector_of

from lynx_learn.graph import times
from lynx_learn.graph.times import time_layers

ROUNDS = 20
NAMES = ["eager", "onnxruntime", "bound", "runner"]


def uncompiled(*words: object, **names: object) -> None:
    raise RuntimeError("no compiler\nis here")


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call n takes n microseconds; each is timed by two looks at the clock."""
    looks = itertools.count()
    elapsed = itertools.accumulate((look + 1) / 2 * 1e-6 * (look % 2) for look in looks)
    monkeypatch.setattr(times, "time", SimpleNamespace(perf_counter=lambda: next(elapsed)))
    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(times, "WARM_UP", 3)


@pytest.mark.usefixtures("ticking")
def test_the_spread_is_of_the_rounds_after_warming_up_in_turns() -> None:
    """Four are timed in a round, and who is first changes; so each is the n-th call of every fourth round."""
    found = time_layers(selector_of(MLP), runner_of(MLP), tokens=16, rounds=ROUNDS)["microseconds"]
    for place, name in enumerate(NAMES):
        own = [4 * turn + (place - turn) % 4 + 1 for turn in range(3, 3 + ROUNDS)]
        own.sort()
        assert found[name]["median"] == pytest.approx((own[9] + own[10]) / 2)
        assert own[1] <= found[name]["low"] <= own[2]
        assert own[-3] <= found[name]["high"] <= own[-2]


@pytest.mark.usefixtures("ticking")
def test_what_cannot_be_compiled_is_said_in_one_line() -> None:
    found = time_layers(selector_of(MLP), runner_of(MLP), tokens=2, rounds=2)
    assert found["microseconds"]["compiled"] is None
    assert found["microseconds"]["reason"] == "no compiler"
    assert {key: found[key] for key in ("tokens", "experts", "top_k", "hidden", "scorer", "layers", "rounds")} == {
        **{"tokens": 2, "experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN},
        **{"scorer": "mlp", "layers": LAYERS, "rounds": 2},
    }
    assert found["machine"]["threads"] == 1


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("fails", [False, True])
def test_threads_are_as_they_were(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    decide = times.decide

    def watched(*words: Any) -> Any:
        seen.append(torch.get_num_threads())
        if fails:
            raise KeyboardInterrupt
        return decide(*words)

    monkeypatch.setattr(times, "decide", watched)
    torch.set_num_threads(2)
    try:
        if fails:
            with pytest.raises(KeyboardInterrupt):
                time_layers(selector_of(MLP), runner_of(MLP), tokens=2, rounds=2)
        else:
            time_layers(selector_of(MLP), runner_of(MLP), tokens=2, rounds=2)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
