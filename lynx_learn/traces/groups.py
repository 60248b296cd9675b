"""Groups of sequences that decode together, and that share no document: the units of every bound and interval.

Documents are drawn by the hash of their text out of the whole corpus, so neither the order nor the head of a file decides
what is measured. A document gives one sequence; where a source has too few documents for that, it gives several, which
decode in one group, so that groups stay independent of each other.
"""

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..errors import CorpusError, OptionError
from .corpus import LONGEST, Bos, Encoder, opening
from .documents import Document, Split, open_sources

if TYPE_CHECKING:
    import torch

Batches = Literal["mixed", "single"]
Group = tuple["torch.Tensor", list[str]]
# Sequences that are read, as multiples of those wanted, until they make enough groups.
ROOM = (1.0, 1.25, 1.5, 2.0, 3.0)
# Documents of a source that are looked at, at most, to draw from: a data set may have no end.
MOST_READ = 2_000_000
# Documents held for a sequence that is wanted, since short ones are joined.
HELD = 8


class Unit(NamedTuple):
    """Sequences that share a document, at most LONGEST."""

    rows: list[list[int]]
    source: str


def read_units(
    corpus: str,
    tokenizer: Encoder,
    splits: Iterable[Split],
    length: int,
    count: int,
    seed: int,
    mix: dict[str, float] | None = None,
    bos: Bos = "auto",
    only: Iterable[str] | None = None,
    block: int = 1,
) -> list[Unit]:
    """Units that hold `count` sequences of `length` tokens between them, or all there are; sources take turns.

    Args:
        seed: other documents are drawn by another one.
        mix: share of the sequences by source; by default equal ones, and where a source ends the others go on.
        bos: as in `opening`.
        only: sources to draw from; by default all, or those in `mix`.
        block: each source gives a multiple of so many sequences.

    Raises:
        OptionError: `mix` or `only` names a source that the corpus has not.
    """
    first = opening(tokenizer, bos)
    if len(first) >= length:
        raise OptionError(
            f"--length {length} is not usable: every sequence begins with {len(first)} tokens; expected more"
        )
    drawn: dict[str, list[Document]] = {}
    for stream in (stream for split in splits for stream in open_sources(corpus, split)):
        for document in _draw(stream, HELD * count, seed, 16 * length * LONGEST):
            drawn.setdefault(document.source, []).append(document)
    wanted = sorted(drawn if only is None and mix is None else set(mix or drawn) & set(only or mix or ()))
    if unknown := sorted(({*(mix or ()), *(only or ())}) - set(drawn)):
        raise OptionError(
            f"source {', '.join(unknown)} is not in corpus {corpus!r}: expected some of {', '.join(sorted(drawn))}"
        )
    pools: dict[str, list[Unit]] = {}
    for source in wanted:
        documents = sorted(drawn[source], key=lambda d: _place(d.text, seed))
        # With equal shares another source may end, so that more is needed of this one.
        pools[source] = list(_units(documents, tokenizer, first, length, count))
    if mix is None and only is None:  # sources that hold less than one sequence each are joined
        short = [d for source, units in pools.items() if not units for d in drawn[source]]
        name = Path(corpus).name or corpus
        joined = [Document(d.text, name) for d in sorted(short, key=lambda d: _place(d.text, seed))]
        if more := list(_units(joined, tokenizer, first, length, count)):
            pools[name] = pools.get(name, []) + more
        pools = {source: units for source, units in pools.items() if units}
    return _take_turns(pools, count, mix, block)


def _place(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{text}".encode("utf-8", "surrogatepass")).digest()


def _draw(documents: Iterator[Document], most: int, seed: int, characters: int) -> list[Document]:
    """The documents whose place is first, each cut to what can be needed of it."""
    cut = (Document(d.text[:characters], d.source) for d in islice(documents, MOST_READ))
    return heapq.nsmallest(most, cut, key=lambda d: _place(d.text, seed))


def _units(documents: list[Document], tokenizer: Encoder, first: list[int], length: int, most: int) -> Iterator[Unit]:
    """At most `most` units of one source: long documents alone, shorter ones joined by the end-of-text token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    unknown = getattr(tokenizer, "unk_token_id", None)
    size, pending, given = length - len(first), [], 0
    for document in documents:
        if given == most:
            return
        tokens = [*tokenizer(document.text, add_special_tokens=False)["input_ids"], *end]
        if len(tokens) < size:
            pending += tokens
            tokens, pending = (pending, []) if len(pending) >= size else ([], pending)
        starts = range(0, len(tokens) - size + 1, size)
        if not starts:
            continue
        rows = [tokens[start : start + size] for start in starts[:LONGEST]]
        if not given and unknown is not None and rows[0].count(unknown) > size / 2:
            raise CorpusError(
                f"source {document.source!r} is unknown words to the model's tokenizer (more than half of its first "
                f"{size} tokens): give text that the model is for, or put its own tokenizer beside it"
            )
        given += 1
        yield Unit([[*first, *row] for row in rows], document.source)


def _take_turns(pools: dict[str, list[Unit]], count: int, mix: dict[str, float] | None, block: int) -> list[Unit]:
    """Units in the order in which they are used: always of the source that is furthest behind its share.

    Each gives as few sequences as its source can do with.
    """
    shares = mix or dict.fromkeys(pools, 1.0)
    if not all(share > 0 for share in shares.values()):
        raise OptionError(f"--mix {shares} is not usable: expected shares above 0")
    total = sum(shares[source] for source in pools)
    wanted = {source: block * math.ceil(count * shares[source] / total / block) for source in pools}
    count = count if block == 1 else sum(wanted.values())
    pools = {source: _enough(units, wanted[source]) for source, units in pools.items()}
    queues = {source: iter(units) for source, units in pools.items()}
    taken: Counter[str] = Counter()
    found: list[Unit] = []
    while queues and taken.total() < count:
        source = min(queues, key=lambda s: (taken[s] / shares[s], s))
        unit = next(queues[source], None)
        if unit is None:
            if mix is not None:  # going on without it would be another mix
                break
            del queues[source]
            continue
        found.append(unit)
        taken[source] += len(unit.rows)
    return found


def _enough(units: list[Unit], wanted: float) -> list[Unit]:
    """The units with so many sequences of each as `wanted` needs."""
    each = next((n for n in range(1, LONGEST) if sum(min(n, len(u.rows)) for u in units) >= wanted), LONGEST)
    return [Unit(unit.rows[:each], unit.source) for unit in units]


def group_units(units: list[Unit], size: int, most: int, batches: Batches = "mixed") -> list[Group]:
    """At most `most` groups of `size` sequences, of which no two share a document: token rows and each row's source.

    Args:
        batches: `mixed`: each group draws from all sources; `single`: each from one, sources taking turns.
    """
    import torch

    return [
        (torch.tensor([units[u].rows[r] for u, r in group]), [units[u].source for u, _ in group])
        for group in _places(units, size, most, batches)
    ]


def used_rows(units: list[Unit], cells: Iterable[tuple[int, int]], batches: Batches = "mixed") -> list[tuple[int, int]]:
    """Which sequences the groups of these sizes and numbers hold: the unit's place, and the row's in the unit."""
    groups = (group for size, most in cells for group in _places(units, size, most, batches))
    return sorted({place for group in groups for place in group})


def _places(units: list[Unit], size: int, most: int, batches: Batches) -> list[list[tuple[int, int]]]:
    """Groups as places in `units`; they depend on how many rows each unit has, and on nothing in them."""
    pools: dict[str, list[int]] = {}
    for number, unit in enumerate(units):
        pools.setdefault(unit.source if batches == "single" else "", []).append(number)
    by_pool = []
    for pool in pools.values():
        held = [len(units[u].rows) for u in pool]
        # With enough documents each gives one sequence.
        each = next((n for n in range(1, LONGEST) if sum(min(n, h) for h in held) >= size * most), LONGEST)
        groups: list[list[tuple[int, int]]] = []
        group: list[tuple[int, int]] = []
        for number, count in zip(pool, held, strict=True):
            group += [(number, row) for row in range(min(each, count, size - len(group)))]
            if len(group) == size:
                groups.append(group)
                group = []
        by_pool.append(groups)
    return [group for turn in zip_longest(*by_pool) for group in turn if group is not None][:most]


def enough_units(
    read: Callable[[int], list[Unit]], cells: Sequence[tuple[int, int]], batches: Batches = "mixed"
) -> list[Unit]:
    """As few units as give every cell its groups; where that cannot be had, as many groups as can.

    A group leaves sequences over where those of a document do not fit into it, so that more may have to be read.

    Args:
        read: units that hold so many sequences.
        cells: sizes of groups, and how many groups of each.
    """
    count, wanted = max(size * most for size, most in cells), sum(most for _, most in cells)
    units: list[Unit] = []
    reached = -1
    for room in ROOM:
        more = read(math.ceil(room * count))
        groups = sum(len(_places(more, size, most, batches)) for size, most in cells)
        if groups > reached:
            units, reached = more, groups
        if reached >= wanted:
            break
    return units


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
    bos: Bos = "auto",
    mix: dict[str, float] | None = None,
) -> list[Group]:
    """Groups of the text itself, see `read_units` and `group_units`.

    Args:
        most, fewest: groups wanted, and without which there is nothing to compute.

    Raises:
        CorpusError: the split holds too few sequences.
    """
    block = size if batches == "single" else 1
    units = enough_units(
        lambda count: read_units(corpus, tokenizer, [split], length, count, seed, mix, bos, block=block),
        [(size, most)],
        batches,
    )
    groups = group_units(units, size, most, batches)
    check_groups(groups, units, fewest, size, f"corpus {corpus!r} ({split} split)", length, batches)
    return groups


def check_groups(
    groups: list[Group], units: list[Unit], fewest: int, size: int, text: str, length: int, batches: Batches = "mixed"
) -> None:
    """Refuse too few groups, and say where documents had to give several sequences.

    Raises:
        CorpusError: with what there is.
    """
    if len(groups) < fewest:
        each = " from one source each" if batches == "single" else ""
        raise CorpusError(
            f"{text} holds {sum(len(u.rows) for u in units)} sequences of {length} tokens from {len(units)} documents, "
            f"{fewest} groups of {size}{each} without a common document are needed: give more text, shorter sequences or "
            "smaller batches"
        )
    longest = {unit.source: len(unit.rows) for unit in sorted(units, key=lambda unit: len(unit.rows))}
    if several := [f"{source}: up to {n}" for source, n in longest.items() if n > 1]:
        print(
            f"{text} has too few documents for one sequence each ({', '.join(several)} of one document): those decode in "
            "one group, so groups stay independent, but they vary more and bounds are wider"
        )
