"""A simulated decode is the real one, and its losses are what they say."""

import math

import pytest
import torch
from tiny import FAMILIES, VOCAB, decode, random_selector, tiny_model, words
from transformers import PreTrainedModel

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.decode.simulate import METRICS, Reference, compare, simulated_logits
from lynx_learn.moe.decision import Policy
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.rules.keep_sets import XShare
from lynx_learn.selector.selector import ThresholdPolicy

PROMPT = 4


def policies(model: PreTrainedModel) -> dict[str, Policy]:
    selector = random_selector(model)
    return {
        "learned": selector.at_threshold(2.0),
        "learned, by batch size": ThresholdPolicy(selector, {2: 0.5, 4: 3.0, 16: 100.0}, "by size"),
        "xshare": XShare(4),
    }


@pytest.mark.parametrize("kind", ["learned", "learned, by batch size", "xshare"])
@pytest.mark.parametrize("name", FAMILIES)
def test_simulated_equals_real_decode(name: str, kind: str) -> None:
    model = tiny_model(name)
    policy = policies(model)[kind]
    tokens = words(5, 11)
    untouched = decode(model, tokens, PROMPT)[1]
    with skip_experts(model, policy) as skipping:
        real = decode(model, tokens, PROMPT)[1]
    simulated, stats = simulated_logits(model, skipping.layers, tokens, policy, PROMPT)
    torch.testing.assert_close(simulated, real, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(simulated, untouched, atol=1e-2)
    assert stats.steps == skipping.stats.steps == 7
    assert stats.experts_before[0] == skipping.stats.experts_before[0]
    assert stats.experts_after == pytest.approx(skipping.stats.experts_after)
    assert stats.bytes_ratio == pytest.approx(skipping.stats.bytes_ratio)
    assert stats.answered_share == pytest.approx(skipping.stats.answered_share)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_policy_nothing_changes(name: str) -> None:
    model = tiny_model(name)
    tokens = words(3, 9)
    logits, stats = simulated_logits(model, find_moe_layers(model), tokens, None, PROMPT)
    with torch.no_grad():
        assert torch.equal(logits, model(input_ids=tokens, use_cache=False).logits[:, PROMPT:])
    assert stats.experts_after == stats.experts_before
    assert stats.bytes_ratio == 1.0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_losses_equal_a_loop_over_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    base, other = 2 * torch.randn(2, 3, 4, 17, generator=generator)
    targets = torch.randint(0, 17, (3, 4), generator=generator)
    found = Reference(base, targets).losses(other)
    for row in range(3):
        wanted = [0.0, 0.0, 0.0]
        for at in range(4):
            p, q = base[row, at].softmax(0).tolist(), other[row, at].softmax(0).tolist()
            target = int(targets[row, at])
            wanted[0] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 4
            wanted[1] += math.log(p[target] / q[target]) / 4
            wanted[2] += (p.index(max(p)) != q.index(max(q))) / 4
        assert found[row].tolist() == pytest.approx(wanted, abs=1e-5)


def test_compare_scores_each_policy_against_untouched() -> None:
    model = tiny_model("qwen2_moe")
    selector = random_selector(model)
    layers = find_moe_layers(model)
    groups = [(words(3, 8, seed=1), ["code", "prose", "code"]), (words(3, 8, seed=2), ["prose", "math", "code"])]
    policy = selector.at_threshold(2.0)
    nothing, some = compare(model, layers, groups, [selector.at_threshold(0.0), policy], PROMPT)
    assert nothing.losses.abs().max() < 1e-5
    assert nothing.mean_stats()["experts"] == nothing.mean_stats()["experts_before"]
    base, other = (simulated_logits(model, layers, groups[1][0], p, PROMPT)[0] for p in (None, policy))
    wanted = Reference(base[:, :-1], groups[1][0][:, PROMPT + 1 :]).losses(other[:, :-1])
    torch.testing.assert_close(some.losses[1], wanted)
    assert some.mean("kl") > 0.01
    assert some.losses.shape == (2, 3, len(METRICS))
    assert base.shape[-1] == VOCAB
    assert some.tokens == 2 * 3 * 3
    kl = some.losses[:, :, 0]
    assert some.group_means("kl").tolist() == pytest.approx(kl.mean(1).tolist())
    assert some.by_source("kl") == pytest.approx(
        {
            "code": float(kl[0, 0] + kl[0, 2] + kl[1, 2]) / 3,
            "math": float(kl[1, 1]),
            "prose": float(kl[0, 1] + kl[1, 0]) / 2,
        }
    )
    assert some.mean_stats()["experts"] < some.mean_stats()["experts_before"]
