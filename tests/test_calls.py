"""Which calls of a model are decode steps, and which of their rows run."""

import torch
from tiny import (
    EOS,
    HIDDEN,
    PAD,
    tiny_model,
    words,
)
from transformers import DynamicCache, PreTrainedModel

from lynx_learn.moe.calls import read_call


def filled_cache(model: PreTrainedModel, rows: int) -> DynamicCache:
    with torch.no_grad():
        return model(input_ids=words(rows, 4), use_cache=True).past_key_values


def test_only_one_token_on_a_filled_cache_is_a_decode_step() -> None:
    model = tiny_model("mixtral")
    cache = filled_cache(model, 3)
    step = read_call(model, (), {"input_ids": words(3, 1), "past_key_values": cache})
    assert step is not None
    assert step.active is not None
    assert step.active.all()
    embedded = read_call(model, (), {"inputs_embeds": torch.zeros(3, 1, HIDDEN), "past_key_values": cache})
    assert embedded is not None
    assert read_call(model, (words(3, 1),), {"past_key_values": cache}) is not None, "ids given by position"
    assert read_call(model, (), {"input_ids": words(3, 2), "past_key_values": cache}) is None, "chunk of a prompt"
    assert read_call(model, (), {"input_ids": words(3, 1)}) is None, "no cache"
    assert read_call(model, (), {"input_ids": words(3, 1), "past_key_values": None}) is None
    assert read_call(model, (), {"input_ids": words(3, 1), "past_key_values": DynamicCache()}) is None, "empty cache"


def test_ended_and_masked_rows_do_not_run() -> None:
    model = tiny_model("mixtral")
    cache = filled_cache(model, 3)
    ids, mask = words(3, 1), torch.ones(3, 5, dtype=torch.long)
    ids[1] = PAD
    mask[2, -1] = 0
    step = read_call(model, (), {"input_ids": ids, "attention_mask": mask, "past_key_values": cache})
    assert step is not None
    assert step.active is not None
    assert step.active.tolist() == [True, False, False]


def test_without_a_padding_token_the_first_end_token_stands_for_it() -> None:
    """As in `generate`, which then feeds ended sequences with it."""
    model = tiny_model("mixtral")
    assert model.generation_config is not None
    cache = filled_cache(model, 3)
    ids = words(3, 1)
    ids[1] = EOS
    for end in (EOS, [EOS, 2]):
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = None, end
        step = read_call(model, (), {"input_ids": ids, "past_key_values": cache})
        assert step is not None
        assert step.active is not None
        assert step.active.tolist() == [True, False, True]
