"""The text that losses are measured on: what is read, where it ends, and what is refused."""

from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flows import LENGTH, PROMPT, one_line, tiny_flow

from lynx_learn.decode.served import ServedText, TextOptions
from lynx_learn.errors import OptionError
from lynx_learn.moe.loading import LoadedModel, load_model
from lynx_learn.selector.selector import LynxSelector

OPTIONS = TextOptions(length=LENGTH, prompt=PROMPT, temperature=0.7, top_p=0.9, seed=3)


@cache
def loaded() -> LoadedModel:
    return load_model(str(tiny_flow().model), "cpu", "float32")


def text(**changes: Any) -> ServedText:
    return replace(OPTIONS, corpus=str(tiny_flow().texts), **changes).served("test")


def groups(given: ServedText, size: int = 2, most: int = 3) -> list[tuple[torch.Tensor, list[str]]]:
    units = given.units(loaded(), [(size, most)])
    return [(tokens, list(names)) for tokens, names in given.groups(loaded(), units, size, most, most)]


def test_prompts_are_the_corpus_and_the_rest_is_what_the_model_writes() -> None:
    stored, written = groups(text(mode="teacher")), groups(text(mode="generate"))
    assert all(tokens.shape == (2, LENGTH) for tokens, _ in [*stored, *written])
    rows = {tuple(row[:PROMPT]) for tokens, _ in stored for row in tokens.tolist()}
    assert rows & {tuple(row[:PROMPT]) for tokens, _ in written for row in tokens.tolist()}
    assert not any(torch.equal(a[0], b[0]) for a in stored for b in written)


def test_equal_seeds_write_equal_text_and_other_ones_do_not() -> None:
    first, again, other = (groups(text(seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) and names == more for (a, names), (b, more) in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))


def test_a_skipping_model_writes_after_the_same_prompts() -> None:
    given, made = text(mode="skipping", temperature=0.0), groups(text(temperature=0.0))
    selector = LynxSelector.from_pretrained(tiny_flow().selector)
    nothing, much = (given.while_skipping(loaded(), made, selector.at_threshold(tau)) for tau in (0.0, 1e9))
    for (before, names), (same, _), (skipped, kept_names) in zip(made, nothing, much, strict=True):
        assert torch.equal(before, same)
        assert torch.equal(before[:, :PROMPT], skipped[:, :PROMPT])
        assert names == kept_names
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(made, much, strict=True))


@dataclass
class Ends:
    eos_token_id: Any


@pytest.mark.parametrize(
    ("own", "tokenizer", "expected"),
    [(Ends(5), 1, (5,)), (Ends([5, 6]), 1, (5, 6)), (Ends(None), 1, (1,)), (None, 1, (1,)), (None, None, ())],
)
def test_sequences_end_where_the_model_says_so(own: Any, tokenizer: Any, expected: tuple[int, ...]) -> None:
    """By its generation config, and where that says nothing by its tokenizer; text that is only read does not end."""
    given: Any = SimpleNamespace(model=SimpleNamespace(generation_config=own), tokenizer=Ends(tokenizer))
    assert text().ends(given) == expected
    assert text(mode="teacher").ends(given) == text(ignore_eos=True).ends(given) == ()


def test_a_certificate_names_the_text_it_is_for() -> None:
    own = {"corpus": str(tiny_flow().texts), "split": ["test"], "prompt": PROMPT, "length": LENGTH}
    where = {"dtype": "float32", "device": "cpu"}
    sampled = {"mode": "generate", "temperature": 0.7, "top_p": 0.9, "ignore_eos": False}
    assert text().describe(loaded()) == {**own, **sampled, **where}
    read = {"mode": "teacher", "temperature": None, "top_p": None, "ignore_eos": None}
    assert text(mode="teacher").describe(loaded()) == {**own, **read, **where}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": 0}, "--prompt 0 is not usable: expected 1 to --length - 2 (30)"),
        ({"prompt": LENGTH - 1}, "--prompt 31 "),
        ({"temperature": -1.0}, "--temperature -1 "),
        ({"top_p": 0.0}, "--top_p 0 "),
        ({"length": 129}, "--length 129 is not usable: the model has 128 positions"),
    ],
    ids=str,
)
def test_text_that_cannot_be_had_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError) as error:
        text(**change).check(loaded().model)
    assert one_line(error).startswith(reason)


def test_a_model_that_writes_nothing_can_only_be_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(loaded().model), "can_generate", lambda *words: False)
    with pytest.raises(OptionError, match="generates no text; take --mode teacher"):
        text().check(loaded().model)
    text(mode="teacher").check(loaded().model)
