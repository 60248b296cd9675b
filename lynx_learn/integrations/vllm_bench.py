"""Ask a running server for the same greedy completions with skipping on and off in turns, and compare.

    python -m lynx_learn.integrations.vllm_bench --url http://127.0.0.1:8000

`off` is the same server with every request opted out: its steps are then left as they are.
"""

import argparse
import json
import statistics
import sysconfig
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .vllm import KEY


@dataclass(frozen=True)
class Answer:
    """One request's tokens and when its first and last came, in seconds."""

    tokens: list[int]
    first: float
    last: float


def read_prompts(count: int, characters: int) -> list[str]:
    """Beginnings of the running Python's own modules, past their headers."""
    prompts = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")[600 : 600 + characters]
        prompts += [text] if len(text) == characters else []
    return prompts[:count]


def read_metrics(url: str) -> dict[str, float]:
    """The server's counters of this plugin."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as page:
        lines = page.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("lynx_"))
    return {name: float(value) for name, value in pairs}


def ask(url: str, prompt: str, tokens: int, skip: bool) -> Answer:
    """One streamed greedy completion."""
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": {KEY: int(skip)},
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    found: list[int] = []
    first = 0.0
    with urllib.request.urlopen(request, timeout=600) as stream:
        for line in stream:
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line[len(b"data: ") :])["choices"]:
                first = first or time.perf_counter()
                found += choice["token_ids"] or []
    return Answer(found, first, time.perf_counter())


def run_pass(url: str, prompts: list[str], tokens: int, concurrency: int, skip: bool) -> tuple[list[Answer], float]:
    """All prompts, `concurrency` at a time; with the seconds that it took."""
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda prompt: ask(url, prompt, tokens, skip), prompts))
    return answers, time.perf_counter() - start


def compare(url: str, prompts: list[str], tokens: int, concurrency: int, turns: int) -> dict[str, Any]:
    """Figures of both ways, medians over the turns."""
    speeds: dict[bool, list[float]] = {True: [], False: []}
    each: dict[bool, list[float]] = {True: [], False: []}
    last: dict[bool, list[Answer]] = {}
    run_pass(url, prompts[:concurrency], tokens, concurrency, skip=True)  # warm
    before = read_metrics(url)
    for turn in range(turns):
        for skip in (False, True) if turn % 2 else (True, False):
            last[skip], seconds = run_pass(url, prompts, tokens, concurrency, skip)
            speeds[skip].append(sum(len(answer.tokens) for answer in last[skip]) / seconds)
            each[skip] += [(answer.last - answer.first) / (tokens - 1) for answer in last[skip]]
    after = read_metrics(url)
    risen = {name: value - before.get(name, 0.0) for name, value in after.items()}
    acted = max(risen['lynx_steps_total{outcome="acted"}'] * after["lynx_moe_layers"], 1)
    pairs = [
        (a, b) for x, y in zip(last[True], last[False], strict=True) for a, b in zip(x.tokens, y.tokens, strict=True)
    ]
    whole = [x.tokens == y.tokens for x, y in zip(last[True], last[False], strict=True)]
    return {
        "tokens_per_second": {"off": statistics.median(speeds[False]), "on": statistics.median(speeds[True])},
        "turns": {"off": speeds[False], "on": speeds[True]},
        "ms_per_output_token": {
            "off": 1000 * statistics.median(each[False]),
            "on": 1000 * statistics.median(each[True]),
        },
        "distinct_experts_per_layer": {
            "off": risen["lynx_experts_routed_total"] / acted,
            "on": risen["lynx_experts_loaded_total"] / acted,
        },
        "steps": {name: risen[name] for name in risen if name.startswith("lynx_steps")},
        "greedy_tokens_at_the_same_place": sum(a == b for a, b in pairs) / len(pairs),
        "greedy_outputs_identical": sum(whole) / len(whole),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--characters", type=int, default=160, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each prompt")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    prompts = read_prompts(options.prompts, options.characters)
    figures = compare(options.url.rstrip("/"), prompts, options.tokens, options.concurrency, options.turns)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
