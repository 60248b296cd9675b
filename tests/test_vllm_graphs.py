"""Skipping in the graphs that vLLM compiles, on both of its model runners, against engines without graphs and without skipping."""

from pathlib import Path
from typing import Any

import pytest
from vllm_cases import run_cases

from lynx_learn.integrations.vllm.metrics import AUDIT
from lynx_learn.moe.loading import reference_moe

pytest.importorskip("vllm", reason="needs an environment with vLLM: .ci/vllm makes one")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
NEW = 12
OFF, ON, MIXED = [{"lynx": False}], [None], [None, {"lynx": 0.003}, {"lynx": 0.03}, {"lynx": False}]
KEPT = 3  # of MIXED, the one that keeps everything
ENGINE: dict[str, Any] = {
    "model": reference_moe(),
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 50_000_000,
    "enable_prefix_caching": False,
}
SKIPPING: dict[str, Any] = {
    **ENGINE,
    "additional_config": {"lynx": {"selector": str(ROOT / "selectors" / "reference-moe"), "budget": 0.01}},
}
AUDITED: dict[str, Any] = {
    **SKIPPING,
    "additional_config": {"lynx": {**SKIPPING["additional_config"]["lynx"], "audit_every": 3}},
}
# Passes of an engine that is audited in the last two of them.
PASSES, AUDITS = [OFF, ON, MIXED, OFF, ON, MIXED], [0, 0, 0, 0, 3, 1]
# Kernels are interpreted there, and Dynamo's graph is run as it is.
SECOND = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_CPU_CI_ENV": "1"}


def run(
    folder: Path,
    cases: list[tuple[str, dict[str, Any], list[Any]]],
    cuda_graphs: bool = False,
    audits: list[int] | None = None,
    **own: str,
) -> dict[str, list[Any]]:
    """What each pass of each case gave."""
    sampling = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "logprobs": 20}
    planned = [
        {
            "name": name,
            "environment": {},
            "engine": engine,
            "passes": passes,
            "sampling": sampling,
            "cuda_graphs": cuda_graphs,
            **({"audits": audits} if audits is not None and "audit_every" in str(engine) else {}),
        }
        for name, engine, passes in cases
    ]
    caches = {"VLLM_CACHE_ROOT": str(folder / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    found = {}
    for result in run_cases(folder, planned, **caches, **own)[0]:
        assert "error" not in result, result["error"]
        print(f"{result['name']}: engine started in {result['start']:.1f} s")
        found[result["name"]] = result["passes"]
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    cases = [
        ("eager", {**SKIPPING, "enforce_eager": True}, [ON, MIXED]),
        ("untouched", ENGINE, [ON]),
        ("skipping", AUDITED, PASSES),
    ]
    return run(tmp_path_factory.mktemp("first"), cases, audits=AUDITS)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    cases = [("untouched", ENGINE, [ON]), ("skipping", AUDITED, PASSES)]
    return run(tmp_path_factory.mktemp("second"), cases, audits=AUDITS, **SECOND)


@pytest.fixture(params=["first", "second"])
def runner(request: pytest.FixtureRequest) -> dict[str, list[Any]]:
    return request.getfixturevalue(request.param)


def distance(a: Any, b: Any, rows: range) -> float:
    """The largest difference of two log-probabilities."""
    pairs = [(x, y) for row in rows for x, y in zip(a["logprobs"][row], b["logprobs"][row], strict=True)]
    return max(abs(x[token] - y[token]) for x, y in pairs for token in x.keys() & y.keys())


def test_switched_off_is_the_untouched_graph_to_the_last_bit(runner: dict[str, list[Any]]) -> None:
    """Also after requests that skipped."""
    (wanted,) = runner["untouched"]
    before, on, _, after, *_ = runner["skipping"]
    for part in ("tokens", "logprobs"):
        assert before[part] == after[part] == wanted[part]
    assert on["logprobs"] != wanted["logprobs"]
    assert before["counted"]["acted"] == 0


def test_counts_what_is_counted_without_graphs(first: dict[str, list[Any]], runner: dict[str, list[Any]]) -> None:
    """Also of requests that ask for other budgets, side by side in one graph."""
    (on, mixed), (_, compiled_on, compiled_mixed, *_) = first["eager"], runner["skipping"]
    for wanted, found in ((on, compiled_on), (mixed, compiled_mixed)):
        rows = range(len(wanted["tokens"]))
        print(f"{distance(wanted, found, rows):.2g} off, {found['counted']}")
        assert found["counted"] == wanted["counted"]
        assert found["tokens"] == wanted["tokens"]
        assert distance(wanted, found, rows) < 1e-4
        assert found["counted"]["experts_loaded"] < found["counted"]["experts_routed"]
    assert mixed["counted"]["experts_loaded"] > on["counted"]["experts_loaded"]


def test_who_keeps_everything_is_as_untouched_among_levels(runner: dict[str, list[Any]]) -> None:
    (wanted,), mixed = runner["untouched"], runner["skipping"][2]
    kept = range(KEPT, len(wanted["tokens"]), len(MIXED))
    assert all(mixed["tokens"][row] == wanted["tokens"][row] for row in kept)
    assert distance(wanted, mixed, kept) < 1e-4
    assert distance(wanted, mixed, range(1)) > 1e-2


def test_an_audit_changes_nothing(runner: dict[str, list[Any]]) -> None:
    """Of what is served, to the last bit, and of what is counted otherwise."""
    plain, audited = runner["skipping"][1:3], runner["skipping"][4:]
    for wanted, found in zip(plain, audited, strict=True):
        assert found["tokens"] == wanted["tokens"]
        assert found["logprobs"] == wanted["logprobs"]
        for part, count in wanted["counted"].items():
            assert count == (0 if part in AUDIT else found["counted"][part])
    # Every third step of all rows, every step of those that ask for the server's budget.
    rows = len(plain[0]["tokens"])
    each = [sum(one["counted"][name] for name in AUDIT[:-1]) for one in audited]
    steps = [one["counted"]["acted"] for one in audited]
    before = int(sum(one["counted"]["acted"] for one in plain))
    assert each == [rows * sum(not i % 3 for i in range(before, before + int(steps[0]))), rows // len(MIXED) * steps[1]]
    mean = [one["counted"][AUDIT[-1]] / count for one, count in zip(audited, each, strict=True)]
    print(f"audited: {each} tokens, mean KL {mean}")
    assert 1e-4 < mean[0] < 0.1


def test_nothing_is_compiled_again(runner: dict[str, list[Any]]) -> None:
    """Whatever requests ask for, and whether a step is audited."""
    graphs = [one["graphs"] for one in runner["skipping"]]
    assert graphs[0]["unique_graphs"] > 0
    assert all(found == graphs[0] for found in graphs)
