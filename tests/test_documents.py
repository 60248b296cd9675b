"""Documents: what is read of files, folders and data sets, in which split; and what is said when the text is no good."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import get_args

import pytest
from flows import one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import jsonl

from lynx_learn.errors import CorpusError
from lynx_learn.traces.documents import CHAPTER, MOST_SOURCES, Document, Split, in_split, read_documents

SPLITS: tuple[Split, ...] = ("fit", "calibrate", "test")
TEXTS = st.lists(st.text(max_size=60), max_size=30)


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


@pytest.mark.parametrize("name", ["no.jsonl", "no.txt", "no.jsonl.gz", "./no", "/no/where", "~/no-such-folder"])
def test_a_missing_path_is_named(name: str) -> None:
    with pytest.raises(CorpusError, match="does not exist") as error:
        list(read_documents(name))
    assert name in one_line(error)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(CorpusError) as error:
        list(read_documents(str(tmp_path)))
    assert str(tmp_path) in one_line(error)
    assert ".jsonl" in one_line(error)


LINES = {
    "no text": ('{"content": "x", "id": 3}', "content, id"),
    "nothing": ("{}", "no key"),
    "text is a number": ('{"text": 3}', '"text" is a number'),
    "text is a list": ('{"text": ["a"]}', '"text" is a list'),
    "null": ("null", "null"),
    "a list": ('[{"text": "x"}]', "a list"),
    "cut": ('{"text": "x', "no JSON"),
    "a bare word": ("hello", "no JSON"),
    "too deep": ("[" * 200_000, "no JSON"),
}


@pytest.mark.parametrize(("line", "found"), LINES.values(), ids=LINES.keys())
def test_a_line_without_text_is_named(line: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CorpusError) as error:
        list(read_documents(str(tmp_path / "a.jsonl")))
    assert "a.jsonl, line 2" in one_line(error)
    assert f"(found: {found}): write one" in one_line(error)


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
        "wrong ending": ("a.pdf", b"text\n"),
        "no table": ("a.parquet", b"text\n"),
    }


@pytest.mark.parametrize("kind", _files_that_cannot_be_read().keys())
def test_a_file_that_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    name, data = _files_that_cannot_be_read()[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError) as error:
        list(read_documents(str(tmp_path / name)))
    assert name in one_line(error)


def test_a_data_set_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    pq.write_table(pa.table({"text": ["one", "two"], "id": [1, 2]}), tmp_path / "good" / "train.parquet")
    pq.write_table(pa.table({"content": ["one"], "id": [1]}), tmp_path / "bad" / "train.parquet")
    good = str(tmp_path / "good")
    assert list(read_documents(good)) == [Document("one", "good"), Document("two", "good")]
    assert list(read_documents(f"{good}/train.parquet")) == [Document("one", "train"), Document("two", "train")]
    with pytest.raises(CorpusError, match="no text column: its columns are content, id") as error:
        list(read_documents(str(tmp_path / "bad")))
    one_line(error)


def test_a_name_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    program = "import sys\nfrom lynx_learn.traces.documents import *\ntry:\n    list(read_documents(sys.argv[1]))\nexcept CorpusError as e:\n    print(e)"
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


def test_lines_that_look_blank_part_paragraphs(tmp_path: Path) -> None:
    """WikiText's empty lines hold a space; editors leave tabs and carriage returns."""
    paragraphs = [f"paragraph {i} " + "x" * 300 for i in range(400)]
    expected = None
    for name, blank in (("clean", "\n\n"), ("space", "\n \n"), ("tab", "\n\t \n"), ("windows", "\r\n\r\n")):
        (tmp_path / f"{name}.txt").write_bytes(blank.join(paragraphs).encode())
        found = [[d.text for d in read_documents(str(tmp_path / f"{name}.txt"), split)] for split in SPLITS]
        assert all(found)
        expected = expected or found
        assert found == expected


def test_text_without_blank_lines_has_documents_in_every_split(tmp_path: Path) -> None:
    lines = "\n".join(f"line {i} of a text that has one document on each line and no blank one" for i in range(1500))
    one_line = "word " * 30_000
    for name, text in (("lines", lines), ("one", one_line)):
        (tmp_path / f"{name}.txt").write_text(text)
        documents = [d.text for d in read_documents(str(tmp_path / f"{name}.txt"))]
        assert all(len(d) <= 2 * CHAPTER for d in documents)
        assert "".join("".join(documents).split()) == "".join(text.split())
    assert all(list(read_documents(str(tmp_path / "lines.txt"), split)) for split in SPLITS)


def test_many_files_of_a_folder_are_one_source(tmp_path: Path) -> None:
    (tmp_path / "reviews").mkdir()
    (tmp_path / ".hidden").mkdir()
    texts = {f"review {i}" for i in range(MOST_SOURCES + 1)}
    for i, text in enumerate(texts):
        (tmp_path / "reviews" / f"r{i}.TXT").write_text(text)
    jsonl(tmp_path / "other.jsonl", ["other"])
    (tmp_path / ".hidden" / "a.txt").write_bytes(b"\xff")
    found = list(read_documents(str(tmp_path)))
    assert {(d.text, d.source) for d in found} == {("other", "other"), *((text, "reviews") for text in texts)}
    assert len(found) == MOST_SOURCES + 2


def test_files_of_many_folders_are_few_sources(tmp_path: Path) -> None:
    """Of a folder for each of many authors, or of two languages with a folder for each author."""
    texts = [f"text {i}" for i in range(3 * MOST_SOURCES)]
    for name, place in (("flat", "{}"), ("deep", "en/{}"), ("one", "only/{}/more")):
        for i, text in enumerate(texts):
            folder = tmp_path / name / (place.format(i) if i else place.format(i).replace("en/", "de/"))
            folder.mkdir(parents=True)
            (folder / "text.txt").write_text(text)
    for name, sources in (("flat", {"flat"}), ("deep", {"de", "en"}), ("one", {"only"})):
        found = list(read_documents(str(tmp_path / name)))
        assert sorted(d.text for d in found) == sorted(texts)
        assert {d.source for d in found} == sources


def test_a_table_is_read_by_its_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": "one", "id": 1}, {"text": None, "id": 2}, {"text": "two, three", "id": 3}]
    (tmp_path / "a.csv").write_text('text,id\none,1\n,2\n"two, three",3\n')
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.NDJSON").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a.csv", "a.json", "a.NDJSON"):
        found = list(read_documents(str(tmp_path / name)))
        assert found == [Document("one", "a"), Document("two, three", "a")]
    (tmp_path / "b.csv").write_text("content\none\n")
    with pytest.raises(CorpusError, match="no text column: its columns are content") as error:
        list(read_documents(str(tmp_path / "b.csv")))
    one_line(error)


def test_rows_without_text_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = jsonl(tmp_path / "a.jsonl", ["one", None, "three", None])
    for _ in range(2):  # said once, however often the text is read
        assert [d.text for d in read_documents(corpus)] == ["one", "three"]
    assert capsys.readouterr().err == f"{corpus}: 2 of 4 rows read have no text (null) and were skipped\n"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "one"}\n'.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\ufefftwo".encode()))
    assert [d.text for d in read_documents(str(tmp_path))] == ["one", "two"]


def test_what_was_found_instead_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a\\nb\\u001b[2J": null}\n')
    with pytest.raises(CorpusError, match=r"\(found: a\\nb\\x1b\[2J\)"):
        list(read_documents(str(tmp_path)))
    (tmp_path / "a.jsonl").rename(tmp_path / "a.pdf")
    with pytest.raises(CorpusError, match=r"found: 1 \.pdf\): put text there") as error:
        list(read_documents(str(tmp_path)))
    one_line(error)


def save_tables(folder: Path) -> str:
    """A data set of two configurations; `small` has a row without text and the splits train and dev."""
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    for place, texts in (("a/train", ["one", None]), ("a/dev", ["other"]), ("b/train", ["large"])):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), folder / f"{place}.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - {split: train, path: a/train*}\n"
        "  - {split: dev, path: a/dev*}\n- config_name: large\n  data_files: b/*\n---\n"
    )
    return str(folder)


def test_a_data_set_of_several_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = save_tables(tmp_path / "several")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for more, texts in ((":small", ["one"]), (":small:dev", ["other"]), (":large:train", ["large"])):
        assert [(d.text, d.source) for d in read_documents(name + more)] == [(text, f"several{more}") for text in texts]
    refused = {
        "": rf"several configurations \(it has large, small\): write --corpus {name}:large|\(it has small, large\)",
        ":medium": r"no configuration 'medium' \(it has ",
        ":small:test": rf"no split 'test' \(it has (train, dev|dev, train)\): write --corpus {name}:small:",
    }
    for more, reason in refused.items():
        with pytest.raises(CorpusError, match=reason) as error:
            list(read_documents(name + more))
        one_line(error)
