"""A target of tokens for every expert: where a trace ends, whoever collects it, and what is said of it."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from collect_cases import EXPERTS, LAYERS, LENGTH, choices, digests
from flows import one_line
from shared import SHARED
from torch import Tensor

from lynx_learn.errors import OptionError, Unfinished
from lynx_learn.parts import Share
from lynx_learn.traces.collect import CollectOptions, collect
from lynx_learn.traces.format import Trace, TraceWriter
from lynx_learn.traces.target import Target

LEAST = 25


def asked(out: Path, **changes: object) -> CollectOptions:
    return replace(choices(out), **{"tokens": None, "tokens_per_expert": LEAST, "split": "all", **changes})  # type: ignore[arg-type]


def counts(trace: Trace) -> Tensor:
    """Tokens of each expert `(shards, layers, experts)`, from what is recorded."""
    layers = [
        torch.stack(
            [torch.bincount(part["indices"].flatten(), minlength=EXPERTS) for part in trace.layer_shards(layer)]
        )
        for layer in range(LAYERS)
    ]
    return torch.stack(layers, dim=1)


@cache
def alone() -> Path:
    """The trace of one process; nobody may write to it."""
    return SHARED.folder("target", lambda folder: collect(asked(folder)))


def test_it_ends_with_the_first_shard_that_reaches_it() -> None:
    trace = Trace.open(alone())
    so_far = counts(trace).cumsum(0).amin((1, 2))
    assert trace.shards > 2
    assert so_far[-2] < LEAST <= so_far[-1]
    assert trace.reached
    assert torch.equal(trace.assigned(), counts(trace).sum(0))
    manifest = json.loads((alone() / "manifest.json").read_text())
    assert (manifest["tokens_per_expert"], manifest["tokens"]) == (LEAST, 0)
    assert manifest["fewest"] == counts(trace).sum(0).amin(-1).tolist()
    # The text is that of a trace without a target.
    assert trace.index()["sequence"].max() + 1 == trace.collected_tokens // LENGTH


@pytest.mark.parametrize("order", [(2, 0, 3, 1), (3, 2, 1, 0), (0, 1, 2, 3)], ids=str)
def test_any_number_of_processes_writes_the_same_bytes(order: tuple[int, ...], tmp_path: Path) -> None:
    """One after the other: the first goes on until its own shards reach the target, and what is too much goes."""
    out = tmp_path / "t"
    *others, last = order
    for rank in others:
        with pytest.raises(Unfinished, match=f"rank {rank} of 4 is done; .* yet") as rest:
            collect(asked(out, rank=rank, world_size=4))
        one_line(rest)
    assert len(list(out.glob("index/*"))) > Trace.open(alone()).shards / 2
    collect(asked(out, rank=last, world_size=4))
    assert digests(out) == digests(alone())
    collect(asked(out, rank=others[0], world_size=4))
    collect(asked(out, merge=True))
    assert digests(out) == digests(alone())


def test_processes_at_the_same_time_write_the_same_bytes(tmp_path: Path) -> None:
    out = tmp_path / "t"

    def run(rank: int) -> Trace | Unfinished:
        try:
            return collect(asked(out, rank=rank, world_size=2))
        except Unfinished as rest:
            return rest

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(2)))
    assert any(isinstance(one, Trace) for one in found), found
    assert digests(out) == digests(alone())


@pytest.mark.parametrize("ahead", [False, True])
def test_a_run_that_is_broken_off_goes_on_with_the_same_bytes(
    ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two files of a shard; also of one that the trace turns out not to have."""
    out, replaced = tmp_path / "t", os.replace
    options = asked(out, rank=1, world_size=2) if ahead else asked(out)
    shard = 2 * (Trace.open(alone()).shards // 2) + 1 if ahead else 1

    def stop(source: str, target: str, **more: object) -> None:
        replaced(source, target)
        if str(target).endswith(f"layer-00/{shard:05d}.safetensors"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            collect(options)
    assert (out / f"layer-00/{shard:05d}.safetensors").exists()
    assert not (out / f"index/{shard:05d}.safetensors").exists()
    collect(asked(out))
    assert digests(out) == digests(alone())


def test_a_shard_that_comes_late_is_removed_by_who_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process puts the trace together while this one runs the model for a shard that is not needed."""
    out, write, late = tmp_path / "t", TraceWriter.write, []

    def slow(writer: TraceWriter, shard: int, *what: object) -> None:
        if shard >= Trace.open(alone()).shards:
            late.append(shard)
            if not writer.complete:
                with monkeypatch.context() as patch:
                    patch.setattr(TraceWriter, "write", write)
                    collect(asked(out))
            assert writer.complete
        write(writer, shard, *what)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(TraceWriter, "write", slow)
        collect(asked(out, rank=1, world_size=2))
    assert len(late) == 1
    assert digests(out) == digests(alone())


@pytest.mark.parametrize("tokens", [None, 4 * 3 * LENGTH])
def test_what_is_short_is_said(tokens: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the corpus ends, or the limit is reached: the trace is whole all the same."""
    least = 40 if tokens else 10**6
    options = asked(tmp_path / "t", tokens=tokens, tokens_per_expert=least, split="test")
    trace = collect(options)
    said = capsys.readouterr().out
    assert not trace.reached
    found = trace.assigned()
    assert f"{int((found < least).sum())} of {LAYERS * EXPERTS} experts have fewer than the {least:,} tokens" in said
    layer, expert = (int(place[0]) for place in (found < least).nonzero(as_tuple=True))
    assert f"{trace.options.layers[layer]}: {expert} ({int(found[layer, expert]):,})" in said
    if tokens:
        assert trace.collected_tokens == tokens
    before = digests(tmp_path / "t")
    assert collect(options).fewest == trace.fewest
    assert digests(tmp_path / "t") == before


def test_a_target_that_is_reached_within_the_limit_ends_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = collect(asked(tmp_path / "t", tokens=10**6))
    said = capsys.readouterr().out
    assert trace.sha256 == Trace.open(alone()).sha256
    assert f"every expert has {LEAST} tokens or more: {trace.collected_tokens:,} tokens" in said
    assert "asked for" not in said


def test_merging_names_who_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "t"
    with pytest.raises(Unfinished):
        collect(asked(out, rank=0, world_size=2))
    with pytest.raises(OptionError, match="run rank 1 of 2") as error:
        collect(asked(out, rank=0, world_size=2, merge=True))
    one_line(error)


@pytest.mark.parametrize("change", [{"tokens_per_expert": -1}, {"tokens": 0}], ids=str)
def test_options_that_cannot_be_used(change: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not usable: expected") as error:
        asked(tmp_path, **change)
    one_line(error)


class Shards:
    """Of a trace in the making: counts of the shards that are there."""

    complete = False

    def __init__(self, trace: Trace, there: set[int]) -> None:
        self.options, self.all, self.there = trace.options, counts(trace), there

    def assigned(self, shard: int) -> Tensor | None:
        return self.all[shard] if shard in self.there else None


def test_no_process_leaves_out_what_is_needed_whatever_it_sees() -> None:
    """Of every shard that the trace has the owner says that it is needed, however few others are there."""
    trace = Trace.open(alone())
    for there in (set(), {0}, set(range(1, trace.shards, 2)), set(range(trace.shards))):
        for shard in range(trace.shards):
            assert Target(Shards(trace, there - {shard}), Share()).needs(shard)  # type: ignore[arg-type]
    whole = Target(Shards(trace, set(range(trace.shards))), Share())  # type: ignore[arg-type]
    assert whole.end(trace.shards) == (trace.shards, [])
    gap = Target(Shards(trace, set(range(1, trace.shards))), Share())  # type: ignore[arg-type]
    assert gap.end(trace.shards) == (trace.shards, [0])
