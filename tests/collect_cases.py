"""A tiny model, text and a trace that the tests of collecting start from."""

import gzip
import hashlib
import json
import os
import random
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from shared import SHARED
from torch import Tensor

from lynx_learn.traces.collect import CollectOptions, collect
from lynx_learn.traces.format import Trace

EOS, LENGTH, LAYERS, EXPERTS, TOP_K = "<end>", 16, 2, 8, 2


class Tiny(NamedTuple):
    """Folder of a tiny qwen3_moe with its tokenizer, and a folder of text in two files."""

    model: str
    texts: str


def save_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer of 300 tokens; returns its end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["the router sends each token to two experts", "one line of text and another"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS)
    tokenizer.save_pretrained(folder)
    return int(tokenizer.eos_token_id)


def save_model(folder: Path, seed: int = 0, hidden: int = 32, **changes: Any) -> str:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    eos = save_tokenizer(folder)
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": hidden,
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,  # so that the routers have something to say
        "eos_token_id": eos,
        "pad_token_id": eos,
    }
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**shape, **changes})).save_pretrained(folder)
    return str(folder)


def sentences(seed: int, count: int) -> list[str]:
    words = ["the", "router", "sends", "each", "token", "to", "two", "experts", "and", "text", "ends"]
    choose = random.Random(seed)
    return [" ".join(choose.choices(words, k=choose.randint(5, 40))) for _ in range(count)]


def save_texts(folder: Path) -> str:
    folder.mkdir()
    first, second = ("".join(json.dumps({"text": t}) + "\n" for t in sentences(s, 60)) for s in (1, 2))
    (folder / "even.jsonl").write_text(first)
    (folder / "odd.jsonl.gz").write_bytes(gzip.compress(second.encode()))
    return str(folder)


@cache
def tiny() -> Tiny:
    """Nobody may write to it."""
    folder = SHARED.folder("collecting", lambda place: (save_model(place / "model"), save_texts(place / "texts")))
    return Tiny(str(folder / "model"), str(folder / "texts"))


@cache
def undisturbed() -> Path:
    """The trace of a run that nothing has stopped; nobody may write to it."""
    return SHARED.folder("collected", lambda folder: collect(choices(folder)))


def environment() -> dict[str, str]:
    """Of another process that runs this package."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def choices(out: Path, **changes: Any) -> CollectOptions:
    options = CollectOptions(
        model=tiny().model, out=str(out), corpus=tiny().texts, tokens=40 * LENGTH, length=LENGTH, prompt=6, batch_size=3
    )
    return replace(options, **changes)


def digests(folder: Path) -> dict[str, str]:
    found = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in found}


def whole(trace: Trace) -> list[dict[str, Tensor]]:
    """Every layer's tensors over all shards."""
    shards = [list(trace.layer_shards(layer)) for layer in range(LAYERS)]
    return [{key: torch.cat([part[key] for part in parts]) for key in parts[0]} for parts in shards]
