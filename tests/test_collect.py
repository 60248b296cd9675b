"""Collect: what is recorded is what the model did, and a run that was stopped ends with the same bytes."""

import gzip
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from flows import one_line
from safetensors.torch import load_file, save_file
from torch import Tensor

from lynx_learn.errors import CorpusError, ModelError, OptionError, TraceError
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.loading import load_model
from lynx_learn.traces.collect import CollectOptions, collect, record
from lynx_learn.traces.format import Trace

EOS, LENGTH, LAYERS, EXPERTS, TOP_K = "<end>", 16, 2, 8, 2
COLLECT = (
    "import json, sys\nfrom lynx_learn.traces.collect import *\ncollect(CollectOptions(**json.loads(sys.argv[1])))"
)

# Before it: killed when the 17th file is about to be put in its place.
KILLED = """
import itertools, os, signal
count, replaced = itertools.count(), os.replace
def killed(*names, **more):
    if next(count) == 16:
        os.kill(os.getpid(), signal.SIGKILL)
    replaced(*names, **more)
os.replace = killed
"""


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("collect")
    return Tiny(save_model(folder / "model"), save_texts(folder / "texts"))


def choices(tiny: Tiny, out: Path, **changes: Any) -> CollectOptions:
    options = CollectOptions(
        model=tiny.model, out=str(out), corpus=tiny.texts, tokens=40 * LENGTH, length=LENGTH, prompt=6, batch_size=3
    )
    return replace(options, **changes)


def digests(folder: Path) -> dict[str, str]:
    found = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in found}


def whole(trace: Trace) -> list[dict[str, Tensor]]:
    """Every layer's tensors over all shards."""
    shards = [list(trace.layer_shards(layer)) for layer in range(LAYERS)]
    return [{key: torch.cat([part[key] for part in parts]) for key in parts[0]} for parts in shards]


# What is recorded.


def expected_sequences(tiny: Tiny, count: int) -> list[tuple[list[int], str]]:
    """The fit split of the two files, joined and cut, taking turns; written independently of the corpus module."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    streams = []
    for source, seed in (("even", 1), ("odd", 2)):
        texts = [t for t in sentences(seed, 60) if int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) / 16**16 < 0.8]
        joined = [token for t in texts for token in [*tokenizer(t)["input_ids"][: 8 * LENGTH], tokenizer.eos_token_id]]
        streams.append([(joined[i : i + LENGTH], source) for i in range(0, len(joined) - LENGTH + 1, LENGTH)])
    return [sequence for pair in zip(*streams, strict=False) for sequence in pair][:count]


def hooked(tiny: Tiny, rows: Tensor) -> list[dict[str, Tensor]]:
    """What enters each MoE block and what its router answers, by hooks of our own on the modules by name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.model).eval()
    seen: list[dict[str, Tensor]] = [{} for _ in range(LAYERS)]
    for index, layer in enumerate(model.model.layers):

        def on_block(_: Any, args: tuple[Any, ...], index: int = index) -> None:
            seen[index]["hidden"] = args[0].flatten(0, 1)

        def on_gate(_: Any, args: tuple[Any, ...], output: Any, index: int = index) -> None:
            seen[index]["logits"], seen[index]["weights"], seen[index]["indices"] = output

        layer.mlp.register_forward_pre_hook(on_block)
        layer.mlp.gate.register_forward_hook(on_gate)
    with torch.no_grad():
        model(input_ids=rows)
    for index, layer in enumerate(model.model.layers):
        weight = layer.mlp.gate.weight.detach()
        probabilities = (seen[index]["hidden"] @ weight.T).softmax(-1)
        chosen = probabilities.topk(TOP_K).values
        torch.testing.assert_close(seen[index]["weights"], chosen / chosen.sum(-1, keepdim=True))
        torch.testing.assert_close(seen[index]["logits"], seen[index]["hidden"] @ weight.T)
    return seen


@pytest.fixture(scope="session")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "trace"
    collect(choices(tiny, folder))
    return folder


def test_what_is_recorded_is_what_the_model_did(tiny: Tiny, undisturbed: Path) -> None:
    trace = Trace.open(undisturbed)
    sequences = expected_sequences(tiny, 40)
    rows = torch.tensor([tokens for tokens, _ in sequences])
    index = trace.index()
    assert torch.equal(index["tokens"], rows.flatten())
    assert torch.equal(index["sequence"], torch.arange(40).repeat_interleave(LENGTH))
    assert torch.equal(index["position"], torch.arange(LENGTH).repeat(40))
    assert set(index["phase"].tolist()) == {2}
    assert trace.phases == {"teacher": 40 * LENGTH}
    names = [trace.sources[i] for i in index["source"].tolist()]
    assert names == [source for _, source in sequences for _ in range(LENGTH)]
    assert set(names) == {"even", "odd"}
    batches = [hooked(tiny, chunk) for chunk in rows.split(3)]
    for layer, recorded in enumerate(whole(trace)):
        for key, given in recorded.items():
            wanted = torch.cat([batch[layer][key] for batch in batches])
            assert torch.equal(given, wanted.to(given.dtype)), (layer, key)
    # The tiny routers do differ between tokens, so that the above says something.
    assert all(len(set(recorded["indices"].flatten().tolist())) == EXPERTS for recorded in whole(trace))


def test_the_trace_says_what_it_is_of(tiny: Tiny, undisturbed: Path) -> None:
    options = Trace.open(undisturbed).options
    assert options.layers == tuple(f"model.layers.{i}.mlp" for i in range(LAYERS))
    assert (options.num_experts, options.top_k, options.hidden_size) == (EXPERTS, TOP_K, 32)
    assert (options.model_type, options.dtype, options.model) == ("qwen3_moe", "float32", tiny.model)
    assert options.expert_bytes == 3 * 32 * 16 * 4
    assert (options.mode, options.split, options.prompt, options.sequences_per_shard) == ("teacher", "fit", 0, 3)


def test_bfloat16_hidden_states_are_stored_as_they_were(tiny: Tiny, tmp_path: Path) -> None:
    trace = collect(choices(tiny, tmp_path / "t", dtype="bfloat16", tokens=2 * LENGTH))
    assert trace.options.dtype == "bfloat16"
    for recorded in whole(trace):
        assert (recorded["hidden"].dtype, recorded["logits"].dtype) == (torch.bfloat16, torch.float32)


def test_recording_leaves_no_hook_and_computes_one_position_of_the_vocabulary(tiny: Tiny) -> None:
    model: Any = load_model(tiny.model, "cpu").model
    layers, shapes = find_moe_layers(model), []
    handle = model.lm_head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    record(model, layers, torch.arange(2 * LENGTH).view(2, LENGTH))
    handle.remove()
    assert shapes == [(2, 1, 320)]
    left = [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert left == []


# Generated text.


def continued(tiny: Tiny, prompts: Tensor, seed: int) -> Tensor:
    """Sampling from the full distribution, the end token excluded, one whole forward pass per token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.model).eval()
    rows = prompts
    torch.manual_seed(seed)
    with torch.no_grad():
        while rows.shape[1] < LENGTH:
            logits = model(input_ids=rows).logits[:, -1]
            logits[:, model.config.eos_token_id] = float("-inf")
            rows = torch.cat([rows, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return rows


def test_generated_text_is_the_models_own(tiny: Tiny, tmp_path: Path) -> None:
    trace = collect(choices(tiny, tmp_path / "a", mode="generate", seed=5, tokens=7 * LENGTH))
    index = trace.index()
    rows = index["tokens"].view(7, LENGTH)
    prompts = torch.tensor([tokens[:6] for tokens, _ in expected_sequences(tiny, 7)])
    assert torch.equal(rows[:, :6], prompts)
    wanted = [continued(tiny, chunk, 5 * 1_000_003 + shard) for shard, chunk in enumerate(prompts.split(3))]
    assert torch.equal(rows, torch.cat(wanted))
    phase = index["phase"].view(7, LENGTH)
    assert torch.equal(phase, torch.tensor([0] * 6 + [1] * 10).expand(7, -1))
    assert trace.phases == {"prompt": 7 * 6, "generated": 7 * 10}
    batches = [hooked(tiny, chunk) for chunk in rows.split(3)]
    for layer, recorded in enumerate(whole(trace)):
        assert torch.equal(recorded["hidden"], torch.cat([batch[layer]["hidden"] for batch in batches]))

    collect(choices(tiny, tmp_path / "b", mode="generate", seed=5, tokens=7 * LENGTH))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    other = collect(choices(tiny, tmp_path / "c", mode="generate", seed=6, tokens=7 * LENGTH))
    assert not torch.equal(other.index()["tokens"], index["tokens"])


INHERITED: list[dict[str, Any]] = [
    {"return_dict_in_generate": True, "output_scores": True, "output_router_logits": True},
    {"num_return_sequences": 2},
    {"num_beams": 4},
    {"min_p": 0.95},
    {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
    {"bad_words_ids": [[i] for i in range(4, 300)]},
    {"max_time": 0.0, "max_length": 3, "stop_strings": ["e"]},
    {"sequence_bias": [[[7], 50.0]], "forced_eos_token_id": 0, "suppress_tokens": [5]},
    {"cache_implementation": "static", "use_cache": False, "penalty_alpha": 0.6, "top_h": 0.2},
]


@pytest.mark.parametrize("inherited", INHERITED, ids=lambda inherited: next(iter(inherited)))
def test_a_models_own_generation_settings_change_nothing(inherited: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    """What is collected is sampled as documented, whatever the model's generation_config.json says."""
    changes: dict[str, Any] = {"mode": "generate", "seed": 5, "tokens": 3 * LENGTH}
    plain = collect(choices(tiny, tmp_path / "plain", **changes)).index()["tokens"]
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    own = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**own, "do_sample": True, **inherited}))
    assert torch.equal(collect(choices(tiny, tmp_path / "out", model=str(model), **changes)).index()["tokens"], plain)


def test_generated_text_goes_on_after_its_end(tiny: Tiny, tmp_path: Path) -> None:
    """A model for which every second token ends the text still gives whole sequences, as text of several documents is."""
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, 320, 2))}))
    trace = collect(choices(tiny, tmp_path / "t", model=str(model), mode="generate", tokens=6 * LENGTH))
    rows = trace.index()["tokens"].view(6, LENGTH)
    assert (rows[:, 6:] % 2 == 0).any(dim=1).all()
    assert trace.phases == {"prompt": 6 * 6, "generated": 6 * 10}


# Stopped and gone on with.


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_killed_and_interrupted_runs_end_with_the_same_bytes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two files of a shard, then interrupted between two others, each of which is put in its place."""
    out, other = tmp_path / "stopped", tmp_path / "undisturbed"
    options = choices(tiny, out, mode="generate", batch_size=1, tokens=12 * LENGTH)
    command = [sys.executable, "-c", KILLED + COLLECT, json.dumps(asdict(options))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(out.rglob(".*.part"))
    there = len(list(out.glob("index/*.safetensors")))
    assert 2 < there < 8
    count, replaced = itertools.count(), os.replace

    def interrupted(*names: Any, **more: Any) -> None:
        if next(count) == 7:
            raise KeyboardInterrupt
        replaced(*names, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect(options)
    assert not list(out.rglob(".*.part"))
    with pytest.raises(TraceError, match="not complete"):
        Trace.open(out)
    assert there < len(list(out.glob("index/*.safetensors"))) < 12
    collect(options)
    collect(replace(options, out=str(other)))
    assert digests(out) == digests(other)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _zeros(file: Path) -> None:
    """As some file systems leave a file after a power failure: the right length, no content at the end."""
    data = file.read_bytes()
    file.write_bytes(data[:-64] + bytes(64))


DAMAGES: list[Callable[[Path], None]] = [_cut, _empty, _zeros, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=["cut", "empty", "zeros", "gone"])
@pytest.mark.parametrize(
    "name", ["layer-00/00002.safetensors", "layer-01/00000.safetensors", "index/00001.safetensors"]
)
def test_a_shard_damaged_by_a_crash_is_written_again(
    name: str, damage: Callable[[Path], None], tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "t"
    shutil.copytree(undisturbed, out)
    (out / "manifest.json").unlink()
    for last in out.glob("*/00013.safetensors"):
        last.unlink()
    damage(out / name)
    collect(choices(tiny, out))
    assert digests(out) == digests(undisturbed)


def test_only_what_is_missing_is_computed(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    shutil.copytree(undisturbed, out)
    (out / "manifest.json").unlink()
    (out / "index" / "00004.safetensors").unlink()
    before = {f: f.stat().st_ino for f in out.rglob("*.safetensors")}
    collect(choices(tiny, out))
    renewed = {f.name for f in out.rglob("*.safetensors") if before.get(f) != f.stat().st_ino}
    assert renewed == {"00004.safetensors"}
    assert digests(out) == digests(undisturbed)


def test_a_complete_trace_is_left_as_it_is(tiny: Tiny, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        return {f: (f.stat().st_ino, f.stat().st_mtime_ns) for f in undisturbed.rglob("*")}

    before = state()
    # Nothing is written, so a full disk is no objection.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    trace = collect(choices(tiny, undisturbed))
    assert trace.collected_tokens == 40 * LENGTH
    assert state() == before


OTHER_OPTIONS: list[dict[str, Any]] = [
    {"seed": 1},
    {"length": 8},
    {"tokens": 41 * LENGTH},
    {"split": "test"},
    {"mode": "generate"},
    {"batch_size": 4},
    {"dtype": "bfloat16"},
    {"corpus": "python-stdlib"},
]


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("change", OTHER_OPTIONS, ids=str)
def test_other_options_are_refused_and_nothing_is_lost(
    change: dict[str, Any], complete: bool, tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "t"
    shutil.copytree(undisturbed, out)
    if not complete:
        (out / "manifest.json").unlink()
    before = digests(out)
    with pytest.raises(OptionError, match="holds a trace with other ") as error:
        collect(choices(tiny, out, **change))
    assert str(out) in one_line(error)
    assert digests(out) == before


def test_another_model_of_the_same_name_is_refused(undisturbed: Path, tiny: Tiny, tmp_path: Path) -> None:
    out, model = tmp_path / "t", tmp_path / "model"
    save_model(model, seed=0)
    collect(choices(tiny, out, model=str(model), tokens=LENGTH))
    (out / "manifest.json").unlink()
    save_model(model, seed=1)
    with pytest.raises(OptionError, match="holds a trace with other "):
        collect(choices(tiny, out, model=str(model), tokens=LENGTH))


def test_a_text_that_changed_in_between_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts", tmp_path / "t"
    shutil.copytree(tiny.texts, texts)
    for mode in ("teacher", "generate"):
        collect(choices(tiny, out, corpus=str(texts), mode=mode))
        (out / "manifest.json").unlink()
        (out / "index" / "00009.safetensors").unlink()
        before = digests(out)
        lines = (texts / "even.jsonl").read_text().splitlines()
        (texts / "even.jsonl").write_text("\n".join(lines[10:]))
        with pytest.raises(TraceError, match="text") as error:
            collect(choices(tiny, out, corpus=str(texts), mode=mode))
        assert str(texts) in one_line(error)
        assert digests(out) == before
        shutil.rmtree(out)


def test_a_folder_with_other_files_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match="not empty") as error:
        collect(choices(tiny, tmp_path))
    assert str(tmp_path) in one_line(error)
    assert list(digests(tmp_path)) == ["notes.txt"]


def test_no_room_is_said_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = 40 * LENGTH * (LAYERS * (32 * 4 + EXPERTS * 4 + TOP_K * 6) + 15)
    options = choices(tiny, tmp_path / "deep" / "t", tokens=40 * LENGTH - 5)  # whole sequences are written
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, needed - 1))
    with pytest.raises(TraceError, match="free") as error:
        collect(options)
    assert str(tmp_path) in one_line(error)
    assert list(tmp_path.iterdir()) == []
    assert f"{needed / 1e6:,.1f} MB" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, needed))
    assert collect(options).collected_tokens == 40 * LENGTH


def test_a_wrong_corpus_leaves_no_folder_that_refuses_the_right_one(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "t"
    for corpus in (str(tmp_path / "typo.jsonl"), tiny.model):
        with pytest.raises(CorpusError) as error:
            collect(choices(tiny, out, corpus=corpus))
        assert corpus in one_line(error)
    assert collect(choices(tiny, out)).collected_tokens == 40 * LENGTH


def test_more_tokens_than_the_corpus_has(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = choices(tiny, tmp_path / "t", split="test", tokens=10**6)
    trace = collect(options)
    said = capsys.readouterr().out
    assert LENGTH < trace.collected_tokens < 2000
    assert trace.collected_tokens == len(trace.index()["tokens"])
    assert trace.collected_tokens == sum(trace.phases.values())
    assert trace.collected_tokens % LENGTH == 0
    assert f"{trace.collected_tokens:,} of the 1,000,000 tokens" in said
    before = digests(tmp_path / "t")
    assert collect(options).collected_tokens == trace.collected_tokens
    assert digests(tmp_path / "t") == before


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    """The peak after 16 times as many tokens, whose trace alone is larger by 8 times the growth allowed."""
    model, texts = save_model(tmp_path / "model", hidden=1024), tmp_path / "a.jsonl"
    texts.write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(3, 3000)))
    program = (
        "import json, resource, sys\nfrom dataclasses import replace\nfrom lynx_learn.traces.collect import *\n"
        "options = CollectOptions(**json.loads(sys.argv[1]))\n"
        "for tokens in (2_048, 16_384):\n"
        "    trace = collect(replace(options, tokens=tokens, out=options.out + str(tokens)))\n"
        "    assert trace.collected_tokens == tokens\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    options = CollectOptions(
        model=model, out=str(tmp_path / "t"), corpus=str(texts), split="all", length=64, batch_size=8
    )
    command = [sys.executable, "-c", program, json.dumps(asdict(options))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = (int(line) for line in done.stdout.splitlines() if line.isdigit())
    larger = sum(f.stat().st_size for f in (tmp_path / "t16384").rglob("*.safetensors"))
    larger -= sum(f.stat().st_size for f in (tmp_path / "t2048").rglob("*.safetensors"))
    assert larger > 100e6
    assert after - before < larger / 8


# Refused options and models.


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0},
        {"length": 0},
        {"batch_size": -1},
        {"mode": "generate", "prompt": 0},
        {"mode": "generate", "prompt": 16},
    ],
    ids=str,
)
def test_options_that_cannot_be_used(change: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as error:
        choices(tiny, tmp_path / "t", **change)
    assert f"--{list(change)[-1]} {list(change.values())[-1]} " in one_line(error)


def test_a_dense_model_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    save_tokenizer(tmp_path / "llama")
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(ModelError, match="'llama' has no Mixture-of-Experts") as error:
        collect(choices(tiny, tmp_path / "t", model=str(tmp_path / "llama")))
    one_line(error)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("name", ["/no/such/model", "no-such-model", "nobody/no-such-model", "with a space"])
def test_a_missing_model_is_one_line(name: str, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        collect(choices(tiny, tmp_path / "t", model=name))
    assert repr(name) in one_line(error)
    assert not (tmp_path / "t").exists()


def test_a_damaged_model_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    model = tmp_path / "model"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        shutil.copytree(tiny.model, model)
        data = (model / name).read_bytes()
        (model / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ModelError, match="cannot be loaded") as error:
            load_model(str(model), "cpu")
        one_line(error)
        shutil.rmtree(model)


def test_pickled_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    weights = load_model(tiny.model, "cpu").model.state_dict()
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors") as error:
        load_model(str(model), "cpu")
    one_line(error)


def test_wrong_devices_and_dtypes_are_one_line(tiny: Tiny) -> None:
    for options in ({"device": "gpu"}, {"dtype": "float64"}, {"device": "cpu:x"}):
        with pytest.raises(ModelError) as error:
            load_model(tiny.model, **{"device": "cpu", **options})
        one_line(error)


def test_a_strangers_training_json_is_no_reason_to_stop(tiny: Tiny, tmp_path: Path) -> None:
    for text, revision in (
        ('{"epochs": 3}', "local"),
        ("[]", "local"),
        ("{", "local"),
        ('{"tokens_seen": 7}', "7 tokens"),
    ):
        model = tmp_path / "model"
        shutil.copytree(tiny.model, model)
        (model / "training.json").write_text(text)
        assert load_model(str(model), "cpu").revision == revision
        shutil.rmtree(model)


def with_code(tiny: Tiny, folder: Path, model_type: str) -> Path:
    """The tiny model with Python code beside it that leaves a mark when it is run; returns the mark."""
    mark = folder.parent / "code-was-run"
    shutil.copytree(tiny.model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type}
    config["auto_map"] = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM\n"
        f"class Config(Qwen3MoeConfig):\n    model_type = {model_type!r}\n"
        "class Model(Qwen3MoeForCausalLM):\n    config_class = Config\n"
    )
    return mark


def test_a_model_with_its_own_code_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    mark = with_code(tiny, tmp_path / "model", "someones_moe")
    with pytest.raises(ModelError, match="custom code") as error:
        load_model(str(tmp_path / "model"), "cpu")
    one_line(error)
    assert not mark.exists()


def test_code_beside_a_model_that_transformers_knows_is_not_run(tiny: Tiny, tmp_path: Path) -> None:
    mark = with_code(tiny, tmp_path / "model", "qwen3_moe")
    model = load_model(str(tmp_path / "model"), "cpu").model
    assert type(model).__module__.startswith("transformers.models.qwen3_moe")
    assert not mark.exists()


def test_nobody_is_asked_whether_to_run_a_models_code(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal transformers asks, unless told; a `y` typed ahead must not run a stranger's code."""
    mark = with_code(tiny, tmp_path / "model", "someones_moe")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 4))
    with pytest.raises(ModelError, match="custom code"):
        load_model(str(tmp_path / "model"), "cpu")
    assert not mark.exists()
    assert "Do you wish to run" not in capsys.readouterr().out


def test_a_model_with_weights_missing_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """Transformers would fill the gap with random weights and a warning."""
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.gate.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights \(model\.layers\.1\.mlp\.gate\.weight") as error:
        load_model(str(model), "cpu")
    one_line(error)
