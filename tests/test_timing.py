"""Decodes that are timed in turns."""

from collections.abc import Iterator

import pytest
import torch
from tiny import random_selector, tiny_model, words
from torch import nn

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.decode.timing import paired_ratio, take_turns
from lynx_learn.errors import OptionError
from lynx_learn.moe.decision import Decision, Routing
from lynx_learn.moe.families import MoeLayer
from lynx_learn.rules.keep_sets import XShare

ROWS, POSITIONS, PROMPT, WARM_UP = 4, 20, 8, 3


@pytest.fixture
def two_threads() -> Iterator[None]:
    """A number of threads that `take_turns` does not use itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Failing(XShare):
    """A rule that breaks down at its third decode step."""

    calls = 0

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        self.calls += layer.index == 0
        if self.calls == 3:
            raise RuntimeError("no more")
        return super().decide(layer, routing)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_both_decodes_are_timed_step_by_step(family: str) -> None:
    model = tiny_model(family)
    found = take_turns(model, {"off": None, "on": XShare(4)}, words(ROWS, POSITIONS), PROMPT, WARM_UP)
    off, on = found["off"], found["on"]
    assert len(off.ms) == len(on.ms) == POSITIONS - PROMPT - WARM_UP
    assert all(value > 0 for value in off.ms + on.ms)
    assert paired_ratio(off, on) == pytest.approx(1 / paired_ratio(on, off))
    assert off.stats is None
    assert on.stats is not None
    assert on.stats.steps == POSITIONS - PROMPT  # those of the warm-up skip too, and the untouched decode does not
    assert all(before > 4 for before in on.stats.experts_before)
    assert all(after <= 4 for after in on.stats.experts_after)
    assert torch.get_num_threads() == 2
    assert hooks(model) == 0


@pytest.mark.usefixtures("two_threads")
def test_a_failure_leaves_threads_and_model_as_they_were() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(RuntimeError, match="no more"):
        take_turns(model, {"off": None, "on": Failing(4)}, words(ROWS, POSITIONS), PROMPT, WARM_UP)
    assert torch.get_num_threads() == 2
    assert hooks(model) == 0
    skip_experts(model, XShare(4)).attach().detach()  # nothing is attached any more


def test_each_decode_sees_the_whole_text_one_token_at_a_time() -> None:
    """A prefill each, then each column for everyone, with the hooks of one policy at a time, taking turns."""
    model, tokens = tiny_model("qwen3_moe"), words(ROWS, POSITIONS)
    seen: list[tuple[torch.Tensor, bool]] = []
    resting = hooks(model)

    def note(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append((kwargs["input_ids"], hooks(model) > resting + 1))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    policies = {"off": None, "on": random_selector(model).at_threshold(1e9)}
    take_turns(model, policies, tokens, PROMPT, WARM_UP)
    handle.remove()
    assert [skips for _, skips in seen[:2]] == [False, False]
    assert all(torch.equal(ids, tokens[:, :PROMPT]) for ids, _ in seen[:2])
    steps = seen[2:]
    assert len(steps) == 2 * (POSITIONS - PROMPT)
    firsts = [skips for _, skips in steps[::2]]
    assert firsts == [position % 2 == 1 for position in range(PROMPT, POSITIONS)]
    for index, (ids, skips) in enumerate(steps):
        assert torch.equal(ids, tokens[:, PROMPT + index // 2 : PROMPT + index // 2 + 1])
        assert skips == (firsts[index // 2] if index % 2 == 0 else not firsts[index // 2])


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(OptionError, match="3 decode steps are too few"):
        take_turns(tiny_model("qwen3_moe"), {"off": None}, words(ROWS, PROMPT + WARM_UP), PROMPT, WARM_UP)
