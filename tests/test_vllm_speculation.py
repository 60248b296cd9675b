"""Skipping where vLLM verifies several tokens of a request at once: with n-grams and with a model that drafts."""

from typing import Any

import pytest
from test_vllm_graphs import AUDITED, AUDITS, ENGINE, KEPT, MIXED, NEW, ON, PASSES, distance, run

from lynx_learn.integrations.vllm.metrics import ASKED, AUDIT, TOKENS
from lynx_learn.moe.loading import reference_moe

pytest.importorskip("vllm", reason="needs an environment with vLLM: .ci/vllm makes one")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DRAFTS, TOP_K, LAYERS = 2, 4, 6
KINDS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1},
    # One that is always right, as long as nothing is skipped.
    "draft_model": {"method": "draft_model", "model": reference_moe()},
}


def speculating(engine: dict[str, Any], kind: str) -> dict[str, Any]:
    return {**engine, "speculative_config": {**KINDS[kind], "num_speculative_tokens": DRAFTS}}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Engines that speculate: an untouched one, and one of each kind that skips."""
    first = [
        ("draft_model", speculating(AUDITED, "draft_model"), PASSES),
        ("untouched", speculating(ENGINE, "ngram"), [ON]),
    ]
    # In another process: where vLLM has looked for n-grams, no other engine starts.
    second = [("ngram", speculating(AUDITED, "ngram"), PASSES)]
    return {
        name: passes
        for number, cases in enumerate((first, second))
        for name, passes in run(tmp_path_factory.mktemp(str(number)), cases, audits=AUDITS, VLLM_CPU_CI_ENV="1").items()
    }


@pytest.fixture(params=[*KINDS])
def skipping(request: pytest.FixtureRequest, ran: dict[str, list[Any]]) -> list[Any]:
    return ran[request.param]


def test_switched_off_is_the_untouched_engine_to_the_last_bit(ran: dict[str, list[Any]]) -> None:
    """Also after requests that skipped."""
    (wanted,) = ran["untouched"]
    before, on, _, after, *_ = ran["ngram"]
    for part in ("tokens", "logprobs"):
        assert before[part] == after[part] == wanted[part]
    assert on["logprobs"] != wanted["logprobs"]


def test_with_everything_kept_all_drafts_of_the_same_model_are_taken(ran: dict[str, list[Any]]) -> None:
    """So nothing of what drafts is touched; and what is served is what n-grams lead to, before and after skipping."""
    (wanted,) = ran["untouched"]
    before, _, _, after, *_ = ran["draft_model"]
    for found in (before, after):
        assert found["counted"]["opted_out"] == -(-(NEW - 1) // (1 + DRAFTS))
        assert found["tokens"] == wanted["tokens"]
        assert distance(wanted, found, range(len(wanted["tokens"]))) < 1e-4


def test_drafts_are_rows_that_skip(skipping: list[Any]) -> None:
    """All rows of the steps acted on are decided for, the drafts among them."""
    for place, asked in enumerate((None, ASKED[:1], ASKED)):
        counted = skipping[place]["counted"]
        rows = sum(counted[TOKENS + name] for name in ASKED)
        assert rows > len(skipping[place]["tokens"]) * (NEW - 1)
        if asked is None:
            assert not counted["acted"]
            assert rows == counted[TOKENS + "opted_out"]
            continue
        assert not counted["mixed"] + counted["opted_out"] + counted["below_smallest_size"]
        assert all((counted[TOKENS + name] > 0) is (name in asked) for name in ASKED)
        assert counted["assignments"] == rows * TOP_K * LAYERS
        assert counted["experts_loaded"] < 0.85 * counted["experts_routed"]


def test_who_keeps_everything_is_as_untouched_among_levels(ran: dict[str, list[Any]], skipping: list[Any]) -> None:
    (wanted,), mixed = ran["untouched"], skipping[2]
    kept = range(KEPT, len(wanted["tokens"]), len(MIXED))
    assert all(mixed["tokens"][row] == wanted["tokens"][row] for row in kept)
    assert distance(wanted, mixed, kept) < 1e-4
    assert distance(wanted, mixed, range(1)) > 1e-2


def test_an_audit_changes_nothing_and_compares_one_row_of_each_request(skipping: list[Any]) -> None:
    for wanted, found in zip(skipping[1:3], skipping[4:], strict=True):
        assert found["tokens"] == wanted["tokens"]
        assert found["logprobs"] == wanted["logprobs"]
    counted = skipping[5]["counted"]  # every step is audited
    tokens = sum(counted[name] for name in AUDIT[:-1])
    assert 0 < tokens <= counted["acted"] * len(wanted["tokens"]) // len(MIXED)
    assert tokens < counted[TOKENS + "budget"]
    print(f"audited KL {counted[AUDIT[-1]] / tokens:.4f} of {tokens:.0f} tokens")
    assert counted[AUDIT[-1]] / tokens < 0.1


def test_nothing_is_compiled_again(skipping: list[Any]) -> None:
    """Whatever is drafted and asked for."""
    graphs = [one["graphs"] for one in skipping]
    assert graphs[0]["unique_graphs"] > 0
    assert all(found == graphs[0] for found in graphs)
