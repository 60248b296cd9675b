"""`lynx-learn collect --engine vllm` on a real engine: the trace that transformers gives of the same tokens."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_cases import environment

from lynx_learn.fit.train import TrainOptions, train
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.moe.identity import identify
from lynx_learn.moe.loading import reference_moe
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.traces.collect import record
from lynx_learn.traces.format import MANIFEST, PHASES, Trace

pytest.importorskip("vllm", reason="needs an environment with vLLM: .ci/vllm makes one")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LENGTH, ROWS, SHARDS, PROMPT = 96, 8, 2, 16
TARGET = 20
ENGINE = {"kv_cache_memory_bytes": 100_000_000, "block_size": 32}
# A request of LENGTH + 1 tokens takes four blocks: all of them together do not fit, and some have to come back.
FEW_BLOCKS = {**ENGINE, "num_gpu_blocks_override": 3 * ROWS}
COLLECT = """
import json, sys
from lynx_learn.traces.collect import CollectOptions, collect
from lynx_learn.errors import LynxError
for options in json.loads(sys.argv[1]):
    try:
        print("done", collect(CollectOptions(**options)).collected_tokens, flush=True)
    except LynxError as error:
        print("refused", type(error).__name__, error, flush=True)
"""


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=900, env=environment())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


def asked(out: Path, **own: Any) -> dict[str, Any]:
    plain = {"model": "reference-moe", "out": str(out), "tokens": LENGTH * ROWS * SHARDS, "length": LENGTH}
    return {**plain, "batch_size": ROWS, "dtype": "float32", "engine": "vllm", "engine_options": ENGINE, **own}


@pytest.fixture(scope="module")
def said(folder: Path) -> list[str]:
    """What several runs in one process said, one line each."""
    dense = folder / "dense"
    dense.mkdir()
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 1, "vocab_size": 64}
    (dense / "config.json").write_text(json.dumps({**config, "hidden_size": 32, "intermediate_size": 32}))
    generate = {"mode": "generate", "prompt": PROMPT, "engine_options": FEW_BLOCKS}
    planned = [
        asked(folder / "teacher"),
        asked(folder / "generate", **generate),
        asked(folder / "again", **generate),
        asked(folder / "target", tokens=None, tokens_per_expert=TARGET),
        asked(folder / "own", engine_options={"enforce_eager": False}),
        asked(folder / "dense-trace", model=str(dense)),
        asked(folder / "none", engine_options={"no_such_option": 1}),
    ]
    done = run(["-c", COLLECT, json.dumps(planned)])
    lines = [line for line in done.stdout.splitlines() if line.split(" ")[0] in ("done", "refused")]
    assert len(lines) == len(planned), done.stdout[-2000:] + done.stderr[-4000:]
    return lines


@pytest.fixture(scope="module")
def model() -> tuple[Any, list[MoeLayer]]:
    loaded = AutoModelForCausalLM.from_pretrained(reference_moe(), dtype=torch.float32).eval()
    return loaded, find_moe_layers(loaded)


@pytest.mark.parametrize("mode", ["teacher", "generate"])
def test_as_transformers_runs_the_same_tokens(
    mode: str, folder: Path, said: list[str], model: tuple[Any, list[MoeLayer]]
) -> None:
    loaded, layers = model
    trace = Trace.open(folder / mode)
    options = trace.options
    assert options.engine == "vllm"
    assert options.identity["routers"] == identify(layers)["routers"]
    assert options.layers == tuple(layer.name for layer in layers)
    assert (options.model_type, options.expert_bytes) == (loaded.config.model_type, layers[0].expert_bytes)
    index = trace.index()
    rows = index["tokens"].view(-1, LENGTH)
    assert trace.collected_tokens == rows.numel() == LENGTH * ROWS * SHARDS
    phases = torch.bincount(index["phase"], minlength=len(PHASES)).tolist()
    prompts = PROMPT * ROWS * SHARDS if mode == "generate" else 0
    assert phases == ([prompts, rows.numel() - prompts, 0, 0] if prompts else [0, 0, rows.numel(), 0])
    wanted = record(loaded, layers, rows)
    for layer in layers:
        parts = list(trace.layer_shards(layer.index))
        found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        for key in ("hidden", "logits"):
            torch.testing.assert_close(found[key], wanted[layer.index][key], rtol=1e-3, atol=1e-4)
        chosen, own = (torch.zeros_like(found["logits"]) for _ in range(2))
        chosen.scatter_(1, found["indices"], found["weights"])
        own.scatter_(1, wanted[layer.index]["indices"].long(), wanted[layer.index]["weights"])
        torch.testing.assert_close(chosen, own, rtol=1e-3, atol=1e-4)


def test_a_target_of_tokens_for_every_expert(folder: Path, said: list[str]) -> None:
    """It begins as the trace without one, and ends with the first shard that reaches it."""
    trace, plain = Trace.open(folder / "target"), Trace.open(folder / "teacher")
    assert trace.reached
    assert min(trace.fewest) >= TARGET
    both = min(trace.collected_tokens, plain.collected_tokens)
    assert torch.equal(trace.index()["tokens"][:both], plain.index()["tokens"][:both])
    last = torch.stack(
        [
            torch.bincount(list(trace.layer_shards(i))[-1]["indices"].flatten(), minlength=32)
            for i in range(len(trace.fewest))
        ]
    )
    assert int((trace.assigned() - last).min()) < TARGET


def test_a_selector_is_trained_from_it(
    folder: Path, said: list[str], model: tuple[Any, list[MoeLayer]], tmp_path: Path
) -> None:
    out = str(tmp_path / "selector")
    train(TrainOptions(str(folder / "teacher"), out, scorer="linear", epochs=1, reference=False, tune_steps=0))
    LynxSelector.from_pretrained(out).check(model[1])


def test_a_run_that_was_cut_off_ends_with_the_same_bytes(folder: Path, said: list[str], tmp_path: Path) -> None:
    """Through the command, in a process of its own; also the sampled tokens are the same."""
    whole, cut = folder / "generate", tmp_path / "cut"
    assert json.loads((whole / MANIFEST).read_text()) == json.loads((folder / "again" / MANIFEST).read_text())
    shutil.copytree(whole, cut)
    (cut / MANIFEST).unlink()
    (cut / "index" / "00001.safetensors").unlink()
    words = ["-m", "lynx_learn.cli", "collect", "reference-moe", "--out", str(cut), "--engine", "vllm"]
    words += ["--engine-options", json.dumps(FEW_BLOCKS), "--mode", "generate", "--prompt", str(PROMPT)]
    words += ["--length", str(LENGTH), "--batch-size", str(ROWS), "--dtype", "float32"]
    done = run([*words, "--tokens", str(LENGTH * ROWS * SHARDS)])
    assert done.returncode == 0, done.stderr
    assert (cut / MANIFEST).read_bytes() == (whole / MANIFEST).read_bytes()


@pytest.mark.parametrize(
    ("case", "line"),
    [
        (4, "OptionError --engine_options has enforce_eager, which collect sets itself: leave it out"),
        (5, "has no Mixture-of-Experts block of a known shape"),
        (6, "no_such_option"),
    ],
)
def test_refused(case: int, line: str, said: list[str], folder: Path) -> None:
    assert said[case].startswith("refused")
    assert line in said[case]
    assert not any((folder / name).exists() for name in ("own", "dense-trace", "none"))
