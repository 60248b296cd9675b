"""Where a trace ends whose experts shall have so many tokens each.

The trace is the smallest number of first shards with which every expert of every layer has them, so its content depends
on no process. Counts never fall: as soon as the shards that a process sees reach the target, those before its next one do,
and that one is not needed. Processes that run at the same time see each other's shards; one that runs alone goes on until
its own reach the target, and what is too much is removed in the end.
"""

import torch
from torch import Tensor

from ..parts import Share
from .format import Trace, TraceWriter

# Tokens that are collected where nothing else is asked for.
TOKENS = 100_000
# Layers whose experts are named, at most.
NAMED = 4


def most_tokens(tokens: int | None, per_expert: int) -> int:
    """Tokens that are collected at most; 0 where the target alone says when to stop."""
    return tokens or (0 if per_expert else TOKENS)


def fewest_tokens(tokens: int | None, per_expert: int, experts: int, top_k: int) -> int:
    """Tokens that are collected at least, unless the text ends before: a target needs so many where all experts are alike."""
    needed, most = -(-per_expert * experts // top_k), most_tokens(tokens, per_expert)
    return min(needed or most, most or needed)


class Target:
    """What the shards that are there have of it; without a target every shard is needed."""

    def __init__(self, writer: TraceWriter, share: Share) -> None:
        self.writer, self.share, self.least = writer, share, writer.options.tokens_per_expert
        self.known: dict[int, Tensor] = {}
        self.last = writer.last() if share.merge else 0

    def needs(self, shard: int) -> bool:
        """Whether to look at a shard of the text: False where this process has no more to do."""
        if not self.least:
            return True
        if self.writer.complete:
            return False
        if self.share.merge:  # up to the first that nobody has made, which is then missed if there is text for it
            return shard <= self.last + 1 and not self._enough(shard)
        return not (self.share.owns(shard) and self._enough(shard))

    def end(self, shards: int) -> tuple[int, list[int]]:
        """How many shards the trace has, of so many that there is text for (these where it cannot be known yet), and those
        of them that are not there."""
        if not self.least:
            return shards, [shard for shard in range(shards) if self.writer.written(shard) is None]
        self._look(shards)
        total: Tensor | int = 0
        for shard in range(shards):
            if shard not in self.known:
                break
            total = self.known[shard] + total
            if int(total.min()) >= self.least:
                return shard + 1, []
        return shards, [shard for shard in range(shards) if shard not in self.known]

    def _enough(self, shards: int) -> bool:
        """Whether those of the first shards that are there reach the target."""
        self._look(shards)
        own = [counts for shard, counts in self.known.items() if shard < shards]
        return bool(own) and int(torch.stack(own).sum(0).min()) >= self.least

    def _look(self, shards: int) -> None:
        for shard in range(shards):
            if shard not in self.known and (counts := self.writer.assigned(shard)) is not None:
                self.known[shard] = counts


def in_words(trace: Trace) -> str:
    """What a trace has of its target, in a line."""
    least = trace.options.tokens_per_expert
    if trace.reached:
        return f"every expert has {least:,} tokens or more: {trace.collected_tokens:,} tokens, {min(trace.fewest):,} of the rarest"
    counts = trace.assigned()
    short = [(name, own) for name, own in zip(trace.options.layers, counts, strict=True) if int(own.min()) < least]
    named = "; ".join(
        f"{name}: "
        + ", ".join(f"{expert} ({int(own[expert]):,})" for expert in (own < least).nonzero().flatten().tolist())
        for name, own in short[:NAMED]
    )
    rest = f"; and in {len(short) - NAMED} more layers" if len(short) > NAMED else ""
    return (
        f"{int((counts < least).sum())} of {counts.numel()} experts have fewer than the {least:,} tokens asked for, "
        f"by layer and expert: {named}{rest}"
    )
