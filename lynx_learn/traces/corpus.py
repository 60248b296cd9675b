"""Text sources: documents with a name for where they came from, split by content.

A document's split follows from the hash of its text alone, so the same corpus can be given to `collect`,
`calibrate` and `evaluate` and the three read disjoint documents, on any machine and in any order.
"""

import gzip
import hashlib
import json
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..errors import CorpusError

if TYPE_CHECKING:
    import torch

Split = Literal["fit", "calibrate", "test", "all"]
Batches = Literal["mixed", "single"]
BUILT_IN = "python-stdlib"
LONGEST = 8
# Characters after which a plain text is cut, at a blank line, into documents.
CHAPTER = 2000
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")
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
        corpus: `python-stdlib`, a `.jsonl`, `.jsonl.gz` (field `text`) or `.txt` file, a folder of such files, or
            the name of a data set known to the `datasets` library (its `train` split, column `text`).
        split: which documents to yield; `all` for no split.

    Raises:
        CorpusError: the source is missing or cannot be read; a source without any text yields nothing.
    """
    for stream in open_sources(corpus, split):
        yield from stream


def open_sources(corpus: str, split: Split = "all") -> list[Iterator[Document]]:
    """One stream of documents per source of the corpus (a file, or a kind of text); see `read_documents`."""
    if corpus == BUILT_IN:
        streams = [_read_interpreter_code(), _read_help_topics()]
    elif Path(corpus).exists():
        streams = [_read_file(file) for file in _files(Path(corpus))]
    elif corpus.endswith(SUFFIXES) or corpus.startswith((".", "/", "~")):
        raise CorpusError(f"corpus {corpus!r} does not exist: give a file ({', '.join(SUFFIXES)}), a folder or a name")
    else:
        streams = [_read_dataset(corpus)]
    return [_wanted(stream, split) for stream in streams]


def _wanted(documents: Iterator[Document], split: Split) -> Iterator[Document]:
    return (d for d in documents if d.text.strip() and in_split(d.text, split))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    if not files:
        raise CorpusError(f"corpus folder {path} holds no {', '.join(SUFFIXES)} file: put text there or name another")
    return files


class Encoder(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...


def read_sequences(
    corpus: str, tokenizer: Encoder, length: int, split: Split = "all"
) -> Iterator[tuple[list[int], str]]:
    """Stream of token sequences of one length, each from one source, sources taking turns.

    Documents of a source are joined by the end-of-text token and cut; of a long document at most its first
    `LONGEST` sequences are used, so that no single text dominates.

    Raises:
        CorpusError: the corpus holds less than one sequence in this split.
    """
    streams = [_pack(documents, tokenizer, length) for documents in open_sources(corpus, split)]
    found = False
    while streams:
        for stream in list(streams):
            sequence = next(stream, None)
            if sequence is None:
                streams.remove(stream)
                continue
            found = True
            yield sequence
    if not found:
        raise CorpusError(
            f"corpus {corpus!r} ({split} split) holds less than one sequence of {length} tokens: give more text or shorter sequences"
        )


def _pack(documents: Iterator[Document], tokenizer: Encoder, length: int) -> Iterator[tuple[list[int], str]]:
    pending: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        # Text has far fewer characters to a token than 16, so the rest of a long document need not be encoded.
        text = document.text[: LONGEST * length * 16]
        pending += [*tokenizer(text, add_special_tokens=False)["input_ids"][: LONGEST * length], *end]
        while len(pending) >= length:
            yield pending[:length], document.source
            pending = pending[length:]


def _read_file(path: Path) -> Iterator[Document]:
    source = path.name.split(".")[0]
    try:
        if path.name.endswith(".txt"):
            yield from (Document(part, source) for part in _chapters(path.read_text(encoding="utf-8")))
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            opener = gzip.open if path.name.endswith(".gz") else open
            with opener(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield Document(_text_of(line, path, number), source)
        else:
            raise CorpusError(f"corpus file {path} has an unknown ending: expected one of {', '.join(SUFFIXES)}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CorpusError(f"corpus file {path} cannot be read ({error}): expected UTF-8 text") from error


def _chapters(text: str) -> Iterator[str]:
    """Runs of paragraphs of a plain text, since a document falls into one split as a whole."""
    chapter: list[str] = []
    for paragraph in text.split("\n\n"):
        chapter.append(paragraph)
        if sum(map(len, chapter)) >= CHAPTER:
            yield "\n\n".join(chapter)
            chapter = []
    yield "\n\n".join(chapter)


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise CorpusError(f'corpus file {path}, line {number}: expected one JSON object with a string "text"')
    return text.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair, which tokenizers refuse


def _read_interpreter_code() -> Iterator[Document]:
    """Source files of the running interpreter, in an order that mixes its packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__", "ensurepip"}
    paths = (p for p in root.rglob("*.py") if skipped.isdisjoint(p.relative_to(root).parts))
    for path in sorted(paths, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest()):
        yield Document(path.read_text(encoding="utf-8", errors="ignore"), "code")


def _read_help_topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions ship Python without its documentation
        raise CorpusError(f"{sys.executable} has no help topics (pydoc_data): give another --corpus") from error
    for name in sorted(topics):
        yield Document(topics[name], "prose")


def _read_dataset(name: str) -> Iterator[Document]:
    try:
        from datasets import load_dataset  # heavy, and needed here alone

        rows = load_dataset(name, split="train", streaming=True)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise CorpusError(f"data set {name!r} has no text column: its columns are {', '.join(row)}")
            yield Document(row["text"], name)
    except CorpusError:
        raise
    except Exception as error:  # datasets raises many kinds, all of them meaning the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorpusError(f"corpus {name!r} is neither a path nor a data set that can be loaded ({reason})") from error


def decode_groups(
    corpus: str,
    tokenizer: Encoder,
    split: Split,
    size: int,
    length: int,
    most: int,
    seed: int,
    fewest: int = 2,
    batches: Batches = "mixed",
) -> list[tuple["torch.Tensor", list[str]]]:
    """Groups of `size` sequences that decode together: token rows and each row's source.

    Args:
        length: tokens of a sequence.
        most, fewest: groups wanted, and without which there is nothing to compute.
        batches: `mixed`: each group draws from all sources at random; `single`: each from one, sources taking turns.

    Raises:
        CorpusError: the split holds too few sequences.
    """
    import torch

    pools: dict[str, list[tuple[list[int], str]]] = {}
    full = 0
    for row in read_sequences(corpus, tokenizer, length, split):
        pool = pools.setdefault(row[1] if batches == "single" else "", [])
        pool.append(row)
        full += len(pool) % size == 0
        if full == most:
            break
    if full < fewest:
        count = sum(map(len, pools.values()))
        each = " from one source each" if batches == "single" else ""
        raise CorpusError(
            f"corpus {corpus!r} ({split} split) holds {count} sequences of {length} tokens, {fewest} groups of {size}{each} "
            "are needed: give more text, shorter sequences or smaller batches"
        )
    generator = torch.Generator().manual_seed(seed)
    by_pool = []
    for pool in pools.values():
        order = torch.randperm(len(pool), generator=generator).tolist()
        rows = [[pool[i] for i in order[end - size : end]] for end in range(size, len(pool) + 1, size)]
        by_pool.append([(torch.tensor([tokens for tokens, _ in group]), [name for _, name in group]) for group in rows])
    return [group for turn in zip_longest(*by_pool) for group in turn if group is not None]
