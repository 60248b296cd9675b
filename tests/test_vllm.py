"""The plugin in a real vLLM on the CPU: servers that are asked over HTTP, and refusals as a user sees them.

Run in an environment of its own: `.ci/vllm`.
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_cases import environment, run_cases

from lynx_learn.moe.loading import reference_moe

pytest.importorskip("vllm", reason="needs an environment with vLLM: .ci/vllm makes one")
openai = pytest.importorskip("openai")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
SELECTOR = ROOT / "selectors" / "reference-moe"
SERVING = ROOT / "docs" / "serving"
BUDGET = 0.01
STREAMS, PROMPT, NEW, TOP = 16, 32, 48, 100
SPECULATION = {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
# Two blocks of 32 tokens hold PROMPT + NEW for each stream; LONG tokens for each of them do not fit.
BLOCKS, LONG = 56, 200
SETTINGS: dict[str, Any] = {
    "dtype": "float32",  # numerical noise then leaves greedy tokens alone
    "max_model_len": 256,
    "max_num_seqs": STREAMS,
    "block_size": 32,
    "num_gpu_blocks_override": BLOCKS,
    "kv_cache_memory_bytes": 100_000_000,
    "max_logprobs": TOP,
}


@dataclass
class Server:
    """A running server and what it has logged."""

    address: str
    log: Path
    watched: str | None = None

    def __post_init__(self) -> None:
        # One for all threads: making one takes so long that requests would not be side by side.
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=600)

    def complete(self, prompts: list[list[int]], tokens: int = NEW, **own: Any) -> list[Any]:
        extra = {"return_token_ids": True, "return_tokens_as_token_ids": True, **own.pop("extra_body", {})}
        options = {"temperature": 0.0, "max_tokens": tokens, "extra_body": {"ignore_eos": True, **extra}, **own}
        return self.client.completions.create(model="reference", prompt=prompts, **options).choices

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[:1] not in ("#", "")}

    def counted(self, run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """What `run` returns, and by how much the plugin's counters rose."""
        before = self.metrics()
        result = run()
        after = self.metrics()
        return result, {key: after[key] - before.get(key, 0.0) for key in after if key.startswith("lynx_")}


@contextmanager
def serving(
    folder: Path,
    name: str,
    extra: tuple[str, ...] = (),
    engine: dict[str, Any] = SETTINGS,
    **settings: str,
) -> Iterator[Server]:
    port = free_port()
    with started(folder, name, port, [*command(port), *options_of(engine), *extra], **settings) as server:
        yield server


@contextmanager
def watched(folder: Path, name: str, **settings: str) -> Iterator[Server]:
    """As the page of serving has it: with a Prometheus beside it, where there is one."""
    port, watching = free_port(), free_port()
    own = {"PORT": str(port), "PROMETHEUS_PORT": str(watching), "PYTHON": sys.executable, "PROMETHEUS_DATA": name}
    words = ["bash", str(SERVING / "start.sh"), "--model", reference_moe(), "--served-model-name", "reference"]
    with started(folder, name, port, [*words, *options_of(SETTINGS)], **own, **settings) as server:
        server.watched = f"http://127.0.0.1:{watching}" if shutil.which("prometheus") else None
        yield server


def options_of(engine: dict[str, Any]) -> list[str]:
    return [part for key, value in engine.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def command(port: int, model: str | Path | None = None) -> list[str]:
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model or reference_moe())]
    return [*words, "--served-model-name", "reference", "--port", str(port)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def started(folder: Path, name: str, port: int, words: list[str], **settings: str) -> Iterator[Server]:
    server = Server(f"http://127.0.0.1:{port}", folder / f"{name}.log")
    with open(server.log, "w") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=log, env=environment(**settings), cwd=folder, start_new_session=True
        )
    try:
        for _ in range(1800):
            time.sleep(0.5)
            assert process.poll() is None, server.log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{server.address}/health", timeout=5)
            except OSError:
                continue
            break
        else:
            pytest.fail(f"no server after fifteen minutes: {server.log.read_text()[-4000:]}")
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """One untouched, and one whose setting comes from the environment; both start at the same time."""
    folder = tmp_path_factory.mktemp("servers")
    settings = {"LYNX_SELECTOR": str(SELECTOR), "LYNX_BUDGET": str(BUDGET)}
    # As if started by a process that has an engine itself.
    inherited = {"LYNX_WORKER_DIR": str(folder / "other")}
    # Graphs that Dynamo has traced, but run as they are: compiling them would take a minute each.
    plain = {"VLLM_CPU_CI_ENV": "1"}
    # Audited now and then, which changes nothing that is served.
    settings["LYNX_AUDIT_EVERY"] = "4"
    planned = [serving(folder, "untouched", **plain), watched(folder, "skipping", **plain, **settings, **inherited)]
    with ExitStack() as stack, ThreadPoolExecutor(len(planned)) as pool:
        yield list(pool.map(stack.enter_context, planned))


@pytest.fixture(scope="module")
def untouched(servers: list[Server]) -> Server:
    return servers[0]


@pytest.fixture(scope="module")
def skipping(servers: list[Server]) -> Server:
    return servers[1]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Tokens out of modules of the standard library."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference_moe())
    found = []
    for file in sorted(Path(json.__file__).parents[1].glob("[a-z]*.py")):
        ids = tokenizer(file.read_text(encoding="utf-8")[:4000]).input_ids[200 : 200 + PROMPT]
        found += [ids] if len(ids) == PROMPT else []
    return found[:STREAMS]


def tokens_of(choices: list[Any]) -> list[list[int]]:
    return [choice.token_ids for choice in choices]


def log_probabilities(table: dict[str, Any]) -> dict[int, float]:
    """Of one position, as the server writes them for generated tokens or for prompts."""
    parsed = {}
    for key, value in table.items():
        parsed[int(key.removeprefix("token_id:"))] = value["logprob"] if isinstance(value, dict) else value
    return parsed


def divergence(wanted: dict[int, float], found: dict[int, float]) -> float:
    """KL in nats between two positions of which the likeliest tokens are known: all others count as one token.

    Lumping tokens together can only lower it; here what is lumped holds a per cent or so.
    """
    shared = wanted.keys() & found.keys()
    total = sum(math.exp(wanted[token]) * (wanted[token] - found[token]) for token in shared)
    rest, other = (max(1 - sum(math.exp(part[t]) for t in shared), 1e-9) for part in (wanted, found))
    return total + rest * math.log(rest / other)


def untouched_tables(server: Server, sequences: list[list[int]]) -> list[list[dict[int, float]]]:
    """The untouched model's log-probabilities of each generated position, all in one pass over the prompt."""
    choices = server.complete(sequences, 1, extra_body={"prompt_logprobs": TOP})
    return [[log_probabilities(table) for table in choice.prompt_logprobs[PROMPT:]] for choice in choices]


def likeliest(logits: torch.Tensor) -> list[list[dict[int, float]]]:
    """The same tables from logits `(sequences, positions, vocabulary)`."""
    values, tokens = logits.log_softmax(-1).topk(TOP, dim=-1)
    rows = zip(tokens.tolist(), values.tolist(), strict=True)
    return [[dict(zip(*position, strict=True)) for position in zip(*row, strict=True)] for row in rows]


def divergences(wanted: list[list[dict[int, float]]], found: list[list[dict[int, float]]]) -> torch.Tensor:
    return torch.tensor(
        [[divergence(a, b) for a, b in zip(w, f, strict=True)] for w, f in zip(wanted, found, strict=True)]
    )


def in_one_step(server: Server, prompts: list[list[int]], attempt: int, **own: Any) -> list[Any]:
    """What is generated when the prompts are all read in one step, so that their rows stay at the same positions.

    The engine reads what has come when a step ends, and it would begin with the first prompt alone. A long prompt keeps it
    busy while the others come: one that it has not seen, of which it has to tell every position's probabilities.
    """
    length = SETTINGS["max_model_len"] - 1
    busy = [1 + attempt * length + place for place in range(length)]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.complete, [busy], 1, extra_body={"prompt_logprobs": TOP})
        time.sleep(0.03)
        choices = server.complete(prompts, **own)
        first.result()
    return choices


def test_fewer_experts_and_the_simulated_loss(untouched: Server, skipping: Server, prompts: list[list[int]]) -> None:
    from transformers import AutoModelForCausalLM

    from lynx_learn.decode.simulate import simulated_logits
    from lynx_learn.moe.families import find_moe_layers
    from lynx_learn.selector.selector import LynxSelector

    for attempt in range(5):
        choices, counted = skipping.counted(
            lambda: in_one_step(skipping, prompts, attempt, temperature=1.0, seed=1, logprobs=TOP)  # noqa: B023
        )
        if not (late := counted['lynx_steps_total{outcome="mixed"}']):
            break
    assert not late
    sequences = [prompt + new for prompt, new in zip(prompts, tokens_of(choices), strict=True)]
    wanted = untouched_tables(untouched, sequences)
    found = [[log_probabilities(table) for table in choice.logprobs.top_logprobs] for choice in choices]
    # The first token comes out of the prompt, which is not touched.
    first = [divergence(w[0], f[0]) for w, f in zip(wanted, found, strict=True)]
    served = divergences([row[1:] for row in wanted], [row[1:] for row in found])
    model = AutoModelForCausalLM.from_pretrained(reference_moe(), dtype=torch.float32).eval()
    layers = find_moe_layers(model)
    policy = LynxSelector.from_pretrained(SELECTOR).policy(BUDGET)
    policy.bind(layers)
    tokens = torch.tensor(sequences)
    with torch.no_grad():
        base, _ = simulated_logits(model, layers, tokens, None, PROMPT)
        other, stats = simulated_logits(model, layers, tokens, policy, PROMPT)
    simulated = divergences(likeliest(base[:, :-1]), likeliest(other[:, :-1]))
    steps = counted['lynx_steps_total{outcome="acted"}'] * len(layers)
    before, after = (counted[f"lynx_experts_{part}_total"] / steps for part in ("routed", "loaded"))
    print(f"served KL {served.mean():.5f}, simulated {simulated.mean():.5f}, first {max(first):.2g}")
    print(f"experts {before:.2f} -> {after:.2f}, simulated {stats}, {counted}")
    assert max(first) < 1e-4
    assert after < 0.75 * before
    assert counted["lynx_assignments_answered_total"] > 0
    assert served.mean().item() == pytest.approx(simulated.mean().item(), rel=0.1)
    assert after == pytest.approx(sum(stats.experts_after) / len(layers), rel=0.1)
    assert skipping.log.read_text().count("self-check passed") == 1


def test_streams_side_by_side(untouched: Server, skipping: Server, prompts: list[list[int]]) -> None:
    """All streams at once, each as its own request; prompts and mixed steps are left alone on the way."""

    def stream(prompt: list[int]) -> list[int]:
        pieces = skipping.client.completions.create(
            model="reference",
            prompt=prompt,
            max_tokens=NEW,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        return [token for piece in pieces for choice in piece.choices for token in choice.token_ids or []]

    with ThreadPoolExecutor(STREAMS) as pool:
        found, counted = skipping.counted(lambda: list(pool.map(stream, prompts)))
    wanted = tokens_of(untouched.complete(prompts))
    assert [len(tokens) for tokens in found] == [NEW] * STREAMS
    assert counted['lynx_steps_total{outcome="acted"}'] > 0
    assert counted['lynx_steps_total{outcome="prefill"}'] + counted['lynx_steps_total{outcome="mixed"}'] > 0
    assert counted["lynx_experts_loaded_total"] < counted["lynx_experts_routed_total"]
    assert found != wanted


def test_a_request_that_opted_out_is_as_untouched(
    untouched: Server, skipping: Server, prompts: list[list[int]]
) -> None:
    """Its neighbours skip, at the same steps."""
    wanted = untouched.complete(prompts, logprobs=1)

    def ask(row: int) -> Any:
        own = {"extra_body": {"vllm_xargs": {"lynx": False}}} if row % 4 == 0 else {}
        return skipping.complete([prompts[row]], logprobs=1, **own)[0]

    with ThreadPoolExecutor(STREAMS) as pool:
        found, counted = skipping.counted(lambda: list(pool.map(ask, range(STREAMS))))

    def distance(row: int) -> float:
        pairs = zip(wanted[row].logprobs.token_logprobs, found[row].logprobs.token_logprobs, strict=True)
        return max(abs(a - b) for a, b in pairs)

    opted, others = [range(0, STREAMS, 4), [row for row in range(STREAMS) if row % 4]]
    assert all(found[row].token_ids == wanted[row].token_ids for row in opted)
    assert max(distance(row) for row in opted) < 1e-3
    assert min(distance(row) for row in others) > 1e-3
    assert counted["lynx_experts_loaded_total"] < counted["lynx_experts_routed_total"]


@pytest.mark.parametrize("value", ["of", 0.004, -1])
def test_what_is_neither_on_nor_off_is_a_bad_request(
    untouched: Server, skipping: Server, prompts: list[list[int]], value: Any
) -> None:
    own = {"extra_body": {"vllm_xargs": {"lynx": value}}}
    with pytest.raises(openai.BadRequestError, match=f"lynx={value!r} in vllm_xargs .+ expected false"):
        skipping.complete(prompts[:1], 4, **own)
    assert untouched.complete(prompts[:1], 4, **own)  # nobody there asked for anything


def test_a_second_turn_reads_no_more_than_prompts(
    untouched: Server, skipping: Server, prompts: list[list[int]]
) -> None:
    """Its prompt repeats what was generated with fewer experts, whose keys and values are cached."""
    # All blocks of both turns fit, so that none of the first is given up before it is read. The prompts are nobody else's:
    # what another request has generated untouched may be the same text, and is then rightly read.
    few = [prompt[::-1] for prompt in prompts[:8]]
    second = [p + new for p, new in zip(few, tokens_of(skipping.complete(few)), strict=True)]
    wanted = untouched.complete(second, 8, logprobs=5)

    def distance(choices: list[Any]) -> float:
        """Of the first token's likeliest alternatives; it comes out of the prompt, which no request skips anything in."""
        pairs = [
            [log_probabilities(c.logprobs.top_logprobs[0]) for c in pair] for pair in zip(wanted, choices, strict=True)
        ]
        return max(abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys())

    off = {"extra_body": {"vllm_xargs": {"lynx": 0}}}
    hits = 'vllm:prefix_cache_hits_total{engine="0",model_name="reference"}'
    before = skipping.metrics()[hits]
    found = skipping.complete(second, 8, logprobs=5, **off)
    read = skipping.metrics()[hits] - before
    assert tokens_of(found) == tokens_of(wanted)
    assert distance(found) < 1e-3
    assert read == len(few) * PROMPT  # the first turns' prompts, and nothing behind them
    assert distance(skipping.complete(second, 8, logprobs=5)) < 1e-3


def test_preempted_requests_come_back(untouched: Server, skipping: Server, prompts: list[list[int]]) -> None:
    name = 'vllm:num_preemptions_total{engine="0",model_name="reference"}'
    before = skipping.metrics()[name]

    def ask(rows: slice) -> list[list[int]]:
        own = {"extra_body": {"vllm_xargs": {"lynx": False}}} if not rows.start else {}
        return tokens_of(skipping.complete(prompts[rows], LONG, **own))

    with ThreadPoolExecutor(2) as pool:
        parts, counted = skipping.counted(lambda: list(pool.map(ask, [slice(0, 1), slice(1, STREAMS)])))
    found = [tokens for part in parts for tokens in part]
    assert skipping.metrics()[name] > before
    assert [len(tokens) for tokens in found] == [LONG] * STREAMS
    assert counted["lynx_experts_loaded_total"] < counted["lynx_experts_routed_total"]
    assert found[0] == tokens_of(untouched.complete(prompts[:1], LONG))[0]


def test_the_audit_and_the_loss_that_is_served(untouched: Server, skipping: Server, prompts: list[list[int]]) -> None:
    """An audit is of one step's skipping; what earlier ones left in keys and values is in the loss alone."""
    choices, counted = skipping.counted(lambda: skipping.complete(prompts, temperature=1.0, seed=2, logprobs=TOP))
    sequences = [prompt + new for prompt, new in zip(prompts, tokens_of(choices), strict=True)]
    found = [[log_probabilities(table) for table in choice.logprobs.top_logprobs[1:]] for choice in choices]
    served = divergences([row[1:] for row in untouched_tables(untouched, sequences)], found).mean().item()
    tokens = counted["lynx_audit_kl_count"]
    audited = counted["lynx_audit_kl_sum"] / tokens
    steps = counted['lynx_steps_total{outcome="acted"}']
    print(f"audited KL {audited:.5f} of {tokens:.0f} tokens, served {served:.5f}")
    assert tokens == pytest.approx(STREAMS * steps / 4, abs=STREAMS)
    assert 0 < audited < 1.5 * served  # of a quarter of the steps
    assert served < 3 * BUDGET
    assert counted['lynx_decode_tokens_total{asked="budget"}'] == STREAMS * (NEW - 1)


def asked_of_prometheus() -> list[str]:
    """Everything that the dashboard asks, of the last five minutes."""
    board = json.loads((SERVING / "dashboard.json").read_text(encoding="utf-8"))
    found = [target["expr"].replace("$__rate_interval", "5m") for p in board["panels"] for target in p["targets"]]
    assert len(found) > 10
    return found


def test_the_dashboard_names_metrics_that_are_there(skipping: Server) -> None:
    names = {name for query in asked_of_prometheus() for name in re.findall(r"\b(?:lynx_|vllm:)\w+", query)}
    there = {re.sub(r"\{.*", "", name) for name in skipping.metrics()}
    assert names <= there
    assert any(name.startswith("lynx_audit") for name in names)


def test_prometheus_answers_all_that_the_dashboard_asks(skipping: Server, prompts: list[list[int]]) -> None:
    if skipping.watched is None:
        pytest.skip("needs Prometheus (Debian's package prometheus)")

    def value(query: str) -> float:
        words = urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(f"{skipping.watched}/api/v1/query?{words}", timeout=30) as page:
            found = json.load(page)["data"]["result"]
        return float(found[0]["value"][1]) if found else math.nan

    queries = asked_of_prometheus()
    for _ in range(30):  # two readings, five seconds apart, with steps between them
        skipping.complete(prompts, 8)
        found = {query: value(query) for query in queries}
        if not any(map(math.isnan, found.values())):
            break
        time.sleep(2)
    print(found)
    assert all(map(math.isfinite, found.values())), found
    before, after = (value for query, value in found.items() if "lynx_moe_layers" in query)
    assert 0 < after < before


def test_readme_serves_and_compares(tmp_path: Path) -> None:
    """The section's commands, each to the letter but for the folder and the port."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Serve with vLLM") : text.index("## Measured")]
    serve, compare = re.findall(r"^```bash\n(.*?)^```", section, flags=re.M | re.S)
    export, command = serve.strip().splitlines()
    settings = dict(part.split("=") for part in export.removeprefix("export ").split())
    start = "python -m vllm.entrypoints.openai.api_server --model lynx_learn/reference_moe "
    assert command.startswith(start)
    options = tuple(command.removeprefix(start).split())
    settings["LYNX_SELECTOR"] = str(ROOT / settings["LYNX_SELECTOR"])
    with serving(tmp_path, "readme", options, {}, **settings) as server:
        words = compare.split()
        assert words[:3] == ["lynx-learn", "bench", "--url"]
        done = subprocess.run(
            [sys.executable, "-m", "lynx_learn.cli", "bench", "--url", server.address, *words[4:], "--turns", "1"],
            capture_output=True,
            text=True,
            timeout=900,
            env=environment(),
        )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    experts = figures["distinct_experts_per_layer"]
    assert experts["on"] < 0.75 * experts["off"]
    assert figures["greedy_tokens_at_the_same_place"] > 0.3
    assert figures["steps"]['lynx_steps_total{outcome="opted_out"}'] > 0


def refused(folder: Path, words: list[str], **own: str) -> str:
    """What a server that does not start says on standard error."""
    settings = {"LYNX_SELECTOR": str(SELECTOR), "LYNX_BUDGET": str(BUDGET), **own}
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=900, cwd=folder, env=environment(**settings), check=False
    )
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_all_reasons_at_once_and_the_command_that_works(tmp_path: Path, prompts: list[list[int]]) -> None:
    """One start, before any weight is read; the command to the letter."""
    port = free_port()
    wrong = ["--enable-lora", "--max_lora_rank=8", "--model-impl=transformers", "-sc.num_speculative_tokens", "2"]
    wrong += ["-sc.method=ngram_gpu", "-sc.prompt_lookup_max=3", "--data-parallel-size=2"]
    right = ["--max-model-len", "256", "--kv-cache-memory-bytes", "100000000", "--max-num-seqs", str(STREAMS)]
    said = refused(tmp_path, [*command(port), *wrong, *right], LYNX_BUDGET="0.02")
    told = said[said.index("skipping cannot act here") :].strip().splitlines()
    assert told[0] == "skipping cannot act here, for 5 reasons:"
    for number, part in enumerate(["calibrated", "speculative", "LoRA", "data parallelism", "--model-impl"], 1):
        assert re.match(rf"{number}\. .*{part}", told[number])
    assert told[6:] == ["this works:", f"LYNX_BUDGET=0.01 {shlex.join([*command(port), *right])}"]
    assert "Starting to load model" not in said
    assert "Initializing a V1 LLM engine" not in said
    settings = {"LYNX_SELECTOR": str(SELECTOR), "LYNX_BUDGET": "0.02", "VLLM_CPU_CI_ENV": "1"}
    with started(tmp_path, "mended", port, ["bash", "-c", f"exec env {told[7]}"], **settings) as server:
        assert "Starting to load model" in server.log.read_text()
        _, counted = server.counted(lambda: server.complete(prompts, 8))
    assert counted['lynx_steps_total{outcome="acted"}'] > 0
    assert counted["lynx_experts_loaded_total"] < counted["lynx_experts_routed_total"]


def test_settings_of_the_environment_are_in_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that workers have them that do not inherit the environment, and what was compiled for others is not taken."""
    from vllm.engine.arg_utils import EngineArgs

    def made() -> Any:
        return EngineArgs(model=reference_moe(), enforce_eager=True, max_model_len=256).create_engine_config()

    untouched = made()
    monkeypatch.setenv("LYNX_SELECTOR", os.path.relpath(SELECTOR))
    monkeypatch.setenv("LYNX_BUDGET", str(BUDGET))
    config = made()
    assert untouched.additional_config == {}
    assert config.additional_config["lynx"]["selector"] == str(SELECTOR)
    assert config.additional_config["lynx"]["budget"] == BUDGET
    assert config.compute_hash() != untouched.compute_hash()


def test_the_last_line_of_a_server_says_why(tmp_path: Path) -> None:
    """Also of what only a worker can know."""
    words = [*command(free_port(), other_routers(tmp_path / "other")), "--max-model-len", "256"]
    said = refused(tmp_path, [*words, "--kv-cache-memory-bytes", "100000000"])
    assert "this model differs in its routers" in said.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What engines with other settings did: `tokens` or `error`; and under `log` what they wrote."""
    folder = tmp_path_factory.mktemp("cases")
    asked = {"LYNX_SELECTOR": str(SELECTOR), "LYNX_BUDGET": str(BUDGET)}
    engine = {**SETTINGS, "model": reference_moe(), "enforce_eager": True}
    other = {**engine, "model": str(other_routers(folder / "other"))}
    config = {"selector": str(SELECTOR), "budget": BUDGET}
    planned = [
        ("not asked", {}, engine),
        ("budget 0", {**asked, "LYNX_BUDGET": "0"}, engine),
        ("environment", asked, engine),
        ("additional config", {}, {**engine, "additional_config": {"lynx": config}}),
        ("unknown key", {}, {**engine, "additional_config": {"lynx": {**config, "bugdet": 1}}}),
        ("not calibrated", {**asked, "LYNX_BUDGET": "0.02"}, engine),
        ("no such selector", {**asked, "LYNX_SELECTOR": "nowhere"}, engine),
        ("other model", asked, other),
        ("other experts", asked, {**engine, "model": str(other_experts(folder / "experts"))}),
        ("other weights", asked, engine),
        ("other model, warn", {**asked, "LYNX_ON_UNSUPPORTED": "warn"}, other),
        ("LoRA", asked, {**engine, "enable_lora": True}),
        ("dense model", asked, {**engine, "model": str(dense_model(folder / "dense"))}),
        ("other shape", asked, {**engine, "model": str(other_shape(folder / "shape"))}),
        # Last: after it no other engine starts in the same process.
        ("speculative decoding", asked, {**engine, "speculative_config": SPECULATION}),
    ]
    listed = [{"name": name, "environment": own, "engine": options} for name, own, options in planned]
    next(one for one in listed if one["name"] == "other weights")["reload"] = other["model"]
    results, log = run_cases(folder, listed)
    return {**{result["name"]: result for result in results}, "log": {"text": log}}


def small_model(folder: Path, kind: str, **sizes: Any) -> Path:
    """A tiny random model with the reference MoE's tokenizer."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, **sizes},
    )
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(reference_moe()).save_pretrained(folder)
    return folder


def dense_model(folder: Path) -> Path:
    return small_model(folder, "Qwen3")


def other_shape(folder: Path) -> Path:
    return small_model(folder, "Qwen3Moe", num_experts=16, num_experts_per_tok=2, moe_intermediate_size=64)


def other_routers(folder: Path) -> Path:
    """The reference MoE with one number of one router changed."""
    return changed(folder, "model.layers.3.mlp.gate.weight", lambda value: value[0, 0].add_(0.5))


def other_experts(folder: Path) -> Path:
    """With the same routers, as a short fine-tuning leaves them."""
    return changed(folder, "model.layers.3.mlp.experts.", lambda value: value.mul_(1.01))


def changed(folder: Path, part: str, change: Callable[[torch.Tensor], Any]) -> Path:
    """The reference MoE with all tensors of which `part` is in the name changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(reference_moe(), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if part in name:
            change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_engine_in_this_process(cases: dict[str, dict[str, Any]]) -> None:
    plain = cases["not asked"]["tokens"]
    assert cases["budget 0"]["tokens"] == plain
    assert cases["environment"]["tokens"] != plain
    assert cases["additional config"]["tokens"] == cases["environment"]["tokens"]


def refusals() -> list[tuple[str, str]]:
    """Cases and their lines from the page."""
    page = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    return re.findall(r"^\| ([\w ]+) \| `lynx-learn: (.+)` \|$", page, flags=re.M)


@pytest.mark.parametrize(("name", "line"), refusals())
def test_refused_at_start(cases: dict[str, dict[str, Any]], name: str, line: str) -> None:
    kind, found = cases[name]["error"].split(": ", 1)
    told, _, mend = found.partition("\n")
    assert re.fullmatch(re.escape(line).replace("…", ".+"), told)
    assert kind == "UnsupportedError"
    assert not mend or mend.startswith(("this works:\n", "with what an option can mend:\n"))


def test_every_refusal_is_on_the_page(cases: dict[str, dict[str, Any]]) -> None:
    assert {name for name, case in cases.items() if "error" in case} == {name for name, _ in refusals()}


def test_warned_and_served_untouched(cases: dict[str, dict[str, Any]]) -> None:
    assert "tokens" in cases["other model, warn"]
    assert cases["log"]["text"].count("lynx-learn serves untouched: the selector was trained for") == 1
