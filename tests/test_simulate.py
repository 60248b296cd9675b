"""A simulated decode is the real one, and its losses are what they say."""

import math
from collections.abc import Iterator

import pytest
import torch
from tiny import FAMILIES, VOCAB, decode, random_selector, tiny_model, words
from transformers import PreTrainedModel

from lynx_learn.decode import simulate
from lynx_learn.decode.runtime import act_on_one, skip_experts
from lynx_learn.decode.simulate import METRICS, Reference, Run, Simulation, compare, simulated_logits, stacked_logits
from lynx_learn.decode.tally import Tally
from lynx_learn.moe.decision import Policy
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.hooks import intercept
from lynx_learn.rules.keep_sets import Random, XShare
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
def test_drafts_decide_with_the_token_that_they_follow(name: str) -> None:
    """As in a decode with a cache whose every call brings several tokens of each sequence."""
    model, together = tiny_model(name), 3
    policy, tokens = policies(model)["learned, by batch size"], words(5, PROMPT + 3 * together)
    layers = find_moe_layers(model)
    policy.bind(layers)
    (found,) = stacked_logits(model, layers, [Run(tokens, policy)], PROMPT, together)
    tally, calls = Tally(layers, policy), []
    with torch.no_grad():
        cache = model(input_ids=tokens[:, :PROMPT], use_cache=True).past_key_values
        with intercept(model, layers, lambda layer, routing: act_on_one(policy, layer, routing, tally)):
            for i in range(PROMPT, tokens.shape[1], together):
                calls.append(model(input_ids=tokens[:, i : i + together], past_key_values=cache).logits)
    torch.testing.assert_close(found[0], torch.cat(calls, dim=1), rtol=1e-4, atol=1e-4)
    alone, _ = simulated_logits(model, layers, tokens, policy, PROMPT)
    assert not torch.allclose(found[0], alone, atol=1e-2)
    assert found[1].steps == 3
    assert found[1].experts_after == pytest.approx(tally.stats().experts_after)


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
    reference = Reference(base, targets)
    found = reference.losses(other)
    for row in range(3):
        wanted = [0.0, 0.0, 0.0]
        for at in range(4):
            p, q = base[row, at].softmax(0).tolist(), other[row, at].softmax(0).tolist()
            target = int(targets[row, at])
            wanted[0] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            wanted[1] += math.log(p[target] / q[target])
            wanted[2] += p.index(max(p)) != q.index(max(q))
        assert found.sums[row].tolist() == pytest.approx(wanted, abs=1e-5)


def test_compare_scores_each_policy_against_untouched() -> None:
    model = tiny_model("qwen2_moe")
    selector = random_selector(model)
    layers = find_moe_layers(model)
    groups = [(words(3, 8, seed=1), ["code", "prose", "code"]), (words(3, 8, seed=2), ["prose", "math", "code"])]
    policy = selector.at_threshold(2.0)
    nothing, some = compare(model, layers, groups, [selector.at_threshold(0.0), policy], PROMPT)
    assert nothing.sums.abs().max() < 1e-5
    assert nothing.mean_stats()["experts"] == nothing.mean_stats()["experts_before"]
    base, other = (simulated_logits(model, layers, groups[1][0], p, PROMPT)[0] for p in (None, policy))
    wanted = Reference(base[:, :-1], groups[1][0][:, PROMPT + 1 :]).losses(other[:, :-1])
    torch.testing.assert_close(some.sums[1], wanted.sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(some.part_sums.sum(1), some.sums.sum(1))
    assert some.mean("kl") > 0.01
    assert some.sums.shape == (2, 3, len(METRICS))
    assert base.shape[-1] == VOCAB
    assert some.tokens == 2 * 3 * 3
    kl = some.sums[:, :, 0] / 3
    assert some.group_means("kl").tolist() == pytest.approx(kl.mean(1).tolist())
    assert some.by_source("kl") == pytest.approx(
        {
            "code": float(kl[0, 0] + kl[0, 2] + kl[1, 2]) / 3,
            "math": float(kl[1, 1]),
            "prose": float(kl[0, 1] + kl[1, 0]) / 2,
        }
    )
    assert some.mean_stats()["experts"] < some.mean_stats()["experts_before"]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_runs_that_share_a_pass_do_not_share_a_batch(name: str) -> None:
    """As in passes of their own: other groups, thresholds and rules beside them, and the untouched model, change nothing."""
    model = tiny_model(name)
    layers = find_moe_layers(model)
    every: list[Policy | None] = [None, *policies(model).values(), random_selector(model).at_threshold(0.0)]
    for policy in every[1:]:
        policy.bind(layers)  # type: ignore[union-attr]
    runs = [Run(words(size, 11, seed=size), policy) for policy in every for size in (5, 2)]
    for run, (logits, stats) in zip(runs, stacked_logits(model, layers, runs, PROMPT), strict=True):
        own, counted = simulated_logits(model, layers, run.tokens, run.policy, PROMPT)
        torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-5)  # products of other sizes round otherwise
        assert stats == counted


def test_a_comparison_is_that_of_one_group_and_policy_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_moe")
    selector, layers = random_selector(model), find_moe_layers(model)
    groups = [(words(3, positions, seed), [""] * 3) for seed, positions in enumerate((9, 9, 9, 7))]
    passes: list[int] = []

    def seeing(model: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        passes.append(kwargs["input_ids"].numel())

    def measured(groups: list[tuple[torch.Tensor, list[str]]]) -> list[torch.Tensor]:
        rules: list[Policy] = [*(selector.at_threshold(tau) for tau in (0.5, 2.0)), XShare(4), Random(4, seed=1)]
        found = compare(model, layers, groups[:3], rules, PROMPT)
        found += compare(model, layers, groups[3:4], rules[:1], PROMPT)
        return [result.sums for result in found]

    model.register_forward_pre_hook(seeing, with_kwargs=True)
    monkeypatch.setattr(simulate, "TOKENS_AT_A_TIME", 1)
    alone = measured(groups)
    assert max(passes) == 27
    assert len(passes) == 3 * 5 + 2
    lengths = list(passes)
    passes.clear()
    monkeypatch.setattr(simulate, "TOKENS_AT_A_TIME", 60)
    for one, other in zip(alone, measured(groups), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert max(passes) == 54
    assert len(passes) < len(lengths)
    assert sum(passes) == sum(lengths)


def test_what_the_untouched_model_says_is_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    layers, selector = find_moe_layers(model), random_selector(model)
    groups = [(words(2, 9, seed=seed), ["", ""]) for seed in range(4)]
    monkeypatch.setattr(simulate, "TOKENS_AT_A_TIME", 18)
    passes: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda *call: passes.append(call[2]["input_ids"]), with_kwargs=True)

    def measured(simulation: Simulation, threshold: float) -> torch.Tensor:
        passes.clear()
        return simulation.compare(groups, [selector.at_threshold(threshold)])[0].sums

    roomy = Simulation(model, layers, PROMPT)
    first = measured(roomy, 1.0)
    assert len(passes) == 8
    assert torch.equal(measured(roomy, 1.0), first)
    assert len(passes) == 4  # the policy's own
    monkeypatch.setattr(simulate, "KEPT_BYTES", 2 * 2 * 4 * VOCAB * 4)  # two groups of two times four scored tokens
    tight = Simulation(model, layers, PROMPT)
    assert torch.equal(measured(tight, 1.0), first)
    assert len(tight.kept) == 2
    measured(tight, 1.0)
    assert len(passes) == 8


def test_runs_are_measured_when_they_are_asked_for() -> None:
    model = tiny_model("mixtral")
    layers, policy = find_moe_layers(model), XShare(4)
    policy.bind(layers)
    drawn: list[int] = []

    def runs() -> Iterator[Run]:
        for number in range(5):
            drawn.append(number)
            yield Run(words(16, 128), policy)

    results = Simulation(model, layers, PROMPT).losses(runs())
    next(results)
    assert drawn == [0]
