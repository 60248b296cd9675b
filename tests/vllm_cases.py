"""Engines of vLLM started one after the other in one process, each under other settings; prints one JSON line each.

A test runs this as a script: `python vllm_cases.py CASES`, with CASES a JSON list of {name, environment, engine}.
"""

import json
import os
import sys
from typing import Any

PROMPTS = ["def main():", "Question: Ann has 3 apples", "It was a dark", "import os\n"] * 4


def run(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    own: dict[str, str] = case["environment"]
    os.environ.update(own)
    try:
        engine = LLM(**case["engine"])
        outputs = engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    except Exception as error:  # what a user sees last
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        engine = None
        cleanup_dist_env_and_memory()
        for key in own:
            del os.environ[key]


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this very process
    for case in json.loads(sys.argv[1]):
        print(json.dumps({"name": case["name"], **run(case)}), flush=True)
