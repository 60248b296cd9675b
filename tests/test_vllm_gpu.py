"""Skipping in CUDA graphs. They are refused until these have passed on a GPU: `pytest -m gpu tests/test_vllm_gpu.py -s` in vLLM's environment.

`-s` shows the seconds of each pass: with every request opted out, and skipping, beside the engine that nothing is attached to.
"""

from typing import Any

import pytest
import torch
from test_vllm_graphs import ENGINE, MIXED, OFF, ON, SKIPPING, distance, run

pytest.importorskip("vllm", reason="needs an environment with vLLM: .ci/vllm-env makes one")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GRAPHS: dict[str, Any] = {
    "attention_backend": "TRITON_ATTN",  # one that takes float32, so that rounding leaves decisions alone
    "kv_cache_memory_bytes": 1_000_000_000,
    "gpu_memory_utilization": 0.2,  # of the whole device, which others may be using
    "moe_backend": "triton",
    "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]},
}

# Products of float32 in float32, and no kernel chosen by timing: engines then differ in what is asked of them alone.
EXACT = {"TRITON_F32_DEFAULT": "ieee", "TORCHINDUCTOR_DETERMINISTIC": "1"}


@pytest.fixture(scope="module", params=["0", "1"], ids=["first", "second"])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Engines on both of vLLM's model runners; the first pass of each warms up."""
    cases = [
        ("eager", {**SKIPPING, **GRAPHS, "compilation_config": {}, "enforce_eager": True}, [ON, ON, MIXED]),
        ("untouched", {**ENGINE, **GRAPHS}, [ON, ON]),
        ("skipping", {**SKIPPING, **GRAPHS}, [OFF, OFF, ON, MIXED, OFF]),
    ]
    folder = tmp_path_factory.mktemp("graphs")
    return run(folder, cases, cuda_graphs=True, VLLM_USE_V2_MODEL_RUNNER=request.param, **EXACT)


def test_all_opted_out_is_the_untouched_engine_to_the_last_bit(ran: dict[str, list[Any]]) -> None:
    """Before skipping, and after it in the same graphs."""
    wanted = ran["untouched"][-1]
    for place in (1, -1):
        assert ran["skipping"][place]["logprobs"] == wanted["logprobs"]


def test_what_is_written_between_replays_acts_as_without_graphs(ran: dict[str, list[Any]]) -> None:
    for place, graphs in ((1, 2), (2, 3)):
        wanted, found = ran["eager"][place], ran["skipping"][graphs]
        assert found["counted"] == wanted["counted"]
        assert distance(wanted, found, range(len(wanted["tokens"]))) < 1e-2
        assert found["counted"]["experts_loaded"] < found["counted"]["experts_routed"]


def test_nothing_is_captured_or_compiled_again(ran: dict[str, list[Any]]) -> None:
    graphs = [one["graphs"] for one in ran["skipping"]]
    assert all(found == graphs[0] for found in graphs)
    for name, passes in ran.items():
        print(name, [f"{one['seconds']:.3f} s" for one in passes])
