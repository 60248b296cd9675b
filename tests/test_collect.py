"""Collect: what is recorded is what the model did, of the text itself and of what the model writes; and what is refused."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from collect_cases import (
    EXPERTS,
    LAYERS,
    LENGTH,
    TOP_K,
    choices,
    digests,
    environment,
    save_model,
    save_tokenizer,
    sentences,
    tiny,
    undisturbed,
    whole,
)
from flows import one_line
from torch import Tensor

from lynx_learn.errors import CorpusError, ModelError, OptionError, TraceError
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.loading import load_model
from lynx_learn.show import progress
from lynx_learn.traces.collect import CollectOptions, collect, record
from lynx_learn.traces.format import Trace

# What is recorded.


def expected_sequences(count: int) -> list[tuple[list[int], str]]:
    """The fit split of the two files, joined and cut, taking turns; written independently of the corpus module."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny().model)
    streams = []
    for source, seed in (("even", 1), ("odd", 2)):
        texts = [t for t in sentences(seed, 60) if int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) / 16**16 < 0.8]
        joined = [token for t in texts for token in [*tokenizer(t)["input_ids"][: 8 * LENGTH], tokenizer.eos_token_id]]
        streams.append([(joined[i : i + LENGTH], source) for i in range(0, len(joined) - LENGTH + 1, LENGTH)])
    return [sequence for pair in zip(*streams, strict=False) for sequence in pair][:count]


def hooked(rows: Tensor) -> list[dict[str, Tensor]]:
    """What enters each MoE block and what its router answers, by hooks of our own on the modules by name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny().model).eval()
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


def test_what_is_recorded_is_what_the_model_did() -> None:
    trace = Trace.open(undisturbed())
    sequences = expected_sequences(40)
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
    batches = [hooked(chunk) for chunk in rows.split(3)]
    for layer, recorded in enumerate(whole(trace)):
        for key, given in recorded.items():
            wanted = torch.cat([batch[layer][key] for batch in batches])
            assert torch.equal(given, wanted.to(given.dtype)), (layer, key)
    # The tiny routers do differ between tokens, so that the above says something.
    assert all(len(set(recorded["indices"].flatten().tolist())) == EXPERTS for recorded in whole(trace))


def test_the_trace_says_what_it_is_of() -> None:
    options = Trace.open(undisturbed()).options
    assert options.layers == tuple(f"model.layers.{i}.mlp" for i in range(LAYERS))
    assert (options.num_experts, options.top_k, options.hidden_size) == (EXPERTS, TOP_K, 32)
    assert (options.model_type, options.dtype, options.model) == ("qwen3_moe", "float32", tiny().model)
    assert options.expert_bytes == 3 * 32 * 16 * 4
    assert (options.mode, options.split, options.prompt, options.sequences_per_shard) == ("teacher", "fit", 0, 3)


def test_bfloat16_hidden_states_are_stored_as_they_were(tmp_path: Path) -> None:
    trace = collect(choices(tmp_path / "t", dtype="bfloat16", tokens=2 * LENGTH))
    assert trace.options.dtype == "bfloat16"
    for recorded in whole(trace):
        assert (recorded["hidden"].dtype, recorded["logits"].dtype) == (torch.bfloat16, torch.float32)


def test_recording_leaves_no_hook_and_computes_one_position_of_the_vocabulary() -> None:
    model: Any = load_model(tiny().model, "cpu").model
    layers, shapes = find_moe_layers(model), []
    handle = model.lm_head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    record(model, layers, torch.arange(2 * LENGTH).view(2, LENGTH))
    handle.remove()
    assert shapes == [(2, 1, 320)]
    left = [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert left == []


# Generated text.


def continued(prompts: Tensor, seed: int) -> Tensor:
    """Sampling from the full distribution, the end token excluded, one whole forward pass per token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny().model).eval()
    rows = prompts
    torch.manual_seed(seed)
    with torch.no_grad():
        while rows.shape[1] < LENGTH:
            logits = model(input_ids=rows).logits[:, -1]
            logits[:, model.config.eos_token_id] = float("-inf")
            rows = torch.cat([rows, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return rows


def test_generated_text_is_the_models_own(tmp_path: Path) -> None:
    trace = collect(choices(tmp_path / "a", mode="generate", seed=5, tokens=7 * LENGTH))
    index = trace.index()
    rows = index["tokens"].view(7, LENGTH)
    prompts = torch.tensor([tokens[:6] for tokens, _ in expected_sequences(7)])
    assert torch.equal(rows[:, :6], prompts)
    wanted = [continued(chunk, 5 * 1_000_003 + shard) for shard, chunk in enumerate(prompts.split(3))]
    assert torch.equal(rows, torch.cat(wanted))
    phase = index["phase"].view(7, LENGTH)
    assert torch.equal(phase, torch.tensor([0] * 6 + [1] * 10).expand(7, -1))
    assert trace.phases == {"prompt": 7 * 6, "generated": 7 * 10}
    batches = [hooked(chunk) for chunk in rows.split(3)]
    for layer, recorded in enumerate(whole(trace)):
        assert torch.equal(recorded["hidden"], torch.cat([batch[layer]["hidden"] for batch in batches]))

    collect(choices(tmp_path / "b", mode="generate", seed=5, tokens=7 * LENGTH))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    other = collect(choices(tmp_path / "c", mode="generate", seed=6, tokens=7 * LENGTH))
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
def test_a_models_own_generation_settings_change_nothing(inherited: dict[str, Any], tmp_path: Path) -> None:
    """What is collected is sampled as documented, whatever the model's generation_config.json says."""
    changes: dict[str, Any] = {"mode": "generate", "seed": 5, "tokens": 3 * LENGTH}
    plain = collect(choices(tmp_path / "plain", **changes)).index()["tokens"]
    model = tmp_path / "model"
    shutil.copytree(tiny().model, model)
    own = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**own, "do_sample": True, **inherited}))
    assert torch.equal(collect(choices(tmp_path / "out", model=str(model), **changes)).index()["tokens"], plain)


def test_generated_text_goes_on_after_its_end(tmp_path: Path) -> None:
    """A model for which every second token ends the text still gives whole sequences, as text of several documents is."""
    model = tmp_path / "model"
    shutil.copytree(tiny().model, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, 320, 2))}))
    trace = collect(choices(tmp_path / "t", model=str(model), mode="generate", tokens=6 * LENGTH))
    rows = trace.index()["tokens"].view(6, LENGTH)
    assert (rows[:, 6:] % 2 == 0).any(dim=1).all()
    assert trace.phases == {"prompt": 6 * 6, "generated": 6 * 10}


# How much.


def test_no_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = 40 * LENGTH * (LAYERS * (32 * 4 + EXPERTS * 4 + TOP_K * 6) + 15)
    options = choices(tmp_path / "deep" / "t", tokens=40 * LENGTH - 5)  # whole sequences are written
    monkeypatch.setattr(progress, "_quiet", False)  # as other tests may have left it
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, needed - 1))
    with pytest.raises(TraceError, match="free") as error:
        collect(options)
    assert str(tmp_path) in one_line(error)
    assert list(tmp_path.iterdir()) == []
    assert f"{needed / 1e6:,.1f} MB" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, needed))
    assert collect(options).collected_tokens == 40 * LENGTH


def test_more_tokens_than_the_corpus_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = choices(tmp_path / "t", split="test", tokens=10**6)
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
def test_options_that_cannot_be_used(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError) as error:
        choices(tmp_path / "t", **change)
    assert f"--{list(change)[-1]} {list(change.values())[-1]} " in one_line(error)


def test_a_dense_model_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    save_tokenizer(tmp_path / "llama")
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(ModelError, match="'llama' has no Mixture-of-Experts") as error:
        collect(choices(tmp_path / "t", model=str(tmp_path / "llama")))
    one_line(error)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/no/such/model", "there is no such folder"),
        ("no-such-model", "cannot be loaded"),
        ("nobody/no-such-model", "cannot be loaded"),
        ("with a space", "there is no such folder"),
    ],
)
def test_a_missing_model_is_one_line(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason) as error:
        collect(choices(tmp_path / "t", model=name))
    assert repr(name) in one_line(error)
    assert not (tmp_path / "t").exists()


def test_a_wrong_corpus_leaves_no_folder_that_refuses_the_right_one(tmp_path: Path) -> None:
    out = tmp_path / "t"
    for corpus in (str(tmp_path / "typo.jsonl"), tiny().model):
        with pytest.raises(CorpusError) as error:
            collect(choices(out, corpus=corpus))
        assert corpus in one_line(error)
    assert collect(choices(out)).collected_tokens == 40 * LENGTH
