"""`lynx-learn bench --url`: ask a running server for the same greedy completions with skipping on and off in turns.

`off` is the same server with every request opted out: its steps are then left as they are.
"""

import http.client
import json
import math
import statistics
import sysconfig
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from ..errors import LynxError, OptionError
from .vllm.settings import KEY

ACTED, LAYERS = 'lynx_steps_total{outcome="acted"}', "lynx_moe_layers"
# Of vLLM itself, where it speculates: requests that were verified in a step, drafts in them, and those that were taken.
VERIFIED, DRAFTED, ACCEPTED = (
    f"vllm:spec_decode_num_{name}_total" for name in ("drafts", "draft_tokens", "accepted_tokens")
)


@dataclass(frozen=True)
class ServerOptions:
    """Time a running vLLM server with skipping on and off in turns, and compare what it answers."""

    url: str = "http://127.0.0.1:8000"
    """address of the server, started with LYNX_SELECTOR and LYNX_BUDGET"""
    prompts: int = 64
    """prompts, the beginnings of the running Python's modules"""
    characters: int = 160
    """characters of each prompt"""
    tokens: int = 64
    """new tokens of each prompt"""
    concurrency: int = 16
    """requests that run at the same time"""
    turns: int = 3
    """turns each way; figures are medians over them"""

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("characters", 1), ("tokens", 2), ("concurrency", 1), ("turns", 1)):
            if getattr(self, name) < least:
                raise OptionError(f"--{name} {getattr(self, name)} is not usable: expected {least} or more")


def bench_server(options: ServerOptions) -> dict[str, Any]:
    """Figures of both ways.

    Raises:
        LynxError: no server answers, it shows no counters of skipped experts, or an answer breaks off.
    """
    url = options.url.rstrip("/")
    prompts = read_prompts(options.prompts, options.characters)
    try:
        return compare(url, prompts, options.tokens, options.concurrency, options.turns)
    except urllib.error.HTTPError as error:
        reason = error.read(300).decode(errors="replace")
        raise LynxError(f"{error.url} answers {error.code} ({reason})") from error
    except (OSError, http.client.HTTPException) as error:
        raise LynxError(f"no server answers at {url} ({error}): start one, or give its --url") from error


@dataclass(frozen=True)
class Answer:
    """One request's tokens and when its first and last came, in seconds."""

    tokens: list[int]
    first: float
    last: float


def read_prompts(count: int, characters: int) -> list[str]:
    """Beginnings of the running Python's own modules, past their headers.

    Raises:
        OptionError: there are not so many modules of that length.
    """
    prompts = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")[600 : 600 + characters]
        prompts += [text] if len(text) == characters else []
    if not 0 < count <= len(prompts):
        raise OptionError(f"--prompts {count} is not usable: expected 1 to {len(prompts)} of {characters} characters")
    return prompts[:count]


def read_metrics(url: str) -> dict[str, float]:
    """The server's counters of this plugin, and those of speculation where it has them, summed over engines.

    Raises:
        OptionError: the server has none of this plugin.
    """
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as page:
        families = text_string_to_metric_families(page.read().decode())
        samples = [sample for family in families for sample in family.samples]
    found = {_spelled(sample.name, sample.labels): sample.value for sample in samples if sample.name[:5] == "lynx_"}
    if LAYERS not in found:
        raise OptionError(
            f"{url} shows no counters of skipped experts: start the server with LYNX_SELECTOR and a LYNX_BUDGET above 0, "
            "one API server, and no PROMETHEUS_MULTIPROC_DIR"
        )
    for sample in samples:
        if sample.name in (VERIFIED, DRAFTED, ACCEPTED):
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def _spelled(name: str, labels: dict[str, str]) -> str:
    """As the page spells it: `name{label="value"}`."""
    inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{name}{{{inside}}}" if inside else name


def ask(url: str, prompt: str, tokens: int, skip: bool) -> Answer:
    """One streamed greedy completion.

    Raises:
        LynxError: the server ends it with an error.
    """
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
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise LynxError(f"{url} broke off an answer ({event['error']}): its log says more")
            for choice in event["choices"]:
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
    """Figures of both ways; those of time once for each turn, and medians over the turns.

    Raises:
        LynxError: the server does not answer, or skips no experts.
    """
    speeds: dict[bool, list[float]] = {True: [], False: []}
    each: dict[bool, list[float]] = {True: [], False: []}
    last: dict[bool, list[Answer]] = {}
    speculated: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    read_metrics(url)  # refused before anything is asked
    run_pass(url, prompts[:concurrency], tokens, concurrency, skip=True)  # warm
    before = after = read_metrics(url)
    for turn in range(turns):
        for skip in (False, True) if turn % 2 else (True, False):
            last[skip], seconds = run_pass(url, prompts, tokens, concurrency, skip)
            earlier, after = after, read_metrics(url)
            if VERIFIED in after:
                counts = {name: after[name] - earlier.get(name, 0.0) for name in (VERIFIED, DRAFTED, ACCEPTED)}
                speculated[skip].append({**counts, "per_second": counts[ACCEPTED] / seconds})
            speeds[skip].append(sum(len(answer.tokens) for answer in last[skip]) / seconds)
            each[skip].append(1000 * statistics.median((a.last - a.first) / (tokens - 1) for a in last[skip]))
    risen = {name: value - before.get(name, 0.0) for name, value in after.items()}
    acted = max(risen[ACTED] * after[LAYERS], 1)
    pairs = [
        (a, b) for x, y in zip(last[True], last[False], strict=True) for a, b in zip(x.tokens, y.tokens, strict=True)
    ]
    whole = [x.tokens == y.tokens for x, y in zip(last[True], last[False], strict=True)]
    return {
        "tokens_per_second": both_ways(speeds),
        "ms_per_output_token": both_ways(each),
        "distinct_experts_per_layer": {
            "off": risen["lynx_experts_routed_total"] / acted,
            "on": risen["lynx_experts_loaded_total"] / acted,
        },
        **({"speculation": speculation(speculated)} if speculated[True] else {}),
        "steps": {name: risen[name] for name in risen if name.startswith("lynx_steps")},
        "greedy_tokens_at_the_same_place": sum(a == b for a, b in pairs) / len(pairs),
        "greedy_outputs_identical": sum(whole) / len(whole),
    }


def speculation(turns: dict[bool, list[dict[str, float]]]) -> dict[str, Any]:
    """Accepted drafts per second both ways, their share of all drafts, and tokens of a request in a step that verified some."""

    def share(skip: bool, of: str) -> float:
        return sum(turn[ACCEPTED] for turn in turns[skip]) / max(sum(turn[of] for turn in turns[skip]), 1)

    ways = {"off": False, "on": True}
    return {
        "accepted_per_second": both_ways({skip: [turn["per_second"] for turn in turns[skip]] for skip in turns}),
        "accepted_of_drafted": {name: share(skip, DRAFTED) for name, skip in ways.items()},
        "tokens_per_verification": {name: 1 + share(skip, VERIFIED) for name, skip in ways.items()},
    }


def both_ways(turns: dict[bool, list[float]]) -> dict[str, Any]:
    """Median of a figure over the turns, the median ratio within a turn, and the turns themselves."""
    off, on = turns[False], turns[True]
    return {
        "off": statistics.median(off),
        "on": statistics.median(on),
        "on / off": statistics.median(b / a if a else math.nan for a, b in zip(off, on, strict=True)),
        "turns": {"off": off, "on": on},
    }
