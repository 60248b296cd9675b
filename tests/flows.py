"""What the tests of several modules start from: a tiny model, its text, a trace and selectors, and how files are looked at.

Each flow is built once in a run of the tests, by whichever process needs it first, in a folder that all processes share.
Nobody may write to it: tests that change something copy it first.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import SHARED
from tiny import build, words
from torch import Tensor, nn

from lynx_learn.fit.train import TrainOptions, train
from lynx_learn.measure.calibrate import CalibrateOptions, calibrate
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.identity import identify
from lynx_learn.moe.loading import REFERENCE
from lynx_learn.selector.saving import read_metrics
from lynx_learn.traces.collect import CollectOptions, collect, record
from lynx_learn.traces.format import Trace, TraceOptions, TraceWriter

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LENGTH, PROMPT, LAYERS, EXPERTS, HIDDEN, RANK, SHARE = 32, 8, 2, 8, 32, 4, 0.0625
SIZES, BUDGETS = [2, 4], [0.02, 0.1]
SENTENCE = (
    "the router sends each token to two experts and a batch of requests touches most of them so every expert must be "
    "read from memory while decode waits for bytes not for sums thus we leave out those whose loss is small"
)
VOCABULARY = SENTENCE.split()


# Built once for all processes.


class Flow(NamedTuple):
    """Folders; nobody may write to them."""

    model: Path
    texts: Path
    trace: Path
    selector: Path


@cache
def tiny_flow() -> Flow:
    """Tiny model, text, a trace of 4096 tokens, and a selector without thresholds."""

    def make(folder: Path) -> None:
        flow = flow_in(folder)
        save_model(flow.model)
        save_texts(flow.texts)
        collect(CollectOptions(str(flow.model), str(flow.trace), str(flow.texts), tokens=128 * LENGTH, length=LENGTH))
        train(train_options(flow, flow.selector))

    return flow_in(SHARED.folder("tiny", make))


@cache
def reference_flow() -> Flow:
    """The same of the model in the package, on the text every Python carries."""

    def make(folder: Path) -> None:
        trace = str(folder / "trace")
        collect(CollectOptions(REFERENCE, trace, tokens=4096, length=64, dtype="float32"))
        options = TrainOptions(trace, str(folder / "selector"), reference=False, tune_steps=0, sensitivity_groups=1)
        train(replace(options, dtype="float32"))

    return flow_in(SHARED.folder("reference", make))._replace(model=Path(REFERENCE), texts=Path("python-stdlib"))


@cache
def calibrated() -> Path:
    """The tiny selector with thresholds for SIZES and BUDGETS."""

    def make(folder: Path) -> None:
        shutil.copytree(tiny_flow().selector, folder, dirs_exist_ok=True)
        options = CalibrateOptions(
            str(folder), corpus=str(tiny_flow().texts), length=LENGTH, prompt=PROMPT, mode="teacher"
        )
        calibrate(replace(options, budgets=BUDGETS, batch_sizes=SIZES, groups=12))

    return SHARED.folder("calibrated", make)


def flow_in(folder: Path) -> Flow:
    return Flow(*(folder / name for name in Flow._fields))


def train_options(flow: Flow, out: Path, **changes: Any) -> TrainOptions:
    options = TrainOptions(
        str(flow.trace), str(out), surrogate_share=SHARE, epochs=3, reference=False, tune_steps=0, sensitivity_groups=2
    )
    return replace(options, **changes)


# Models, text and traces.


def save_tokenizer(folder: Path) -> None:
    """A tokenizer that knows the words above."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<end>", "<unk>", *dict.fromkeys(VOCABULARY)]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.save_pretrained(folder)


def save_model(folder: Path, **changes: Any) -> Path:
    """A tiny qwen3_moe of random weights with its tokenizer."""
    shape: dict[str, Any] = {"num_experts": EXPERTS, "moe_intermediate_size": 48, "head_dim": 16}
    build("Qwen3Moe", norm_topk_prob=True, **{**shape, **changes}).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_texts(folder: Path, documents: int = 800) -> Path:
    """Two files of random sentences."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(("even", "odd")):
        choose = random.Random(seed)
        texts = (" ".join(choose.choices(VOCABULARY, k=choose.randint(10, 80))) for _ in range(documents))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def change_weights(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Rewrite the weights of a saved model."""
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: change(k, v).contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def other_revision(model: Path, folder: Path) -> Path:
    """The same model after a step of further training, which changed a router a little."""
    shutil.copytree(model, folder)
    change_weights(folder, lambda name, value: value * 1.02 if name.endswith("layers.1.mlp.gate.weight") else value)
    return folder


def change_sensitivity(selector: Path, factor: float) -> None:
    weights = load_file(selector / "selector.safetensors")
    changed = {k: v * factor if k.endswith("sensitivity") else v for k, v in weights.items()}
    save_file(changed, selector / "selector.safetensors")


def blind(selector: Path) -> Path:
    """A selector that takes every expert to be free, so that any threshold leaves out all it may."""
    change_sensitivity(selector, 1e-15)
    return selector


TRACE_SHARDS, TRACE_ROWS, TRACE_LENGTH = 3, 2, 16


def trace_of(model: nn.Module, folder: Path) -> Trace:
    """A trace of random words, in several shards; what the tests of rules that need statistics start from."""
    layers = find_moe_layers(model)
    options = TraceOptions(
        model="tiny",
        revision="local",
        model_type="tiny",
        identity=identify(layers, model),
        layers=tuple(layer.name for layer in layers),
        num_experts=layers[0].num_experts,
        top_k=layers[0].top_k,
        hidden_size=layers[0].hidden_size,
        expert_bytes=layers[0].expert_bytes,
        dtype="float32",
        corpus="words",
        split="fit",
        mode="teacher",
        tokens=TRACE_SHARDS * TRACE_ROWS * TRACE_LENGTH,
        length=TRACE_LENGTH,
        prompt=0,
        bos="auto",
        sequences_per_shard=TRACE_ROWS,
        seed=0,
    )
    writer = TraceWriter(folder, options)
    nothing = torch.zeros(TRACE_ROWS * TRACE_LENGTH, dtype=torch.int32)
    for shard in range(TRACE_SHARDS):
        rows = words(TRACE_ROWS, TRACE_LENGTH, shard)
        index = {**dict.fromkeys(("sequence", "position", "phase", "source"), nothing), "tokens": rows.flatten()}
        with torch.no_grad():
            writer.write(shard, record(model, layers, rows), {k: v.clone() for k, v in index.items()})
    writer.finish(TRACE_SHARDS, ["words"], {"teacher": options.tokens})
    return Trace.open(folder)


# Errors, files and interruptions.


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    """An error's message, which must be one line."""
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def layer_figures(selector: Path) -> list[dict[str, Any]]:
    """What training measured of each layer."""
    metrics: dict[str, Any] = read_metrics(selector)
    return metrics["train"]["layers"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
