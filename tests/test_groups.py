"""Groups: no two share a document, documents come from the whole corpus by hash, sources by their shares."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from flows import one_line
from hypothesis import given
from hypothesis import strategies as st
from texts import Bytes, jsonl

from lynx_learn.errors import CorpusError, OptionError
from lynx_learn.traces.corpus import LONGEST
from lynx_learn.traces.groups import Batches, Unit, decode_groups, group_units, read_units, used_rows


def written(folder: Path, **counts: int) -> str:
    """A file per source; document i of source a is "a", i in three digits, and dots to 30 characters."""
    for name, count in counts.items():
        jsonl(folder / f"{name}.jsonl", [f"{name}{i:03d}".ljust(30, ".") for i in range(count)])
    return str(folder)


def documents(rows: Any) -> list[str]:
    """Which documents the rows that begin one are of."""
    return [bytes(row[:4]).decode() for row in rows.tolist()]


def test_a_group_holds_one_sequence_of_a_document_drawn_from_the_whole_file(tmp_path: Path) -> None:
    corpus = written(tmp_path, a=300, b=300)
    made = decode_groups(corpus, Bytes(), "all", 4, 8, 10, seed=0)
    found = [name for rows, _ in made for name in documents(rows)]
    assert len(made) == 10
    assert len(set(found)) == len(found) == 40
    places = sorted(int(name[1:]) for name in found)
    assert places[0] < 60
    assert places[-1] > 240  # not the head of the files
    assert [documents(rows) for rows, _ in decode_groups(corpus, Bytes(), "all", 4, 8, 10, seed=0)] == [
        documents(rows) for rows, _ in made
    ]
    other = [name for rows, _ in decode_groups(corpus, Bytes(), "all", 4, 8, 10, seed=1) for name in documents(rows)]
    assert len(set(other) & set(found)) < 10  # other documents, not another order of these


def test_the_order_of_a_file_does_not_matter(tmp_path: Path) -> None:
    texts = [f"{i:03d}".ljust(20, "x") for i in range(50)]
    groups = []
    for folder, order in (("one", texts), ("two", texts[::-1])):
        (tmp_path / folder).mkdir()
        corpus = jsonl(tmp_path / folder / "a.jsonl", order)
        groups.append([rows.tolist() for rows, _ in decode_groups(corpus, Bytes(), "all", 5, 8, 4, seed=0)])
    assert groups[0] == groups[1]


def test_sources_take_equal_turns_or_have_stated_shares(tmp_path: Path) -> None:
    corpus = written(tmp_path, a=100, b=100, c=100)
    equal = decode_groups(corpus, Bytes(), "all", 6, 8, 5, seed=0)
    assert all(Counter(names) == {"a": 2, "b": 2, "c": 2} for _, names in equal)
    stated = decode_groups(corpus, Bytes(), "all", 10, 8, 5, seed=0, mix={"a": 0.7, "c": 0.3})
    assert all(Counter(names) == {"a": 7, "c": 3} for _, names in stated)
    with pytest.raises(OptionError, match=r"source d is not in corpus .*: expected some of a, b, c") as error:
        decode_groups(corpus, Bytes(), "all", 2, 8, 5, seed=0, mix={"d": 1.0})
    one_line(error)
    with pytest.raises(OptionError, match="--mix"):
        decode_groups(corpus, Bytes(), "all", 2, 8, 5, seed=0, mix={"a": 0.0, "b": 1.0})


def test_a_mix_is_kept_where_a_source_ends_and_equal_turns_go_on(tmp_path: Path) -> None:
    corpus = written(tmp_path, a=4, b=100)
    units = read_units(corpus, Bytes(), ["all"], 30, 40, 0, mix={"a": 0.5, "b": 0.5})
    assert Counter(unit.source for unit in units) == {"a": 4, "b": 4}
    units = read_units(corpus, Bytes(), ["all"], 30, 40, 0)
    assert Counter(unit.source for unit in units) == {"a": 4, "b": 36}


def test_too_few_documents_give_several_sequences_in_one_group_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = written(tmp_path, a=12)
    made = decode_groups(corpus, Bytes(), "all", 4, 6, 6, seed=0)
    assert len(made) == 6
    owner: dict[int, set[int]] = {}
    text = {bytes(f"a{i:03d}".ljust(30, "."), "ascii"): i for i in range(12)}
    for number, (rows, _) in enumerate(made):
        for row in rows.tolist():
            for whole, i in text.items():
                if bytes(row[:4]) in whole and row[0] == ord("a"):
                    owner.setdefault(i, set()).add(number)
    assert len(owner) == 12
    assert all(len(numbers) == 1 for numbers in owner.values())
    assert "a: up to 2 of one document" in capsys.readouterr().out
    assert decode_groups(corpus, Bytes(), "all", 4, 6, 3, seed=0)
    assert "of one document" not in capsys.readouterr().out


def test_sources_shorter_than_a_sequence_are_joined_beside_others(tmp_path: Path) -> None:
    """As the traces have it; alone they would be left out without a word."""
    (tmp_path / "text").mkdir()
    for name in ("a", "b", "c"):
        jsonl(tmp_path / "text" / f"{name}.jsonl", [name * 5])
    jsonl(tmp_path / "text" / "long.jsonl", [f"{i:03d}".ljust(30, ".") for i in range(20)])
    units = read_units(str(tmp_path / "text"), Bytes(), ["all"], 8, 6, seed=0)
    assert {unit.source for unit in units} == {"long", "text"}
    assert {letter for unit in units if unit.source == "text" for letter in unit.rows[0]} <= {*b"abc", 256}
    with pytest.raises(CorpusError, match="holds") as error:  # a share of what is too short for it
        decode_groups(str(tmp_path / "text"), Bytes(), "all", 2, 8, 5, seed=0, mix={"a": 1.0})
    one_line(error)


def test_short_documents_are_joined_and_long_ones_give_few_sequences(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [f"{i:02d}" for i in range(20)])
    jsonl(tmp_path / "b.jsonl", ["b" * 500])
    units = read_units(str(tmp_path), Bytes(), ["all"], 8, 100, 0)
    joined = [unit for unit in units if unit.source == "a"]
    assert [len(unit.rows) for unit in joined] == [1] * 6  # three of them to a sequence
    assert [len(unit.rows) for unit in units if unit.source == "b"] == [LONGEST]
    texts = [bytes(unit.rows[0][at : at + 2]) for unit in joined for at in (0, 3)]
    assert len(set(texts)) == 12


def test_groups_of_a_single_source_take_turns(tmp_path: Path) -> None:
    corpus = written(tmp_path, a=40, b=12)
    made = decode_groups(corpus, Bytes(), "all", 4, 30, 5, seed=0, batches="single")
    assert [names for _, names in made] == [[name] * 4 for name in "ababa"]
    with pytest.raises(CorpusError, match="40 groups of 4 from one source each without a common document") as error:
        decode_groups(corpus, Bytes(), "all", 4, 30, 50, 0, fewest=40, batches="single")
    one_line(error)


def test_too_little_text_is_refused_with_what_there_is(tmp_path: Path) -> None:
    corpus = written(tmp_path, a=7)
    with pytest.raises(CorpusError, match="holds 7 sequences of 30 tokens from 7 documents, 2 groups of 4") as error:
        decode_groups(corpus, Bytes(), "all", 4, 30, 10, 0)
    one_line(error)
    assert len(decode_groups(corpus, Bytes(), "all", 4, 30, 10, 0, fewest=1)) == 1


def test_every_sequence_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    corpus = written(tmp_path, a=9)
    rows, _ = decode_groups(corpus, Bytes((300, 301)), "all", 4, 8, 1, 0, fewest=1)[0]
    assert all(row[:3] == [300, 301, ord("a")] for row in rows.tolist())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=30), st.integers(1, 6), st.integers(1, 5))
def test_no_document_is_in_two_groups_whatever_they_hold(lengths: list[int], size: int, most: int) -> None:
    units = [Unit([[number, row] for row in range(count)], "a") for number, count in enumerate(lengths)]
    groups = group_units(units, size, most)
    assert len(groups) <= most
    assert all(rows.shape == (size, 2) for rows, _ in groups)
    seen = [set(rows[:, 0].tolist()) for rows, _ in groups]
    assert sum(map(len, seen)) == len(set().union(*seen))
    rows = [tuple(row) for tokens, _ in groups for row in tokens.tolist()]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("batches", ["mixed", "single"])
def test_used_rows_are_those_that_groups_hold(batches: Batches) -> None:
    units = [Unit([[u, r] for r in range(1 + u % 3)], "ab"[u % 2]) for u in range(20)]
    cells = [(4, 2), (2, 5)]
    held = {
        tuple(row)
        for size, most in cells
        for rows, _ in group_units(units, size, most, batches)
        for row in rows.tolist()
    }
    assert set(used_rows(units, cells, batches)) == held
    assert len(held) < sum(len(unit.rows) for unit in units)
