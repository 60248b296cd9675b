"""Token sequences of a corpus, one beside the other: what models are run on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from ..errors import CorpusError, OptionError
from .documents import BUILT_IN, Document, Split, open_sources, read_documents

__all__ = ["BUILT_IN", "Bos", "Split", "check_corpus", "open_sources", "opening", "read_sequences"]

Bos = Literal["auto", "yes", "no"]
# Sequences of one document that are used at most.
LONGEST = 8


class Encoder(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...


def opening(tokenizer: Encoder, bos: Bos) -> list[int]:
    """Tokens that every sequence begins with.

    Args:
        bos: `auto`: what the tokenizer puts before a text; `yes`: that, or its BOS token where it puts nothing; `no`:
            nothing.

    Raises:
        OptionError: `yes`, and the tokenizer has no BOS token.
    """
    if bos == "no":
        return []
    plain, whole = (list(tokenizer("a", add_special_tokens=own)["input_ids"]) for own in (False, True))
    before = next((n for n in range(len(whole) - len(plain) + 1) if whole[n : n + len(plain)] == plain), 0)
    if before or bos == "auto":
        return whole[:before]
    if tokenizer.bos_token_id is None:
        raise OptionError(
            "--bos yes is not usable: the model's tokenizer has no BOS token; leave it out or write --bos no"
        )
    return [tokenizer.bos_token_id]


def check_corpus(corpus: str) -> None:
    """Read as far as its first document, before a model is loaded and run for the sake of the text.

    Raises:
        CorpusError: it is not there, or cannot be read.
    """
    next(read_documents(corpus), None)


def read_sequences(
    corpus: str, tokenizer: Encoder, length: int, split: Split = "all", bos: Bos = "auto"
) -> Iterator[tuple[list[int], str]]:
    """Stream of token sequences of one length, each from one source, sources taking turns.

    Documents of a source are joined by the end-of-text token and cut; of a long document at most its first
    `LONGEST` sequences are used, so that no single text dominates. Sources that hold less than one sequence are joined
    in the same way, under the corpus's name. Every sequence begins with the tokens of `opening`.

    Raises:
        CorpusError: the corpus holds less than one sequence in this split.
        OptionError: a sequence has no room for text.
    """
    first = opening(tokenizer, bos)
    if len(first) >= length:
        raise OptionError(
            f"--length {length} is not usable: every sequence begins with {len(first)} tokens; expected more"
        )
    short: list[int] = []
    streams = [_pack(documents, tokenizer, first, length, short) for documents in open_sources(corpus, split)]
    found = False
    while streams:
        for stream in list(streams):
            sequence = next(stream, None)
            if sequence is None:
                streams.remove(stream)
                continue
            found = True
            yield sequence
    for tokens in _cut(short, length - len(first)):
        found = True
        yield [*first, *tokens], Path(corpus).name or corpus
    if not found:
        own, every = (sum(1 for _ in read_documents(corpus, part)) for part in (split, "all"))
        raise CorpusError(
            f"corpus {corpus!r} ({split} split) holds less than one sequence of {length} tokens (found: {every} documents "
            f"with text, {own} of them in this split): give more text, shorter sequences, or --split all"
        )


def _pack(
    documents: Iterator[Document], tokenizer: Encoder, first: list[int], length: int, short: list[int]
) -> Iterator[tuple[list[int], str]]:
    """Sequences of one source; where there is none, its tokens go to `short`."""
    pending: list[int] = []
    found = False
    unknown = getattr(tokenizer, "unk_token_id", None)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        # Text has far fewer characters to a token than 16, so the rest of a long document need not be encoded.
        text = document.text[: LONGEST * length * 16]
        pending += [*tokenizer(text, add_special_tokens=False)["input_ids"][: LONGEST * length], *end]
        for tokens in _cut(pending, length - len(first)):
            if not found and unknown is not None and tokens.count(unknown) > len(tokens) / 2:
                raise CorpusError(
                    f"source {document.source!r} is unknown words to the model's tokenizer (more than half of its first "
                    f"{len(tokens)} tokens): give text that the model is for, or put its own tokenizer beside it"
                )
            found = True
            yield [*first, *tokens], document.source
    if not found:
        short += pending


def _cut(tokens: list[int], size: int) -> Iterator[list[int]]:
    """Parts of `size`, taken off the list as they are given."""
    while len(tokens) >= size:
        part = tokens[:size]
        del tokens[:size]
        yield part
