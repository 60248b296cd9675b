"""How each command's time and memory grow, and what `lynx-learn plan` says of them.

python docs/growth.py --out runs/growth
python docs/growth.py --model reference-moe-50m --out runs/growth-50m --steps 1
python docs/growth.py --hidden 1024 --experts 32 --layers 2 --out runs/growth-wide --steps 1

Each command is a process of its own on one CPU core, run once for 1, 2 and 4 times the tokens, and of models with random
weights also the layers and the experts. An exponent is the slope of the logarithm of its CPU time, which other work on the
machine changes little. Memory is the most that the process holds beside files that are mapped into it, which the system takes
back when it needs room. From both, and from what is planned, is
taken off what the same command takes on a model and a text of next to no size: libraries, mostly.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse import auto_cli

from lynx_learn import reference_moe
from lynx_learn.measure.calibrate import CalibrateOptions
from lynx_learn.plan import PlanOptions, costs, read_shape

STEPS = (1, 2, 4)
LENGTH, SIZE = 256, 4
# What is calibrated and evaluated on: fewer tokens, whose passes are many, in sequences so short that there are more groups than
# the fewest that are taken.
MEASURED_SHARE, MEASURED_LENGTH = 4, 64
# Of a model and a text of next to no size.
NOTHING = {"layers": 2, "experts": 8, "hidden": 32, "inner": 16}
FEWEST_TOKENS = 2560
# Of less work than this beyond that, in seconds, no exponent is told: a command's own start varies by as much.
LEAST_SECONDS = 5.0
# By which of its rows `plan` tells of a command.
ROWS = {"collect": 0, "train, rank 0 of 2: layers": 1, "train, rank 1: layers, tuning": 2, "calibrate": 3}


class Run(NamedTuple):
    """One command: CPU seconds, and the most bytes that it has held."""

    seconds: float
    memory: float


def command(*words: object) -> Run:
    """Run `lynx-learn` with these words in a process of its own."""
    # One thread: the time of several depends on who waits for whom.
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lynx_learn.cli", *map(str, words)], stdout=subprocess.DEVNULL, env=own
    )
    most = ended = 0
    while not ended:
        with suppress(OSError):  # it has just ended
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            most = max(most, sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))))
        time.sleep(0.02)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    if status:
        raise SystemExit(f"lynx-learn {' '.join(map(str, words))} ended with {os.waitstatus_to_exitcode(status)}")
    return Run(usage.ru_utime + usage.ru_stime, most * 1024.0)


def write_model(folder: Path, layers: int, experts: int, hidden: int, inner: int) -> str:
    """A model of random weights with the tokenizer of the reference MoE."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(reference_moe())
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_hidden_layers=layers,
        num_experts=experts,
        num_experts_per_tok=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=hidden // 8,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def measure(model: str, folder: Path, tokens: int) -> dict[str, Run]:
    """Each command once, in the order of the flow."""
    trace, selector = folder / "trace", folder / "selector"
    own = ("--device", "cpu", "--dtype", "float32", "--quiet")
    learn = (
        *("train", "--trace", trace, "--tune-steps", 4, "--tune-batch-sizes", 16, "--reference", "false"),
        *("--epochs", 1, "--out", selector, "--world-size", 2, *own),
    )
    found = {
        "collect": command("collect", "--model", model, "--tokens", tokens, "--length", LENGTH, "--out", trace, *own),
        "train, rank 0 of 2: layers": command(*learn, "--rank", 0),
        "train, rank 1: layers, tuning": command(*learn, "--rank", 1),
    }
    text = (
        *("--selector", selector, "--batch-sizes", SIZE, "--mode", "teacher"),
        *("--tokens", tokens // MEASURED_SHARE, "--length", MEASURED_LENGTH, *own),
    )
    found["calibrate"] = command("calibrate", *text, "--budgets", 0.01)
    found["evaluate"] = command("evaluate", *text, "--methods", "learned", "--out", folder / "report")
    shutil.rmtree(folder)
    return found


def planned(model: str, tokens: int) -> dict[str, float]:
    """Bytes of memory of each command, as `lynx-learn plan` has it."""
    options = PlanOptions(model, tokens=tokens, length=LENGTH)
    calibrated = CalibrateOptions("", batch_sizes=[SIZE], length=MEASURED_LENGTH, tokens=tokens // MEASURED_SHARE)
    found = costs(read_shape(model, "float32"), options, calibrated)
    return {name: found[row].memory for name, row in ROWS.items()}


def slope(seconds: list[float]) -> float:
    """The exponent of growth, by least squares on logarithms."""
    x = [math.log(step) for step in STEPS[: len(seconds)]]
    y = [math.log(max(value, 1e-3)) for value in seconds]
    mean = sum(x) / len(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


def main(
    out: str,
    model: str | None = None,
    tokens: int = 20_480,
    layers: int = 4,
    experts: int = 16,
    hidden: int = 256,
    inner: int = 512,
    steps: int = len(STEPS),
) -> None:
    """Print two tables and write the figures.

    Args:
        out: folder, new or empty.
        model: folder of a model, or the name of one of this project; by default models with random weights.
        tokens: at 1×; also `layers` and `experts` of a model with random weights.
        hidden: its width; `inner`: that of an expert.
        steps: how many of 1×, 2× and 4×.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: choose another --out, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    least = write_model(folder / "model", **NOTHING)
    nothing, planned_least = measure(least, folder / "run", FEWEST_TOKENS), planned(least, FEWEST_TOKENS)
    base = {"tokens": tokens, "layers": layers, "experts": experts}
    measured: dict[str, list[dict[str, Run]]] = {}
    memory: list[tuple[str, str, float, float]] = []
    first: dict[str, Run] = {}
    for axis in ["tokens"] if model else list(base):
        for step in STEPS[:steps]:
            sizes = {**base, axis: base[axis] * step}
            given = model or write_model(folder / "model", sizes["layers"], sizes["experts"], hidden, inner)
            if step > 1 or not first:
                found = measure(given, folder / "run", sizes["tokens"])
                first = first or found
                for name, bytes_planned in planned(given, sizes["tokens"]).items():
                    held = found[name].memory - nothing[name].memory
                    memory.append((f"{axis} {step}×", name, held, bytes_planned - planned_least[name]))
            measured.setdefault(axis, []).append(first if step == 1 else found)
    print("| command | " + " | ".join(f"exponent of {axis}" for axis in measured) + " | CPU seconds at 1× |")
    print("| --- |" + " --- |" * (len(measured) + 1))
    for name in first:
        seconds = {axis: [run[name].seconds - nothing[name].seconds for run in runs] for axis, runs in measured.items()}
        slopes = " | ".join(
            f"{slope(own):.2f}" if len(own) > 1 and own[0] >= LEAST_SECONDS else "–" for own in seconds.values()
        )
        print(f"| {name} | {slopes} | {seconds['tokens'][0]:.1f} |")
    print("\n| size | command | memory measured, MB | planned, MB | ratio |\n| --- | --- | --- | --- | --- |")
    for size, name, held, planned_bytes in memory:
        print(f"| {size} | {name} | {held / 1e6:.0f} | {planned_bytes / 1e6:.0f} | {held / planned_bytes:.2f} |")
    (folder / "growth.json").write_text(
        json.dumps({"nothing": nothing, "base": base, "measured": measured, "memory": memory}, indent=2)
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
