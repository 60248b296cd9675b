"""The shipped model as a web worker uses it: requests in threads, and transformers' continuous batching.

A few requests for each thread; `LYNX_REQUESTS=100` asks a hundred.
"""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_hooks import in_threads
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.decode.simulate import simulated_logits
from lynx_learn.decode.tally import Stats
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.loading import reference_moe
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.traces.groups import decode_groups

ROOT = Path(__file__).parents[1]
BUDGET = 0.01
ROWS, PROMPT, NEW, PAD = 16, 32, 24, 1
THREADS, REQUESTS = 8, int(os.environ.get("LYNX_REQUESTS", "3"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(reference_moe(), dtype=torch.float32).eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def selector() -> LynxSelector:
    return LynxSelector.from_pretrained(str(ROOT / "selectors" / "reference-moe"))


def prompts(count: int, seed: int) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(reference_moe())
    return decode_groups("python-stdlib", tokenizer, "test", count, PROMPT, 1, seed, fewest=1)[0][0]


def generate(model: PreTrainedModel, rows: Tensor, new: int = NEW) -> Tensor:
    """New tokens `(sequences, new)`."""
    lengths = {"max_new_tokens": new, "min_new_tokens": new}
    mask = torch.ones_like(rows)
    out = model.generate(rows, attention_mask=mask, do_sample=False, pad_token_id=PAD, **lengths)  # type: ignore[operator]
    return out[:, PROMPT:]


def generate_packed(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """The same by continuous batching."""
    room = ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=2 * ROWS * PROMPT)
    how = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    out = model.generate_batch(rows.tolist(), how, continuous_batching_config=room)
    found = {tuple(one.prompt_ids): one.generated_tokens for one in out.values()}
    return torch.tensor([found[tuple(row)] for row in rows.tolist()])


class Served(NamedTuple):
    tokens: Tensor
    logits: Tensor
    stats: Stats | None


def served(model: PreTrainedModel, rows: Tensor, selector: LynxSelector | None, packed: bool) -> Served:
    """New tokens, the logits `(sequences, NEW, vocabulary)` that they were taken from, and what skipping did."""
    seen: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.reshape(ROWS, -1)))
    try:
        with nullcontext() if selector is None else skip_experts(model, selector, BUDGET) as skipping:
            tokens = generate_packed(model, rows) if packed else generate(model, rows)
    finally:
        hook.remove()
    logits = torch.stack(seen, dim=1)
    # Continuous batching has an order of its own: each request's logits are those whose likeliest tokens it was given.
    order = [next(p for p in range(ROWS) if torch.equal(logits[p].argmax(-1), tokens[row])) for row in range(ROWS)]
    return Served(tokens, logits[order], skipping and skipping.stats)


def test_requests_in_threads_get_the_text_that_they_get_alone(model: PreTrainedModel, selector: LynxSelector) -> None:
    asked = [prompts(3, seed) for seed in range(THREADS)]
    with skip_experts(model, selector, budget=0.03):
        alone = [generate(model, rows, 16) for rows in asked]
        work = [lambda rows=rows: [generate(model, rows, 16) for _ in range(REQUESTS)] for rows in asked]
        found, errors = in_threads(work)
    assert not errors
    assert all(torch.equal(text, wanted) for texts, wanted in zip(found, alone, strict=True) for text in texts)
    assert sum(map(len, found)) == THREADS * REQUESTS


@torch.no_grad()
def test_continuous_batching_skips_and_loses_what_generate_does(
    model: PreTrainedModel, selector: LynxSelector, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = prompts(ROWS, seed=20)
    untouched = served(model, rows, None, packed=True)
    assert torch.equal(untouched.tokens, served(model, rows, None, packed=False).tokens)
    found = {}
    for packed in (False, True):
        ran = served(model, rows, selector, packed)
        text = torch.cat([rows, ran.tokens[:, :-1]], dim=1)
        plain = simulated_logits(model, find_moe_layers(model), text, None, PROMPT)[0].log_softmax(-1)
        skipped = ran.logits[:, 1:].log_softmax(-1)
        kl = (plain.exp() * (plain - skipped)).sum(-1).mean().item()
        found[packed] = (ran, kl)
        with capsys.disabled():
            print(f"\n{'continuous batching' if packed else 'generate'}: KL {kl:.5f} at budget {BUDGET}, {ran.stats}")
    (alone, loss), (together, packed_loss) = found[False], found[True]
    assert torch.equal(alone.tokens, together.tokens)
    assert alone.stats is not None
    assert together.stats is not None
    assert together.stats.experts_after == alone.stats.experts_after
    assert sum(together.stats.experts_after) < 0.8 * sum(together.stats.experts_before)
    assert loss > 1e-4
    assert packed_loss == pytest.approx(loss, rel=1e-3)
