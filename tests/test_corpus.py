"""Corpus: which documents, in which split, cut how; and what is said when the text is no good."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from itertools import chain, islice
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynx_learn.errors import CorpusError
from lynx_learn.traces.corpus import (
    LONGEST,
    Document,
    Split,
    _read_dataset,
    decode_groups,
    in_split,
    read_documents,
    read_sequences,
)

SPLITS: tuple[Split, ...] = ("fit", "calibrate", "test")
TEXTS = st.lists(st.text(max_size=60), max_size=30)


class Bytes:
    """A tokenizer of bytes; 256 ends a text."""

    eos_token_id: int | None = 256

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(text.encode())}


class Endless(Bytes):
    eos_token_id = None


def jsonl(path: Path, texts: list[str]) -> str:
    data = "".join(json.dumps({"text": t, "more": 1}) + "\n" for t in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def one_line(error: pytest.ExceptionInfo[CorpusError]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


@settings(deadline=None, max_examples=40)
@given(texts=TEXTS)
def test_splits_are_disjoint_and_together_everything(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = jsonl(Path(folder) / "a.jsonl", texts)
        parts = {split: [d.text for d in read_documents(corpus, split)] for split in SPLITS}
        everything = [d.text for d in read_documents(corpus)]
    assert everything == [t for t in texts if t.strip()]
    assert sorted(chain.from_iterable(parts.values())) == sorted(everything)
    for a, b in (("fit", "calibrate"), ("fit", "test"), ("calibrate", "test")):
        assert not set(parts[a]) & set(parts[b])  # type: ignore[index]


@settings(deadline=None, max_examples=25)
@given(texts=TEXTS, seed=st.randoms())
def test_the_split_follows_from_the_text_alone(texts: list[str], seed: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        other = list(texts)
        seed.shuffle(other)  # type: ignore[attr-defined]
        first, second = jsonl(Path(folder) / "a.jsonl", texts), jsonl(Path(folder) / "zz.jsonl.gz", other)
        for split in SPLITS:
            here, there = ({d.text for d in read_documents(c, split)} for c in (first, second))
            assert here == there


def test_split_shares_and_fixed_values() -> None:
    counts = {split: sum(in_split(f"document {i}", split) for i in range(4000)) / 4000 for split in SPLITS}
    assert abs(counts["fit"] - 0.8) < 0.03
    assert abs(counts["calibrate"] - 0.1) < 0.02
    # Of two machines or versions, the same text has to fall into the same part: the rule itself, written again.
    for text in ("a", "ü", "def f(): ...", "x" * 5000):
        share = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16
        expected = "fit" if share < 0.8 else "calibrate" if share < 0.9 else "test"
        assert [s for s in SPLITS if in_split(text, s)] == [expected]
    assert set(get_args(Split)) == {*SPLITS, "all"}


def test_every_file_kind_and_a_folder_of_them(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    jsonl(tmp_path / "one.jsonl", ["eins", " \n", "zwei"])
    jsonl(tmp_path / "deep" / "two.part.jsonl.gz", ["drei"])
    (tmp_path / "deep" / "three.txt").write_text("vier ü\nfünf", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not text for us")
    (tmp_path / "folder.txt").mkdir()
    expected = {
        "one.jsonl": [Document("eins", "one"), Document("zwei", "one")],
        "deep/two.part.jsonl.gz": [Document("drei", "two")],
        "deep/three.txt": [Document("vier ü\nfünf", "three")],
    }
    for name, documents in expected.items():
        assert list(read_documents(str(tmp_path / name))) == documents
    in_order = [d for name in sorted(expected) for d in expected[name]]
    assert list(read_documents(str(tmp_path))) == in_order


def test_blank_lines_of_a_jsonl_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n   \n{"text": "b"}')
    assert [d.text for d in read_documents(str(tmp_path / "a.jsonl"))] == ["a", "b"]


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


@pytest.mark.parametrize("name", ["no.jsonl", "no.txt", "no.jsonl.gz", "./no", "/no/where", "~/no-such-folder"])
def test_a_missing_path_is_named(name: str) -> None:
    with pytest.raises(CorpusError, match="does not exist") as error:
        list(read_documents(name))
    assert name in one_line(error)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.jsonl.gz", "blank.txt"])
def test_a_file_without_text_is_refused(name: str, tmp_path: Path) -> None:
    data = b" \n\n" if name == "blank.txt" else b""
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(CorpusError) as error:
        list(read_sequences(str(tmp_path / name), Bytes(), 4))
    assert name in one_line(error)
    assert "less than one sequence of 4 tokens" in one_line(error)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(CorpusError) as error:
        list(read_documents(str(tmp_path)))
    assert str(tmp_path) in one_line(error)
    assert ".jsonl" in one_line(error)


LINES = {
    "no text": '{"content": "x"}',
    "text is a number": '{"text": 3}',
    "null": "null",
    "a list": '["text"]',
    "cut": '{"text": "x',
    "a bare word": "hello",
    "too deep": "[" * 200_000,
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_a_line_without_text_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CorpusError) as error:
        list(read_documents(str(tmp_path / "a.jsonl")))
    assert "a.jsonl, line 2" in one_line(error)


def _files_that_cannot_be_read() -> dict[str, tuple[str, bytes]]:
    packed = gzip.compress(json.dumps({"text": os.urandom(4000).hex()}).encode())
    return {
        "invalid utf-8, txt": ("a.txt", b"abc\xff\xfe"),
        "invalid utf-8, jsonl": ("a.jsonl", b'{"text": "\xff"}\n'),
        "invalid utf-8, gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "\xff"}\n')),
        "truncated gzip": ("a.jsonl.gz", packed[: len(packed) // 2]),
        "no gzip": ("a.jsonl.gz", b'{"text": "plain"}\n'),
        "damaged gzip": ("a.jsonl.gz", packed[:200] + bytes(b ^ 255 for b in packed[200:260]) + packed[260:]),
        "gzip with a wrong checksum": ("a.jsonl.gz", packed[:-8] + bytes(8)),
        "wrong ending": ("a.csv", b"text\n"),
    }


@pytest.mark.parametrize("kind", _files_that_cannot_be_read().keys())
def test_a_file_that_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    name, data = _files_that_cannot_be_read()[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError) as error:
        list(read_documents(str(tmp_path / name)))
    assert name in one_line(error)


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


def test_groups_that_decode_together_mix_the_sources(tmp_path: Path) -> None:
    for name in "abc":
        jsonl(tmp_path / f"{name}.jsonl", [name * 7] * 10)

    def groups(seed: int, most: int = 6) -> list[tuple[list[list[int]], list[str]]]:
        made = decode_groups(str(tmp_path), Bytes(), "all", 4, 8, most, seed)
        return [(rows.tolist(), names) for rows, names in made]

    made = groups(0)
    assert len(made) == 6
    assert all(len(rows) == len(names) == 4 for rows, names in made)
    assert all(set(row) == {ord(name), 256} for rows, names in made for row, name in zip(rows, names, strict=True))
    assert sorted(name for _, names in made for name in names) == sorted("abc" * 8)
    assert [names for _, names in made] != [list(("abc" * 8)[i : i + 4]) for i in range(0, 24, 4)]
    assert groups(0) == made != groups(1)
    assert len(groups(0, 100)) == 30 // 4


def test_groups_of_a_single_source_take_turns(tmp_path: Path) -> None:
    for name, count in (("a", 30), ("b", 9), ("c", 3)):
        jsonl(tmp_path / f"{name}.jsonl", [f"{name * 5}{i:02d}" for i in range(count)])

    def groups(seed: int, most: int) -> list[tuple[list[list[int]], list[str]]]:
        made = decode_groups(str(tmp_path), Bytes(), "all", 4, 8, most, seed, batches="single")
        return [(rows.tolist(), names) for rows, names in made]

    made = groups(0, 100)
    assert "".join(names[0] for _, names in made) == "ababaaaaa"
    assert all(len(rows) == len(names) == 4 and len(set(names)) == 1 for rows, names in made)
    assert all(set(row[:5]) == {ord(name)} for rows, names in made for row, name in zip(rows, names, strict=True))
    texts = [tuple(row) for rows, _ in made for row in rows]
    assert len(set(texts)) == len(texts) == 36
    assert made == groups(0, 100) != groups(1, 100)
    assert [row[5:7] for row in made[0][0]] != [[48, 48 + i] for i in range(4)]  # not in the order of the file
    assert [names[0] for _, names in groups(0, 5)] == list("ababa")
    with pytest.raises(CorpusError, match="40 groups of 4 from one source each are needed"):
        decode_groups(str(tmp_path), Bytes(), "all", 4, 8, 50, 0, fewest=40, batches="single")


def test_too_little_text_for_two_groups_is_refused(tmp_path: Path) -> None:
    corpus = jsonl(tmp_path / "a.jsonl", ["1234567"] * 7)
    with pytest.raises(CorpusError, match="holds 7 sequences of 8 tokens, 2 groups of 4 are needed") as error:
        decode_groups(corpus, Bytes(), "all", 4, 8, 10, 0)
    one_line(error)
    assert len(decode_groups(corpus, Bytes(), "all", 4, 8, 10, 0, fewest=1)) == 1


def test_a_data_set_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    pq.write_table(pa.table({"text": ["one", "two"], "id": [1, 2]}), tmp_path / "good" / "train.parquet")
    pq.write_table(pa.table({"content": ["one"], "id": [1]}), tmp_path / "bad" / "train.parquet")
    good = str(tmp_path / "good")
    assert list(_read_dataset(good)) == [Document("one", good), Document("two", good)]
    with pytest.raises(CorpusError, match="no text column: its columns are content, id") as error:
        list(_read_dataset(str(tmp_path / "bad")))
    one_line(error)


def test_a_name_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    program = "import sys\nfrom lynx_learn.traces.corpus import *\ntry:\n    list(read_documents(sys.argv[1]))\nexcept CorpusError as e:\n    print(e)"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, "nobody/no-such-data"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "'nobody/no-such-data' is neither a path nor a data set" in done.stdout


def test_without_the_datasets_library_a_wrong_name_is_still_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match="neither a path nor a data set") as error:
        list(read_documents("my-texts"))
    assert "datasets" in one_line(error)


def test_a_plain_text_is_cut_into_documents_and_loses_nothing(tmp_path: Path) -> None:
    text = "\n\n".join(f"paragraph {i} " + "x" * (i % 700) for i in range(1500))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    documents = [d.text for d in read_documents(str(tmp_path / "book.txt"))]
    assert "\n\n".join(documents) == text
    assert all(len(d) < 4000 for d in documents)
    parts = [list(read_documents(str(tmp_path / "book.txt"), split)) for split in ("fit", "calibrate", "test")]
    assert all(parts)
    assert sum(map(len, parts)) == len(documents)
