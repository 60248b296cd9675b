"""Sequences: which documents they are made of, how they begin and end, and which decode together."""

import gzip
import tempfile
from itertools import chain, islice
from pathlib import Path

import pytest
from flows import one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import Bytes, Endless, jsonl

from lynx_learn.errors import CorpusError, OptionError
from lynx_learn.traces.corpus import LONGEST, read_sequences
from lynx_learn.traces.documents import Split, read_documents

SPLITS: tuple[Split, ...] = ("fit", "calibrate", "test")


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(min_size=1, max_size=80), min_size=1, max_size=12),
    length=st.integers(1, 9),
    ends=st.booleans(),
)
def test_sequences_are_the_joined_documents_cut(texts: list[str], length: int, ends: bool) -> None:
    end = [256] if ends else []
    joined = list(chain.from_iterable([*t.encode()[: LONGEST * length], *end] for t in texts if t.strip()))
    expected = [joined[i : i + length] for i in range(0, len(joined) - length + 1, length)]
    with tempfile.TemporaryDirectory() as folder:
        corpus = jsonl(Path(folder) / "name.jsonl", texts)
        stream = read_sequences(corpus, Bytes() if ends else Endless(), length)
        if not expected:
            with pytest.raises(CorpusError, match="less than one sequence"):
                list(stream)
        else:
            assert list(stream) == [(tokens, "name") for tokens in expected]


def test_a_long_document_does_not_dominate(tmp_path: Path) -> None:
    corpus = jsonl(tmp_path / "a.jsonl", ["a" * 100_000, "b" * 30])
    sequences = [tokens for tokens, _ in read_sequences(corpus, Bytes(), 10)]
    assert sum(set(tokens) == {ord("a")} for tokens in sequences) == LONGEST
    assert sum(tokens.count(ord("b")) for tokens in sequences) > 20


def test_sources_take_turns(tmp_path: Path) -> None:
    for name, count in (("a", 1), ("b", 4), ("c", 2)):
        jsonl(tmp_path / f"{name}.jsonl", [name * 7] * count)
    order = "".join(source for _, source in read_sequences(str(tmp_path), Bytes(), 8))
    assert order == "abcbcbb"
    # No sequence mixes two sources.
    assert all(set(tokens) == {ord(source), 256} for tokens, source in read_sequences(str(tmp_path), Bytes(), 8))


def test_the_standard_library_gives_code_and_prose_in_every_split() -> None:
    for split in SPLITS:
        sequences = list(islice(read_sequences("python-stdlib", Bytes(), 64, split), 6))
        assert [source for _, source in sequences] == ["code", "prose"] * 3
    again = list(islice(read_sequences("python-stdlib", Bytes(), 64, "test"), 6))
    assert again == sequences
    parts = [{d.text for d in islice(read_documents("python-stdlib", split), 20)} for split in SPLITS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60


def test_a_file_is_read_as_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abcdefgh"}\n' * 3 + "{broken\n")
    stream = read_sequences(str(tmp_path / "a.jsonl"), Bytes(), 9)
    assert [next(stream)[1] for _ in range(3)] == ["a"] * 3
    with pytest.raises(CorpusError, match="line 4") as error:
        next(stream)
    one_line(error)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.jsonl.gz", "blank.txt"])
def test_a_file_without_text_is_refused(name: str, tmp_path: Path) -> None:
    data = b" \n\n" if name == "blank.txt" else b""
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(CorpusError) as error:
        list(read_sequences(str(tmp_path / name), Bytes(), 4))
    assert name in one_line(error)
    assert "less than one sequence of 4 tokens" in one_line(error)


def test_half_a_character_is_no_reason_to_stop(tmp_path: Path) -> None:
    """JSON may hold a lone surrogate, which a tokenizer cannot encode."""
    (tmp_path / "a.jsonl").write_text('{"text": "abc \\ud800 def"}\n{"text": "whole"}\n')
    documents = [d.text for d in read_documents(str(tmp_path / "a.jsonl"))]
    assert documents[1] == "whole"
    assert documents[0].startswith("abc ")
    assert documents[0].endswith(" def")
    assert len(list(read_sequences(str(tmp_path / "a.jsonl"), Bytes(), 4))) > 1


def test_shorter_than_one_sequence(tmp_path: Path) -> None:
    corpus = jsonl(tmp_path / "a.jsonl", ["abc"])
    assert [tokens for tokens, _ in read_sequences(corpus, Bytes(), 4)] == [[97, 98, 99, 256]]
    with pytest.raises(CorpusError) as error:
        list(read_sequences(corpus, Bytes(), 5))
    assert "5 tokens" in one_line(error)


def test_every_sequence_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    """Llama and Gemma put one token before every text, GLM two; most put none, though they may have a BOS token."""
    corpus = jsonl(tmp_path / "a.jsonl", ["abcdefgh", "ijklmnop"])
    text = [*b"abcdefgh", 256, *b"ijklmnop", 256]
    begins = {(): Bytes(), (300,): Bytes((300,)), (300, 301): Bytes((300, 301))}
    for first, tokenizer in begins.items():
        found = [tokens for tokens, _ in read_sequences(corpus, tokenizer, 6)]
        room = 6 - len(first)
        assert found == [[*first, *text[i : i + room]] for i in range(0, len(text) - room + 1, room)]
        assert [tokens for tokens, _ in read_sequences(corpus, tokenizer, 6, bos="no")] == [
            text[i : i + 6] for i in (0, 6, 12)
        ]
    with_bos = Bytes()
    with_bos.bos_token_id = 299
    assert {tokens[0] for tokens, _ in read_sequences(corpus, with_bos, 6, bos="yes")} == {299}
    assert {tokens[0] for tokens, _ in read_sequences(corpus, Bytes((300,)), 6, bos="yes")} == {300}
    with pytest.raises(OptionError, match="--bos yes is not usable"):
        next(read_sequences(corpus, Bytes(), 6, bos="yes"))
    with pytest.raises(OptionError, match="--length 2 is not usable"):
        next(read_sequences(corpus, Bytes((300, 301)), 2))


def test_sources_shorter_than_a_sequence_are_joined(tmp_path: Path) -> None:
    for name in "abc":
        jsonl(tmp_path / f"{name}.jsonl", [name * 4])
    jsonl(tmp_path / "d.jsonl", ["d" * 9])
    found = [
        (bytes(tokens[:4] + tokens[5:]).decode(), source)
        for tokens, source in read_sequences(str(tmp_path), Bytes(), 9)
    ]
    assert [(tokens, source) for tokens, source in found] == [("d" * 8, "d"), ("aaaabbbb", tmp_path.name)]


def test_text_that_a_tokenizer_does_not_know_is_refused(tmp_path: Path) -> None:
    class Words(Bytes):
        unk_token_id = 7

        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [7 if word.isdigit() else 8 for word in text.split()]}

    corpus = jsonl(tmp_path / "a.jsonl", ["one 2 3 4 five 6"] * 3)
    with pytest.raises(CorpusError, match="source 'a' is unknown words") as error:
        list(read_sequences(corpus, Words(), 5))
    one_line(error)


def test_too_little_text_says_how_much_there_is(tmp_path: Path) -> None:
    corpus = jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(30)])
    own = len(list(read_documents(corpus, "test")))
    with pytest.raises(CorpusError, match=rf"found: 30 documents with text, {own} of them in this split"):
        list(read_sequences(corpus, Bytes(), 999, "test"))
