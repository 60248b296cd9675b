"""Sampling: shares as the temperature and top-p say, and a decode that continues as the model would."""

from typing import Any

import pytest
import torch
from tiny import EOS, tiny_model, words
from zoo import ZOO, build

from lynx_learn.errors import OptionError
from lynx_learn.traces.sampling import Sampling, continue_rows


def drawn(sampling: Sampling, logits: list[float], count: int = 20_000) -> list[float]:
    rows = torch.tensor(logits).expand(count, -1)
    tokens = sampling.draw(rows, torch.Generator().manual_seed(0))
    return (tokens.bincount(minlength=len(logits)) / count).tolist()


def test_tokens_are_drawn_by_their_shares() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert drawn(Sampling(), logits.tolist()) == pytest.approx([0.5, 0.3, 0.2], abs=0.015)
    squared = torch.tensor([0.25, 0.09, 0.04]) / 0.38
    assert drawn(Sampling(temperature=0.5), logits.tolist()) == pytest.approx(squared.tolist(), abs=0.015)


def test_top_p_draws_from_the_likeliest_that_hold_the_share() -> None:
    """The token that passes the share is still drawn, however small the share is."""
    logits = torch.tensor([0.2, 0.5, 0.3]).log().tolist()
    assert drawn(Sampling(top_p=0.6), logits) == pytest.approx([0, 0.625, 0.375], abs=0.015)
    assert drawn(Sampling(top_p=0.01), logits) == [0, 1, 0]


def test_temperature_0_is_greedy() -> None:
    assert drawn(Sampling(temperature=0.0), [1.0, 3.0, 2.0]) == [0, 1, 0]


@pytest.mark.parametrize(
    "values", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"temperature": float("inf")}]
)
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=f"--{next(iter(values))} "):
        Sampling(**values)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "minimax", "qwen3_next", "jamba"])
def test_a_greedy_continuation_is_that_of_generate(name: str) -> None:
    """Also where the first layer keeps no keys from which a position could be told."""
    model: Any = build(ZOO[name])
    prompts = words(3, 6)
    mine = continue_rows(model, prompts, 14, Sampling(temperature=0.0), seed=0)
    wanted = model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=8, eos_token_id=127
    )
    until = wanted.shape[1]
    assert torch.equal(mine[:, :6], prompts)
    assert torch.equal(mine[:, :until][wanted != 0], wanted[wanted != 0])  # 0 pads what has met the end


def test_it_goes_on_after_an_end_and_equal_seeds_draw_equal_text() -> None:
    model, prompts = tiny_model("qwen3_moe"), words(64, 4)
    rows = continue_rows(model, prompts, 40, Sampling(temperature=2.0), seed=1)
    ended = (rows[:, 4:-1] == EOS).any(1)
    assert ended.any()
    assert rows.shape == (64, 40)
    assert torch.equal(rows, continue_rows(model, prompts, 40, Sampling(temperature=2.0), seed=1))
    assert not torch.equal(rows, continue_rows(model, prompts, 40, Sampling(temperature=2.0), seed=2))
