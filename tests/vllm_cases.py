"""Engines of vLLM started one after the other in one process, each under other settings; writes one JSON line each.

A test has `run_cases` run this as a script, `python vllm_cases.py CASES RESULTS`, where the file CASES holds a JSON list of
{name, environment, engine}. A case may also have `prompts` (text or tokens), `sampling`, `architecture`, the class of the
model, `reload`, a model whose weights take the place of the loaded ones at the end, and `passes`: the prompts are then run
again and again, each time with other `extra_args` for the requests, given to them in turns; `audits`, for each pass how often it
is audited, in an engine that was told to audit; and `cuda_graphs`, to have them although they are refused.

With TRITON_INTERPRET=1 the kernels that vLLM's second model runner needs are interpreted, so that it runs on a CPU.
"""

import json
import logging
import os
import subprocess
import sys
import time
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LOGGER = "vllm.plugins.lynx_learn"
PROMPTS = ["def main():", "Question: Ann has 3 apples", "It was a dark", "import os\n"] * 4


def environment(**own: str) -> dict[str, str]:
    """What tests start processes with vLLM in: their own settings and none of the caller's."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LYNX_")}
    return {**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **own}


def run_cases(folder: Path, cases: list[dict[str, Any]], **own: str) -> tuple[list[dict[str, Any]], str]:
    """What came out of each case, in a process with the settings `own`; and all that was printed.

    Results come through a file: what workers print lands in the middle of a line.
    """
    listed, results = folder / "cases.json", folder / "results.jsonl"
    listed.write_text(json.dumps(cases), encoding="utf-8")
    results.touch()
    done = subprocess.run(
        [sys.executable, __file__, str(listed), str(results)],
        capture_output=True,
        text=True,
        timeout=1500,
        cwd=folder,
        env=environment(**own),
    )
    found = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert len(found) == len(cases), done.stdout[-2000:] + done.stderr[-4000:]
    return found, done.stdout + done.stderr


def run(case: dict[str, Any]) -> dict[str, Any]:
    from torch._dynamo.utils import counters
    from vllm import LLM, ModelRegistry, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from lynx_learn.integrations.vllm import metrics as vllm_metrics
    from lynx_learn.integrations.vllm.checks import reasons

    reasons.CUDA_GRAPHS_REFUSED = not case.get("cuda_graphs")
    own: dict[str, str] = case["environment"]
    os.environ.update(own)
    prompts = [part if isinstance(part, str) else {"prompt_token_ids": part} for part in case.get("prompts", PROMPTS)]
    sampling = SamplingParams(**case.get("sampling", {"temperature": 0, "max_tokens": 16}))
    if name := case.get("architecture"):
        # Looked at here; otherwise vLLM starts a process to look at each class that it has not seen on this machine.
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    said = Said()
    folder = os.environ.get(vllm_metrics.FOLDER)
    before = vllm_metrics.read_totals(Path(folder)) if folder else {}
    try:
        start = time.perf_counter()
        engine = LLM(**case["engine"])
        took = time.perf_counter() - start
        logging.getLogger(LOGGER).addHandler(said)  # only now: starting vLLM takes handlers off
        runs = []
        for number, extra in enumerate(case.get("passes", [[None]])):
            if "audits" in case:
                engine.collective_rpc(audit, args=(case["audits"][number],))
            each = [copy(sampling) for _ in prompts]
            for place, own_sampling in enumerate(each):
                own_sampling.extra_args = extra[place % len(extra)]
            start = time.perf_counter()
            outputs = [output.outputs[0] for output in engine.generate(prompts, each, use_tqdm=False)]
            seconds = time.perf_counter() - start
            engine.llm_engine.step()  # as a server goes on: with nothing left to run, and all that was run is counted
            after = vllm_metrics.read_totals(Path(os.environ[vllm_metrics.FOLDER]))
            one: dict[str, Any] = {
                "tokens": [list(output.token_ids) for output in outputs],
                "counted": {
                    name: count - before.get(name, 0)
                    for name, count in after.items()
                    if name not in vllm_metrics.GAUGES
                },
                "graphs": dict(counters["stats"]),
                "seconds": seconds,
            }
            if sampling.logprobs:
                one["logprobs"] = [
                    [{token: part.logprob for token, part in sorted(table.items())} for table in output.logprobs]
                    for output in outputs
                ]
            runs.append(one)
            before = after
        result: dict[str, Any] = {
            **(runs[0] if "passes" not in case else {"passes": runs}),
            "said": said.lines,
            "start": took,
        }
        if "reload" in case:
            engine.collective_rpc("reload_weights", kwargs={"weights_path": case["reload"]})
        return result
    except Exception as error:  # what a user sees last
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        engine = None
        logging.getLogger(LOGGER).removeHandler(said)
        cleanup_dist_env_and_memory()
        for key in own:
            del os.environ[key]


def audit(worker: Any, every: int) -> None:
    worker.model_runner.lynx_learn.audit.every = every


class Said(logging.Handler):
    """Keeps what the plugin logs in this process."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "lynx-learn" in (text := record.getMessage()):
            self.lines.append(text)


def interpret() -> None:
    """Have vLLM take Triton's interpreter for a device of Triton's."""
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))


def name_device() -> None:
    """Have vLLM place workers on a CPU through Ray, which it does for devices alone: by what Ray takes for one."""
    from vllm.platforms.interface import Platform

    Platform.ray_device_key = "GPU"


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpret()
    if "RAY_ADDRESS" in os.environ:
        name_device()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this very process
    with open(sys.argv[2], "a", encoding="utf-8") as results:
        for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
            print(json.dumps({"name": case["name"], **run(case)}), file=results, flush=True)
