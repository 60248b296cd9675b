"""Text sources: documents with a name for where they came from, split by content.

A document's split follows from the hash of its text alone, so the same corpus can be given to `collect`,
`calibrate` and `evaluate` and the three read disjoint documents, on any machine and in any order.
"""

import gzip
import hashlib
import json
import os
import re
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..errors import CorpusError

Split = Literal["fit", "calibrate", "test", "all"]
BUILT_IN = "python-stdlib"
# Characters after which a plain text is cut, at a blank line, into documents; where no blank line comes for three
# times as many, at the end of a line, and where no line ends either, anywhere.
CHAPTER = 2000
BLANK = re.compile(r"\n[^\S\n]*\n")
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
# Endings that the `datasets` library reads, alone or in a folder, and its name for their kind.
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".ndjson": "json"}
# A folder with more files than this holds one document per file: together they are one source.
MOST_SOURCES = 16
# What is said of JSON that is no text.
KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
ONE_A_LINE = 'one {"text": "…"} a line'
# Share of the documents in each split, as cumulative upper bounds of the hash.
BOUNDS: dict[str, tuple[float, float]] = {"fit": (0.0, 0.8), "calibrate": (0.8, 0.9), "test": (0.9, 1.0)}


@dataclass(frozen=True)
class Document:
    """One text and the source it is reported under (a file's stem, or the data set's name)."""

    text: str
    source: str


def in_split(text: str, split: Split) -> bool:
    """Whether a document belongs to `split`; decided by the SHA-256 of its text."""
    if split == "all":
        return True
    low, high = BOUNDS[split]
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return low <= int.from_bytes(digest[:8], "big") / 2**64 < high


def read_documents(corpus: str, split: Split = "all") -> Iterator[Document]:
    """Stream the documents of a corpus, source by source.

    Args:
        corpus: `python-stdlib`, a `.jsonl` (field `text`) or `.txt` file, either also with `.gz`, a folder of such
            files, a table (column `text`) whose ending is one of TABLES, or a data set of the `datasets` library (column
            `text`), as `name`, `name:configuration` or `name:configuration:split`; without a split it is `train`.
        split: which documents to yield; `all` for no split.

    Raises:
        CorpusError: the source is missing or cannot be read; a source without any text yields nothing.
    """
    for stream in open_sources(corpus, split):
        yield from stream


def open_sources(corpus: str, split: Split = "all") -> list[Iterator[Document]]:
    """One stream of documents per source of the corpus (see `_read_files`, or a kind of text); see `read_documents`."""
    path = Path(corpus)
    if corpus == BUILT_IN:
        streams = [_read_interpreter_code(), _read_help_topics()]
    elif path.is_file():
        streams = [_read_dataset(corpus) if path.suffix.lower() in TABLES else _read_file(path)]
    elif path.is_dir() and (files := _files(path)):
        streams = [_read_source(place, own) for place, own in _sources(path, files).items()]
    elif path.is_dir() and not _endings(path).keys() & TABLES.keys():
        found = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in _endings(path).most_common(5))
        raise CorpusError(
            f"corpus folder {path} holds no {', '.join(SUFFIXES)} file (found: {found or 'nothing'}): put text there, "
            f"{ONE_A_LINE} in a .jsonl, or name another"
        )
    elif corpus.lower().endswith(SUFFIXES) or (corpus.startswith((".", "/", "~")) and not _named(corpus)[0].is_dir()):
        raise CorpusError(f"corpus {corpus!r} does not exist: give a file ({', '.join(SUFFIXES)}), a folder or a name")
    else:
        streams = [_read_dataset(corpus)]
    return [_wanted(stream, split) for stream in streams]


def _wanted(documents: Iterator[Document], split: Split) -> Iterator[Document]:
    return (d for d in documents if d.text.strip() and in_split(d.text, split))


def _files(folder: Path) -> list[Path]:
    """The text files below a folder, without hidden ones."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name.lower().endswith(SUFFIXES))
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _endings(folder: Path) -> Counter[str]:
    return Counter(p.suffix.lower() for p in folder.rglob("*") if p.is_file())


def _sources(folder: Path, files: list[Path]) -> dict[Path, list[Path]]:
    """Which files make a source: each one, or all below a folder; not more than MOST_SOURCES sources.

    A source of its own for each of thousands of files would be no source, and all of them are open at once.
    """
    crowded = {place for place, count in Counter(file.parent for file in files).items() if count > MOST_SOURCES}
    ways: tuple[Callable[[Path], Path], ...] = (
        lambda file: file.parent if file.parent in crowded else file,
        lambda file: folder / file.relative_to(folder).parts[0],
    )
    for place_of in ways:
        found: dict[Path, list[Path]] = {}
        for file in files:
            found.setdefault(place_of(file), []).append(file)
        if len(found) <= MOST_SOURCES:
            return found
    return {folder: files}


def _read_source(place: Path, files: list[Path]) -> Iterator[Document]:
    """A file, or all files below a folder under its name, in an order that mixes them: a run seldom reads to the end."""
    if files == [place]:
        yield from _read_file(place)
        return
    mixed = {hashlib.sha256(os.fsencode(file.relative_to(place))).digest(): file for file in files}
    for _, file in sorted(mixed.items()):
        yield from (Document(d.text, place.resolve().name) for d in _read_file(file))


def _read_file(path: Path) -> Iterator[Document]:
    source, name = path.name.split(".")[0], path.name.lower()
    opener = gzip.open if name.endswith(".gz") else open
    try:
        if name.endswith((".txt", ".txt.gz")):
            with opener(path, "rt", encoding="utf-8-sig") as file:
                yield from (Document(part, source) for part in _chapters(str(file.read())))
        elif name.endswith((".jsonl", ".jsonl.gz")):
            with opener(path, "rt", encoding="utf-8-sig") as lines:
                texts = (_text_of(str(line), path, at) for at, line in enumerate(lines, 1) if line.strip())
                yield from _with_text(texts, source, str(path))
        else:
            raise CorpusError(
                f"corpus file {path} has an unknown ending: expected one of {', '.join([*SUFFIXES, *TABLES])}; rename plain text "
                f"to .txt, or write {ONE_A_LINE} into a .jsonl"
            )
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"corpus file {path} is no UTF-8 text ({error}): convert it, as with iconv -f LATIN1 -t UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        kind = "a whole file packed with gzip" if opener is gzip.open else "a file that can be read"
        raise CorpusError(f"corpus file {path} cannot be read ({error}): expected {kind}") from error


def _chapters(text: str) -> Iterator[str]:
    """Runs of paragraphs of a plain text, since a document falls into one split as a whole.

    A paragraph ends at a line that is empty or holds white space only.
    """
    chapter: list[str] = []
    for piece in _paragraphs(text):
        chapter.append(piece)
        if sum(map(len, chapter)) >= CHAPTER:
            yield "\n\n".join(chapter)
            chapter = []
    yield "\n\n".join(chapter)


def _paragraphs(text: str) -> Iterator[str]:
    """What stands between blank lines; a paragraph that would be several chapters is cut where lines end."""
    for paragraph in BLANK.split(text):
        if len(paragraph) <= 3 * CHAPTER:
            yield paragraph
            continue
        lines: list[str] = []
        for line in paragraph.split("\n"):
            for start in range(0, max(1, len(line)), CHAPTER):
                lines.append(line[start : start + CHAPTER])
                if sum(map(len, lines)) >= CHAPTER:
                    yield "\n".join(lines)
                    lines = []
        if lines:
            yield "\n".join(lines)


def _with_text(texts: Iterator[str | None], source: str, where: str) -> Iterator[Document]:
    """Documents of the rows that have a text; how many had none is said once, when reading ends."""
    rows = nulls = 0
    try:
        for text in texts:
            rows += 1
            if text is None:
                nulls += 1
            else:
                yield Document(text, source)
    finally:
        if nulls:
            _say(f"{where}: {nulls:,} of {rows:,} rows read have no text (null) and were skipped")


@cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _text_of(line: str, path: Path, number: int) -> str | None:
    found = "no JSON"
    try:
        row = json.loads(line)
        found = KINDS.get(type(row), "a number")
        if isinstance(row, dict):
            found = ", ".join(row) or "no key"
            text = row["text"]
            if text is None or isinstance(text, str):
                # JSON may hold half a surrogate pair, which tokenizers refuse.
                return text and text.encode("utf-8", "replace").decode()
            found = f'"text" is {KINDS.get(type(text), "a number")}'
    except (ValueError, KeyError, RecursionError):
        pass
    raise CorpusError(
        f'corpus file {path}, line {number}: expected one JSON object with a string "text" (found: {found}): write {ONE_A_LINE}'
    )


def _read_interpreter_code() -> Iterator[Document]:
    for path in _interpreter_code():
        yield Document(path.read_text(encoding="utf-8", errors="ignore"), "code")


@cache
def _interpreter_code() -> list[Path]:
    """Source files of the running interpreter, in an order that mixes its packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__", "ensurepip"}
    paths: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - skipped  # not walked through, as installed packages take a while
        paths += (Path(folder, name) for name in files if name.endswith(".py"))
    return sorted(paths, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())


def _read_help_topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions ship Python without its documentation
        raise CorpusError(f"{sys.executable} has no help topics (pydoc_data): give another --corpus") from error
    for name in sorted(topics):
        yield Document(topics[name], "prose")


def _named(name: str) -> tuple[Path, str | None, str]:
    """Name, configuration and split of a data set."""
    if Path(name).exists():
        return Path(name), None, "train"
    path, configuration, split = [*name.split(":", 2), "", ""][:3]
    return Path(path), configuration or None, split or "train"


def _read_dataset(name: str) -> Iterator[Document]:
    folder, configuration, part = _named(name)
    path = str(folder)
    source = name.replace(path, folder.resolve().name, 1) if folder.exists() else name
    files: dict[str, Any] = {}
    if folder.is_file():
        path, files, source = TABLES[folder.suffix.lower()], {"data_files": path}, folder.stem
    try:
        from datasets import load_dataset  # heavy, and needed here only

        rows = load_dataset(path, configuration, split=part, streaming=True, **files)
        yield from _with_text((_column(row, name) for row in rows), source, f"data set {name!r}")
    except CorpusError:
        raise
    except Exception as error:  # datasets raises many kinds, all of them meaning the same to the user
        if files:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CorpusError(
                f"corpus file {folder} cannot be read ({reason}): expected rows with a text column"
            ) from error
        raise CorpusError(_why_not(name, path, configuration, part, error)) from error


def _column(row: dict[str, Any], name: str) -> str | None:
    text = row.get("text")
    if "text" in row and (text is None or isinstance(text, str)):
        return text
    raise CorpusError(
        f"data set {name!r} has no text column: its columns are {', '.join(row)}; write the one that holds text into a "
        '.jsonl file, one {"text": "…"} a line'
    )


def _why_not(name: str, path: str, configuration: str | None, part: str, error: Exception) -> str:
    """What there is, where the data set is there but not the configuration or the split."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    try:
        from datasets import get_dataset_config_names, get_dataset_split_names

        names = get_dataset_config_names(path)
        if configuration not in names and (configuration or len(names) > 1):
            asked = f"no configuration {configuration!r}" if configuration else "several configurations"
            return f"data set {path!r} has {asked} (it has {', '.join(names)}): write --corpus {path}:{names[0]}"
        parts = get_dataset_split_names(path, configuration)
        if part not in parts:
            own = configuration or (names[0] if names != ["default"] else "")
            return f"data set {path!r} has no split {part!r} (it has {', '.join(parts)}): write --corpus {path}:{own}:{parts[0]}"
    except Exception:  # not even that can be read: the first reason is the one to tell
        pass
    return f"corpus {name!r} is neither a path nor a data set that can be loaded ({reason})"
