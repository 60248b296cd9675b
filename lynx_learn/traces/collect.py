"""`lynx-learn collect`: run a model over text and write its router traces."""

import inspect
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import OptionError, TraceError
from ..files import check_writable, digest
from ..moe.decision import Routing
from ..moe.families import MoeLayer, alike, find_moe_layers, model_type
from ..moe.hooks import intercept
from ..moe.identity import identify
from ..moe.loading import LoadedModel, load_model
from ..parts import Share, ShareOptions, give_back, in_workers
from ..show.progress import say, track
from . import corpus as corpora
from .format import PHASES, Trace, TracedModel, TraceOptions, TraceWriter
from .packing import HiddenDtype
from .sampling import Sampling, continue_rows
from .target import Target, fewest_tokens, in_words, most_tokens

# Entry points by which other engines are found: each a function of CollectOptions that gives a Tracer.
ENGINES = "lynx_learn.engines"


@dataclass(frozen=True)
class CollectOptions(ShareOptions):
    """Run a model over text and write its router traces."""

    model: str
    """folder or Hub id of a transformers MoE model, or reference-moe"""
    out: str
    """folder for the trace; a run that was broken off goes on there"""
    corpus: str = corpora.BUILT_IN
    """text: python-stdlib, a .jsonl or .txt file (also .gz), a folder of them, a table (.parquet, .csv, .json), or a data
    set as name:config:split"""
    split: corpora.Split = "fit"
    """part of the corpus to read, by document; calibrate and evaluate read the other parts"""
    tokens: int | None = None
    """number of tokens to collect; by default 100000, or as many as --tokens_per_expert needs, whose limit it is otherwise"""
    tokens_per_expert: int = 0
    """go on until every expert of every MoE layer has so many tokens, or the corpus ends"""
    mode: Literal["teacher", "generate"] = "teacher"
    """teacher runs the text itself; generate runs the model's own continuations of prompts from the text"""
    length: int = 256
    """tokens of a sequence"""
    prompt: int = 32
    """tokens of the prompt in mode generate"""
    bos: corpora.Bos = "auto"
    """begin every sequence with the BOS token: auto as the tokenizer begins a text, yes, or no"""
    batch_size: int = 16
    """sequences that run together and are stored in one shard"""
    engine: str = "transformers"
    """what runs the model: transformers, or vllm where that is installed"""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """further arguments of vLLM's LLM, such as {"tensor_parallel_size": 2}"""
    device: str = "auto"
    """where the model runs: cpu, cuda, cuda:1, …; auto takes a GPU where there is one, or several for a large model"""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: what the checkpoint holds, but float32 on a CPU without native bfloat16"""
    hidden_dtype: HiddenDtype = "auto"
    """what hidden states are stored in: auto as the model has them, bfloat16, or float8_e4m3fn, half the size of bfloat16"""
    seed: int = 0
    """seed of the sampling in mode generate"""

    def __post_init__(self) -> None:
        if self.engine == "transformers" and self.engine_options:
            raise OptionError("--engine_options is not usable with transformers: give it with --engine vllm")
        if self.engine == "vllm" and self.device != "auto":
            raise OptionError(f"--device {self.device} is not usable: vLLM runs on the device that it was built for")
        for name, least in (("tokens", 1), ("tokens_per_expert", 0), ("length", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"--{name} {value} is not usable: expected {least} or more")
        if self.mode == "generate" and not 0 < self.prompt < self.length:
            raise OptionError(f"--prompt {self.prompt} is not usable: expected 1 to --length - 1 ({self.length - 1})")
        self.share  # noqa: B018  # refuses what cannot be used


class Tracer(Protocol):
    """A model at work in an engine, that tells what each of its MoE layers did."""

    @property
    def model(self) -> TracedModel: ...

    @property
    def tokenizer(self) -> Any: ...

    def run(self, rows: Tensor, options: TraceOptions, shard: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Run token rows `(sequences, positions)`, and go on to `options.length` where they are shorter.

        Returns:
            The rows in full, and per layer `hidden`, `logits`, `indices` and `weights` of all their tokens in order.
        """

    def close(self) -> None:
        """Give back what does not go away by itself."""


@in_workers
def collect(options: CollectOptions, loaded: LoadedModel | None = None) -> Trace:
    """Write the trace directory `options.out` and return it opened.

    Args:
        loaded: the model that the options name, where it is loaded already.

    Raises:
        Unfinished: this process's shards are written, and those of others are not all there.
    """
    out, share = Path(options.out), options.share
    check_writable(out)
    corpora.check_corpus(options.corpus)
    with closing(start(options, loaded)) as tracer:
        trace_options = describe(options, tracer.model)
        writer = TraceWriter(out, trace_options, share.by)
        was_there = writer.complete
        if not was_there:
            if not share.merge:
                check_room(out, trace_options)
            _write_shards(writer, tracer, share)
        else:
            writer.trim()
    trace = Trace.open(out, verify=was_there)
    if options.tokens_per_expert:
        print(in_words(trace))
    elif trace.collected_tokens < trace.options.tokens:
        text = f"{options.corpus!r} ({options.split} split)"
        print(f"{text} holds {trace.collected_tokens:,} of the {trace.options.tokens:,} tokens asked for")
    return trace


def start(options: CollectOptions, loaded: LoadedModel | None = None) -> Tracer:
    """Load the model in the engine that is asked for, unless that is transformers and `loaded` is given."""
    if options.engine == "transformers":
        return TransformersTracer(options, loaded)
    known = {entry.name: entry for entry in entry_points(group=ENGINES)}
    if options.engine not in known:
        expected = ", ".join(["transformers", *sorted(known)])
        raise OptionError(f"--engine {options.engine!r} is unknown: expected one of {expected}")
    tracer: Tracer = known[options.engine].load()(options)
    return tracer


def describe(options: CollectOptions, model: TracedModel) -> TraceOptions:
    """The trace's identity, from the options and the model."""
    return TraceOptions(
        **asdict(model),
        engine=options.engine,
        corpus=options.corpus,
        split=options.split,
        mode=options.mode,
        tokens=most_tokens(options.tokens, options.tokens_per_expert),
        tokens_per_expert=options.tokens_per_expert,
        length=options.length,
        prompt=options.prompt if options.mode == "generate" else 0,
        bos=options.bos,
        sequences_per_shard=options.batch_size,
        seed=options.seed,
        hidden_dtype=options.hidden_dtype,
    )


class TransformersTracer:
    """A transformers model with hooks on its MoE blocks."""

    def __init__(self, options: CollectOptions, loaded: LoadedModel | None = None) -> None:
        self.loaded = loaded or load_model(options.model, options.device, options.dtype)
        self.tokenizer = self.loaded.tokenizer
        self.layers = find_moe_layers(self.loaded.model)
        first = alike(self.layers)
        self.model = TracedModel(
            model=options.model,
            revision=self.loaded.revision,
            model_type=model_type(self.loaded.model),
            identity=identify(self.layers, self.loaded.model),
            layers=tuple(layer.name for layer in self.layers),
            num_experts=first.num_experts,
            top_k=first.top_k,
            hidden_size=first.hidden_size,
            expert_bytes=first.expert_bytes,
            dtype=str(first.dtype).removeprefix("torch."),
        )

    def run(self, rows: Tensor, options: TraceOptions, shard: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        if rows.shape[1] < options.length:
            # Seeded by the shard alone, so that a resumed run samples the same.
            seed = options.seed * 1_000_003 + shard
            rows = rows.to(self.loaded.input_device)
            rows = continue_rows(self.loaded.model, rows, options.length, Sampling(), seed).cpu()
        return rows, record(self.loaded.model, self.layers, rows)

    def close(self) -> None:
        """Nothing: hooks are there only while a model runs."""


def check_room(out: Path, options: TraceOptions) -> None:
    """Say what will be written, and refuse when the disk has no room for it."""
    tokens = fewest_tokens(options.tokens, options.tokens_per_expert, options.num_experts, options.top_k)
    tokens = -(-tokens // options.length) * options.length
    needed = tokens * options.bytes_per_token
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    there = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) if out.is_dir() else 0
    free = shutil.disk_usage(existing).free
    say(
        f"{'at least ' if options.tokens_per_expert else ''}{tokens:,} tokens × {len(options.layers)} layers: {needed / 1e6:,.1f} MB into {out} "
        f"({free / 1e9:,.1f} GB free)"
    )
    if needed - there > free:
        raise TraceError(
            f"{out} needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free: ask for fewer tokens or another --out"
        )


class Given(NamedTuple):
    """What a shard was made of."""

    text: str
    sequences: int
    sources: int
    """Sources that the shards up to this one name."""


def _write_shards(writer: TraceWriter, tracer: Tracer, share: Share) -> None:
    """Write this process's shards; the manifest, too, where all are there."""
    options = writer.options
    sequences = corpora.read_sequences(
        options.corpus,
        tracer.tokenizer,
        options.length,
        options.split,  # type: ignore[arg-type]
        options.bos,  # type: ignore[arg-type]
    )
    wanted = -(-options.tokens // options.length) if options.tokens else None
    target = Target(writer, share)
    batches = _batches(islice(sequences, wanted), options.sequences_per_shard)
    needed = takewhile(lambda numbered: target.needs(numbered[0]), enumerate(batches))
    expected = None if wanted is None else -(-wanted // options.sequences_per_shard)
    sources: list[str] = []
    given: list[Given] = []
    prompt = options.prompt if options.mode == "generate" else 0
    for shard, (rows, names) in track(
        needed, "collect", expected, options.sequences_per_shard * options.length, "tokens"
    ):
        for name in names:
            if name not in sources:
                sources.append(name)
        rows = rows[:, : prompt or None]
        given.append(Given(_text(rows), len(rows), len(sources)))
        if not share.owns(shard):
            continue
        stored = writer.stored(shard)
        if stored is not None:
            _check_text(writer, given[shard].text, stored, rows.shape[1])
        else:
            rows, traced = tracer.run(rows, options, shard)
            first = shard * options.sequences_per_shard
            writer.write(shard, traced, _index(rows, first, prompt, [sources.index(n) for n in names]))
            give_back()
    if not writer.complete:
        shards, missing = target.end(len(given))
        share.check_all_there(missing, shards, "shards", writer.folder)
        with share.alone(writer.folder):
            if not writer.complete:
                _finish(writer, share, given[:shards], sources, prompt)
    writer.trim()


def _finish(writer: TraceWriter, share: Share, given: list[Given], sources: list[str], prompt: int) -> None:
    """Write the manifest of shards that are all there."""
    length = writer.options.length
    for shard, own in enumerate(given):
        if not share.owns(shard) and (there := writer.written(shard)) is not None:
            _check_text(writer, own.text, there[0], prompt or length)
    count = sum(own.sequences for own in given)
    phases = {"prompt": count * prompt, "generated" if prompt else "teacher": count * (length - prompt)}
    writer.finish(len(given), sources[: given[-1].sources], {name: n for name, n in phases.items() if n})


def _text(rows: Tensor) -> str:
    """What tells the text of a shard from another."""
    return digest(rows.long().contiguous().numpy().tobytes())


def _check_text(writer: TraceWriter, text: str, stored: dict[str, Tensor], positions: int) -> None:
    """Refuse to go on with a trace whose text has changed since."""
    if _text(stored["tokens"].view(-1, writer.options.length)[:, :positions]) != text:
        raise TraceError(
            f"{writer.folder} was begun with other text: {writer.options.corpus!r} has changed since; "
            "restore it, or choose another --out or remove the folder"
        )


def _batches(sequences: Iterator[tuple[list[int], str]], size: int) -> Iterator[tuple[Tensor, list[str]]]:
    while chunk := list(islice(sequences, size)):
        yield torch.tensor([tokens for tokens, _ in chunk]), [source for _, source in chunk]


@torch.no_grad()
def record(model: nn.Module, layers: list[MoeLayer], rows: Tensor) -> list[dict[str, Tensor]]:
    """Hidden states, logits, indices and weights of every MoE layer for token rows `(sequences, positions)`."""
    kept: list[dict[str, Tensor]] = [{} for _ in layers]

    def on_layer(layer: MoeLayer, routing: Routing) -> None:
        kept[layer.index] = {
            "hidden": routing.hidden.to("cpu", layer.dtype),
            "logits": routing.logits.to("cpu", torch.float32),
            "indices": routing.indices.to("cpu", torch.int16),
            "weights": routing.weights.to("cpu", torch.float32),
        }

    known = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    with intercept(model, layers, on_layer):
        model(input_ids=rows.to(next(model.parameters()).device), use_cache=False, **extra)
    return kept


def _index(rows: Tensor, first: int, prompt: int, sources: list[int]) -> dict[str, Tensor]:
    sequences, positions = rows.shape
    position = torch.arange(positions).expand(sequences, -1)
    later = PHASES.index("generated" if prompt else "teacher")
    return {
        "tokens": rows.flatten().to(torch.int32),
        "sequence": torch.arange(first, first + sequences, dtype=torch.int32).repeat_interleave(positions),
        "position": position.flatten().to(torch.int32),
        "phase": torch.where(position < prompt, 0, later).flatten().to(torch.uint8),
        "source": torch.tensor(sources, dtype=torch.int16).repeat_interleave(positions),
    }
