"""Which calls of a model are decode steps, and which of their rows run."""

from typing import Any

import pytest
import torch
from tiny import EOS, HIDDEN, PAD, tiny_model, words
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from lynx_learn.moe.calls import (
    DRAFTS,
    NO_CACHE,
    PADDED,
    PROMPTS,
    SEVERAL,
    DecodeCall,
    Generation,
    padding_token,
    read_call,
)


def filled_cache(model: PreTrainedModel, rows: int) -> DynamicCache:
    with torch.no_grad():
        return model(input_ids=words(rows, 4), use_cache=True).past_key_values


def step_of(arguments: dict[str, Any], generation: Generation | None = None, pad: int | None = PAD) -> DecodeCall:
    call = read_call(arguments, generation, pad)
    assert isinstance(call, DecodeCall)
    return call


def generation(*done: bool) -> Generation:
    """One that has drawn a token for each sequence."""
    made = Generation()
    made.drawn(torch.tensor(done))
    return made


def test_only_one_token_on_a_filled_cache_is_a_decode_step() -> None:
    cache = filled_cache(tiny_model("mixtral"), 3)
    active = step_of({"input_ids": words(3, 1), "past_key_values": cache}).active
    assert active is not None
    assert active.all()
    assert step_of({"inputs_embeds": torch.zeros(3, 1, HIDDEN), "past_key_values": cache}).active is None
    assert read_call({"input_ids": words(3, 2), "past_key_values": cache}, None, PAD) == SEVERAL
    for none in ({}, {"past_key_values": None}, {"past_key_values": DynamicCache()}, {"use_cache": False}):
        assert read_call({"input_ids": words(3, 1), **none}, None, PAD) is None


def test_a_fixed_cache_that_was_reset_holds_nothing() -> None:
    model = tiny_model("mixtral")
    cache = StaticCache(config=model.config, max_cache_len=8)
    arguments = {"input_ids": words(3, 1), "past_key_values": cache}
    assert read_call(arguments, None, PAD) is None
    with torch.no_grad():
        model(**arguments)
    step_of(arguments)
    cache.reset()
    assert read_call(arguments, None, PAD) is None


def test_ended_and_masked_rows_do_not_run() -> None:
    cache = filled_cache(tiny_model("mixtral"), 3)
    ids, mask = words(3, 1), torch.ones(3, 5, dtype=torch.long)
    ids[1] = PAD
    mask[2, -1] = 0
    arguments = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
    active = step_of(arguments).active
    assert active is not None
    assert active.tolist() == [True, False, False]
    active = step_of(arguments, generation(True, False, False)).active
    assert active is not None
    assert active.tolist() == [False, True, False], "what generate counts, not what the token looks like"


def test_rows_that_generate_keeps_no_count_of_all_run() -> None:
    cache = filled_cache(tiny_model("mixtral"), 3)
    assert step_of({"input_ids": words(3, 1), "past_key_values": cache}, generation(True, False)).active is None


def test_within_generate_a_prompt_is_behind_once_a_token_is_drawn() -> None:
    arguments = {"input_ids": words(3, 1), "past_key_values": filled_cache(tiny_model("mixtral"), 3)}
    assert read_call(arguments, Generation(), PAD) is None, "the last chunk of a prompt"
    step_of(arguments, generation(False, False, False))


def test_a_sequence_that_has_ended_stays_so() -> None:
    made = generation(False, True, False)
    made.drawn(torch.tensor([True, False, False]))
    running = made.running_of(3)
    assert running is not None
    assert running.tolist() == [False, False, True]


def test_calls_that_go_by_say_why() -> None:
    cache = filled_cache(tiny_model("mixtral"), 3)
    drafts = generation(False, False, False)
    drafts.drafts = True
    for tokens in (1, 4):
        assert read_call({"input_ids": words(3, tokens), "past_key_values": cache}, drafts, PAD) == DRAFTS
    whole = {"input_ids": words(3, 9), "use_cache": False}
    assert read_call(whole, generation(False, False, False), PAD) == NO_CACHE
    assert read_call(whole, None, PAD) is None, "scoring"


def packed(lengths: list[int], longest: int, padding: int = 0) -> dict[str, Any]:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(starts[-1]) + padding
    return {
        "input_ids": words(1, tokens),
        "position_ids": torch.arange(tokens).unsqueeze(0),
        "cu_seq_lens_q": torch.cat([starts, starts[-1:].expand(padding)]),
        "max_length_q": longest,
        "write_index": [torch.arange(tokens)],
        "use_cache": False,
    }


def test_packed_requests_of_continuous_batching() -> None:
    step = step_of(packed([1, 1, 1], 1))
    assert step.active is not None
    assert step.prompts is not None
    assert step.active.tolist() == [True, True, True]
    assert step.prompts.tolist() == [True, False, False], "a prompt of one token"
    padded = step_of(packed([1, 1, 1], 1, padding=2)).active
    assert padded is not None
    assert padded.tolist() == [True, True, True, False, False]
    assert read_call(packed([1, 5, 1], 5), None, PAD) == PROMPTS
    assert read_call(packed([7], 7), None, PAD) == PROMPTS
    assert read_call(packed([1, 1, 1], 5, padding=2), None, PAD) == PADDED


@pytest.mark.parametrize(
    ("pad", "end", "known"), [(PAD, EOS, PAD), (PAD, PAD, None), (PAD, [EOS, PAD], None), (None, EOS, None)]
)
def test_a_padding_token_that_may_end_a_text_tells_nothing(pad: int | None, end: Any, known: int | None) -> None:
    model = tiny_model("mixtral")
    assert model.generation_config is not None
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = pad, end
    assert padding_token(model) == known


def test_no_value_is_waited_for() -> None:
    """On a device; there a fixed cache is taken for filled once it is laid out."""
    cache = StaticCache(config=tiny_model("mixtral").config, max_cache_len=8)
    mask: Tensor = torch.ones(3, 5, dtype=torch.long, device="meta")
    for layer in cache.layers:
        layer.is_initialized, layer.cumulative_length = True, torch.zeros((), device="meta")
    arguments = {"input_ids": words(3, 1).to("meta"), "attention_mask": mask, "past_key_values": cache}
    assert step_of(arguments).active is not None
