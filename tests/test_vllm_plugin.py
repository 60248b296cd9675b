"""Requests as they come, and which blocks of the prefix cache they share: with vLLM's own requests, and no engine."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from lynx_learn.integrations.vllm import plugin

pytest.importorskip("vllm", reason="needs an environment with vLLM: .ci/vllm makes one")
pytestmark = pytest.mark.vllm

BLOCK, PROMPT, NEW = 4, 6, 10
TOKENS = list(range(100, 100 + PROMPT + NEW))
SKIPS, OUT = {}, {"lynx": False}


@pytest.fixture(params=[False, True], ids=["prompts", "generated"])
def make(request: pytest.FixtureRequest) -> Any:
    """Makes requests, with prompts alone shared or what was generated too."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    plugin.install()
    init_none_hash(sha256)
    hasher = partial(plugin._hash_blocks, get_request_block_hasher(BLOCK, sha256), request.param)

    def made(prompt: list[int], extra: dict[str, Any], own: Any = hasher) -> Request:
        sampling = SamplingParams(max_tokens=NEW, extra_args=extra)
        return Request("name", prompt, sampling, None, block_hasher=own)

    made.reuse = request.param  # type: ignore[attr-defined]
    made.plain = partial(made, own=get_request_block_hasher(BLOCK, sha256))  # type: ignore[attr-defined]
    return made


def served(make: Any, extra: dict[str, Any]) -> list[bytes]:
    """Names of the blocks of a request that has run to its end."""
    request = make(TOKENS[:PROMPT], extra)
    request.append_output_token_ids(TOKENS[PROMPT:])
    assert len(request.block_hashes) == len(TOKENS) // BLOCK
    return list(request.block_hashes)


def found(make: Any, extra: dict[str, Any], cached: list[bytes]) -> int:
    """How many blocks a second turn, whose prompt is all of the first, finds in the cache."""
    hashes = make(TOKENS, extra).block_hashes
    return sum(name in cached for name in hashes)


def test_what_was_generated_with_fewer_experts(make: Any) -> None:
    cached = served(make, SKIPS)
    assert found(make, SKIPS, cached) == (len(cached) if make.reuse else PROMPT // BLOCK)
    assert found(make, OUT, cached) == (0 if make.reuse else PROMPT // BLOCK)
    # The request itself finds all of it again.
    assert served(make, SKIPS) == cached


def test_what_was_generated_with_all_experts(make: Any) -> None:
    cached = served(make, OUT)
    assert found(make, OUT, cached) == len(cached)
    assert found(make, SKIPS, cached) == (0 if make.reuse else len(cached))


def test_a_session_that_goes_on(make: Any) -> None:
    """vLLM then counts what was generated as prompt, in blocks that were not full yet, too."""
    request = make(TOKENS[:PROMPT], SKIPS)
    request.append_output_token_ids(TOKENS[PROMPT : PROMPT + 1])
    request.num_prompt_tokens = len(TOKENS)
    request.append_output_token_ids(TOKENS[PROMPT + 1 :])
    assert found(make, OUT, list(request.block_hashes)) == (0 if make.reuse else PROMPT // BLOCK)


def test_without_settings_blocks_have_vllms_own_names(make: Any) -> None:
    wanted = served(make.plain, SKIPS)
    assert wanted == served(make.plain, OUT)
    if make.reuse:
        assert served(make, SKIPS) == wanted
    else:
        assert served(make, OUT) == wanted


@pytest.mark.parametrize("asked", [True, False])
def test_the_first_request_wraps_the_engines_hashing(asked: bool) -> None:
    settings = {"lynx": {"selector": "x", "budget": 0.01}} if asked else {}
    core = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=settings), request_block_hasher=len)
    for _ in range(2):
        plugin._add_request(lambda *_: None, core, None)
    assert (getattr(core.request_block_hasher, "args", None) == (len, False)) is asked
