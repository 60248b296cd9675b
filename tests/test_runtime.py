"""Skipping in transformers: what it leaves alone, what it changes, and that it goes away without a trace."""

import warnings

import pytest
import torch
from tiny import EXPERTS, FAMILIES, PAD, TOP_K, Seen, decode, random_selector, tiny_model, watching, words
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, StaticCache

from lynx_learn.decode.runtime import act, skip_experts
from lynx_learn.decode.tally import Tally
from lynx_learn.errors import ModelError, OptionError, SelectorError
from lynx_learn.moe.decision import Policy, Routing
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.rules.keep_sets import XShare
from lynx_learn.selector.selector import LynxSelector, ThresholdPolicy
from lynx_learn.selector.surrogates import Surrogates

EVERYTHING = 1e9  # a threshold no cost reaches
SOME = 2.0  # costs of typical assignments are around 1
PROMPT, LENGTH = 6, 11
SMALL, LARGE = 5, 10


def padded_batch(rows: int = SMALL) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask `(rows, LENGTH)`; the first two rows are padded on the left."""
    tokens, mask = words(rows, LENGTH), torch.ones(rows, LENGTH, dtype=torch.long)
    for row, missing in enumerate((3, 1)):
        tokens[row, :missing], mask[row, :missing] = PAD, 0
    return tokens, mask


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def all_hooked_are_bare(model: nn.Module, layers: list[MoeLayer]) -> bool:
    """Nothing left on the very modules that are hooked, nor anywhere else."""
    own = [model, *(m for layer in layers for m in (layer.router, layer.experts))]
    return not any(m._forward_hooks or m._forward_pre_hooks for m in own) and hooks(model) == 0


def own_surrogates(selector: LynxSelector, seen: Seen) -> Surrogates:
    return selector.layers[seen.layer.index].surrogates  # type: ignore[union-attr,return-value]


@pytest.mark.parametrize("name", FAMILIES)
def test_budget_zero_and_detached_are_bit_identical(name: str) -> None:
    model = tiny_model(name)
    selector = random_selector(model)
    tokens, mask = padded_batch()
    untouched = decode(model, tokens, PROMPT, mask)
    with skip_experts(model, selector, budget=0) as skipping:
        assert all(torch.equal(a, b) for a, b in zip(decode(model, tokens, PROMPT, mask), untouched, strict=True))
    assert skipping.stats.steps == 0
    assert "no decode step" in str(skipping.stats)
    with skip_experts(model, selector.at_threshold(SOME)):
        assert not torch.equal(decode(model, tokens, PROMPT, mask)[1], untouched[1])
    assert all(torch.equal(a, b) for a, b in zip(decode(model, tokens, PROMPT, mask), untouched, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_below_the_smallest_size_are_bit_identical(name: str) -> None:
    model = tiny_model(name)
    tokens, mask = padded_batch()
    untouched = decode(model, tokens, PROMPT, mask)
    with skip_experts(model, ThresholdPolicy(random_selector(model), {6: EVERYTHING}, "")) as skipping:
        assert all(torch.equal(a, b) for a, b in zip(decode(model, tokens, PROMPT, mask), untouched, strict=True))
    assert skipping.stats.steps == LENGTH - PROMPT
    assert skipping.stats.experts_after == skipping.stats.experts_before
    assert skipping.stats.answered_share == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_is_untouched_and_not_counted(name: str) -> None:
    model = tiny_model(name)
    tokens, mask = padded_batch()
    first, steps = decode(model, tokens, PROMPT, mask)
    with skip_experts(model, random_selector(model).at_threshold(EVERYTHING)) as skipping, torch.no_grad():
        assert torch.equal(model(input_ids=tokens[:, :PROMPT], attention_mask=mask[:, :PROMPT]).logits, first)
        assert skipping.stats.steps == 0
        skipped_first, skipped_steps = decode(model, tokens, PROMPT, mask)
    assert torch.equal(skipped_first, first)
    assert skipping.stats.steps == LENGTH - PROMPT
    assert all(not torch.allclose(skipped_steps[:, i], steps[:, i], atol=1e-3) for i in range(steps.shape[1]))


def test_a_chunk_of_the_prompt_on_a_cache_is_prefill() -> None:
    model = tiny_model("qwen3_moe")
    tokens = words(4, 8)

    @torch.no_grad()
    def in_two_chunks() -> Tensor:
        cache = model(input_ids=tokens[:, :5], use_cache=True).past_key_values
        return model(input_ids=tokens[:, 5:], past_key_values=cache).logits

    untouched = in_two_chunks()
    with skip_experts(model, random_selector(model).at_threshold(EVERYTHING)) as skipping:
        assert torch.equal(in_two_chunks(), untouched)
    assert skipping.stats.steps == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_are_gone_after_exit_and_after_exceptions(name: str) -> None:
    model = tiny_model(name)
    layers = find_moe_layers(model)
    policy = random_selector(model).at_threshold(SOME)
    tokens, mask = padded_batch()
    untouched = decode(model, tokens, PROMPT, mask)

    def fail(*_: object) -> None:
        raise RuntimeError("inside a forward")

    assert all_hooked_are_bare(model, layers)
    with skip_experts(model, policy):
        decode(model, tokens, PROMPT, mask)
        assert all(layer.router._forward_hooks and layer.experts._forward_pre_hooks for layer in layers)
    assert all_hooked_are_bare(model, layers)

    def broken_off_outside_a_forward() -> None:
        with skip_experts(model, policy):
            decode(model, tokens, PROMPT, mask)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken_off_outside_a_forward()
    assert all_hooked_are_bare(model, layers)
    for module in (layers[1].router, layers[1].experts):
        skipping = skip_experts(model, policy)
        trap = module.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="inside a forward"), skipping:
            decode(model, tokens, PROMPT, mask)
        trap.remove()
        assert all_hooked_are_bare(model, layers)
    assert all(torch.equal(a, b) for a, b in zip(decode(model, tokens, PROMPT, mask), untouched, strict=True))


def test_works_on_after_an_exception_inside_a_forward() -> None:
    """A forward that broke off leaves nothing behind that the next one could mistake for its own."""
    model = tiny_model("olmoe")
    policy = random_selector(model).at_threshold(SOME)
    tokens, mask = padded_batch()
    with skip_experts(model, policy):
        wanted = decode(model, tokens, PROMPT, mask)

    def fail_at_a_step(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[0] == len(tokens):
            raise RuntimeError("inside a forward")

    with skip_experts(model, policy):
        trap = find_moe_layers(model)[0].experts.register_forward_pre_hook(fail_at_a_step)
        with pytest.raises(RuntimeError, match="inside a forward"):
            decode(model, tokens, PROMPT, mask)
        trap.remove()
        assert all(torch.equal(a, b) for a, b in zip(decode(model, tokens, PROMPT, mask), wanted, strict=True))


def test_attaching_twice_is_refused_and_the_first_stays() -> None:
    model = tiny_model("mixtral")
    selector = random_selector(model)
    skipping = skip_experts(model, selector.at_threshold(SOME)).attach()
    try:
        hooked = hooks(model)
        for again in (
            skipping,
            skip_experts(model, selector.at_threshold(SOME)),
            skip_experts(model, selector, budget=0),
        ):
            with pytest.raises(ModelError, match="detach"):
                again.attach()
            assert hooks(model) == hooked
        decode(model, *padded_batch()[:1], PROMPT)
        assert skipping.stats.steps == LENGTH - PROMPT
    finally:
        skipping.detach()
    skipping.detach()
    assert hooks(model) == 0
    with skipping:
        decode(model, *padded_batch()[:1], PROMPT)
    assert skipping.stats.steps == 2 * (LENGTH - PROMPT)


def test_options_that_do_not_fit_are_refused_before_anything_is_attached() -> None:
    model, other = tiny_model("mixtral"), tiny_model("olmoe")
    selector = random_selector(model)
    with pytest.raises(SelectorError):
        skip_experts(other, selector, budget=0)
    with pytest.raises(OptionError):
        skip_experts(model, selector, budget=0.01)
    with pytest.raises(TypeError):
        skip_experts(model, selector)
    with pytest.raises(TypeError):
        skip_experts(model, selector.at_threshold(SOME), budget=0.01)
    assert hooks(model) == hooks(other) == 0


@pytest.mark.parametrize(
    ("rank", "keep_top1", "rows", "dtype"),
    [
        (0, False, SMALL, torch.float32),
        (4, False, SMALL, torch.float32),
        (4, True, LARGE, torch.float32),
        (8, False, LARGE, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_fewer_experts_are_loaded_and_counted_rightly(
    name: str, rank: int, keep_top1: bool, rows: int, dtype: torch.dtype
) -> None:
    model = tiny_model(name).to(dtype)
    layers = find_moe_layers(model)
    selector = random_selector(model, rank=rank, keep_top1=keep_top1)
    tokens, mask = padded_batch(rows)
    with skip_experts(model, selector.at_threshold(SOME)) as skipping, watching(layers) as watch:
        decode(model, tokens, PROMPT, mask)
    steps, stats = LENGTH - PROMPT, skipping.stats
    assert len(watch.steps) == steps * len(layers)
    folded = [own.scorer.fold(own.sensitivity) for own in selector.layers]  # type: ignore[union-attr,operator]
    scorer_bytes = sum(4 * part.numel() for own in folded for part in own)
    before, after, left_out, wanted_bytes, loaded_bytes = [0, 0], [0, 0], 0, 0, 0
    for seen in watch.steps:
        assert seen.loaded <= seen.wanted
        before[seen.layer.index] += len(seen.wanted)
        after[seen.layer.index] += len(seen.loaded)
        left_out += sum(expert not in seen.loaded for expert in seen.routed[0].flatten().tolist())
        wanted_bytes += len(seen.wanted) * seen.layer.expert_bytes
        loaded_bytes += len(seen.loaded) * seen.layer.expert_bytes
        if rank:
            for expert in seen.wanted - seen.loaded:
                numbers = sum(part.numel() for part in own_surrogates(selector, seen).of(expert))
                loaded_bytes += numbers * seen.layer.dtype.itemsize
        if keep_top1:
            best = seen.routed[0].gather(1, seen.routed[1].argmax(1, keepdim=True))
            assert set(best.flatten().tolist()) <= seen.loaded
    assert sum(after) < sum(before)
    assert stats.steps == steps
    assert stats.experts_before == pytest.approx([n / steps for n in before])
    assert stats.experts_after == pytest.approx([n / steps for n in after])
    assert stats.bytes_ratio == pytest.approx((loaded_bytes + scorer_bytes * steps) / wanted_bytes)
    assert stats.answered_share == pytest.approx(left_out / (steps * rows * TOP_K * len(layers)) if rank else 0.0)


@pytest.mark.parametrize(("rank", "rows"), [(0, SMALL), (4, SMALL), (4, LARGE)])
@pytest.mark.parametrize("name", FAMILIES)
def test_output_is_kept_experts_plus_surrogates(name: str, rank: int, rows: int) -> None:
    """Against a dense computation, token by token: the original weight goes to the expert or to its surrogate."""
    model = tiny_model(name)
    layers = find_moe_layers(model)
    selector = random_selector(model, rank=rank)
    tokens, mask = padded_batch(rows)
    with skip_experts(model, selector.at_threshold(SOME)), watching(layers) as watch:
        decode(model, tokens, PROMPT, mask)
    answers = 0
    for seen in watch.steps:
        outputs = [seen.layer.expert_output(expert, seen.hidden) for expert in range(EXPERTS)]
        wanted = torch.zeros_like(seen.output)
        for token, (chosen, weights) in enumerate(zip(*seen.routed, strict=True)):
            for expert, weight in zip(chosen.tolist(), weights, strict=True):
                if expert in seen.loaded:
                    wanted[token] += weight * outputs[expert][token]
                elif rank:
                    down, up, constant = own_surrogates(selector, seen).of(expert)
                    wanted[token] += weight * (down @ seen.hidden[token] @ up + constant)
                    answers += 1
        torch.testing.assert_close(seen.output, wanted, rtol=1e-4, atol=1e-4)
    assert answers > 0 or not rank


def policies(model: PreTrainedModel) -> dict[str, Policy]:
    selector = random_selector(model)
    skips_nothing = ThresholdPolicy(selector, {LENGTH: SOME}, "for larger batches")
    return {"learned": selector.at_threshold(SOME), "skips nothing": skips_nothing, "xshare": XShare(4)}


@pytest.mark.parametrize("kind", ["learned", "skips nothing", "xshare"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_ended_row_neither_votes_nor_loads(name: str, kind: str) -> None:
    model = tiny_model(name)
    layers = find_moe_layers(model)
    tokens, mask = padded_batch()
    tokens[2, PROMPT:] = PAD
    others = torch.tensor([0, 1, 3, 4])
    with skip_experts(model, policies(model)[kind]) as with_ended, watching(layers) as all_rows:
        _, steps = decode(model, tokens, PROMPT, mask)
    with skip_experts(model, policies(model)[kind]) as without, watching(layers) as four_rows:
        _, wanted = decode(model, tokens[others], PROMPT, mask[others])
    torch.testing.assert_close(steps[others], wanted, rtol=1e-4, atol=1e-4)
    assert [seen.loaded for seen in all_rows.steps] == [seen.loaded for seen in four_rows.steps]
    assert with_ended.stats == without.stats


def test_a_batch_that_has_ended_is_harmless() -> None:
    model = tiny_model("gpt_oss")
    tokens, mask = padded_batch()
    tokens[:, PROMPT:] = PAD
    with skip_experts(model, random_selector(model).at_threshold(SOME)) as skipping:
        assert decode(model, tokens, PROMPT, mask)[1].isfinite().all()
    assert skipping.stats.experts_after == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["dense", "grouped", "xshare"])
@pytest.mark.parametrize("rows", [SMALL, LARGE])
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_waits_for_the_device(name: str, rows: int, kind: str) -> None:
    """Tensors without values raise wherever a value is asked for, and where a shape depends on one."""
    model = tiny_model(name).bfloat16()
    layers = find_moe_layers(model)
    policy = XShare(4) if kind == "xshare" else random_selector(model, rank=8).at_threshold(SOME)
    policy.bind(layers)
    if isinstance(policy, ThresholdPolicy):
        for ready in policy.ready.values():
            ready.selector.surrogates.use(kind)  # as on a device that is no CPU
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        tally = Tally(layers, policy)
        for layer in layers:
            hidden, logits = torch.randn(1, rows, layer.hidden_size).bfloat16(), torch.randn(1, rows, EXPERTS)
            active = torch.randn(1, rows) > 0
            done = act(policy, layer, Routing(hidden, logits, *layer.rule.route(logits), active), tally)
            assert done.indices.shape == done.weights.shape == (1, rows, TOP_K)


def generate(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
    return model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=10, do_sample=False)  # type: ignore[operator]


@pytest.mark.parametrize(("name", "pad"), [*((name, PAD) for name in FAMILIES), ("mixtral", None), ("gpt_oss", None)])
def test_generate_with_sequences_that_end_early(name: str, pad: int | None) -> None:
    model = tiny_model(name)
    config = model.generation_config
    assert config is not None
    layers = find_moe_layers(model)
    selector = random_selector(model)
    tokens, mask = (part[:3, :PROMPT] for part in padded_batch())
    skipping = skip_experts(model, selector.at_threshold(SOME))
    config.pad_token_id, config.eos_token_id = PAD, None
    with skipping:
        free = generate(model, tokens, mask)[:, PROMPT:]
    # An end token that one row reaches early, and another one never.
    end = next(word for word in free[:, 1:4].flatten().tolist() if word != PAD and any(word not in row for row in free))
    config.pad_token_id, config.eos_token_id = pad, end
    with skip_experts(model, selector.at_threshold(SOME)) as skipping, watching(layers) as watch:
        new = generate(model, tokens, mask)[:, PROMPT:]
    assert skipping.stats.steps == new.shape[1] - 1
    ended = 0
    for step in range(1, new.shape[1]):
        running = [row for row in range(3) if end not in new[row, :step]]
        for seen in watch.steps[(step - 1) * len(layers) : step * len(layers)]:
            assert seen.loaded <= {e for row in running for e in seen.routed[0][row].tolist()}
        ended += len(running) < 3
    assert ended, "no sequence ended early"
    untouched = generate(model, tokens, mask)
    with skip_experts(model, selector, budget=0):
        assert torch.equal(generate(model, tokens, mask), untouched)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_bfloat16_models_run(name: str) -> None:
    model = tiny_model(name).bfloat16()
    tokens, mask = padded_batch()
    with skip_experts(model, random_selector(model).at_threshold(SOME)) as skipping:
        _, steps = decode(model, tokens, PROMPT, mask)
    assert steps.dtype == torch.bfloat16
    assert steps.isfinite().all()
    assert sum(skipping.stats.experts_after) < sum(skipping.stats.experts_before)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_experts_implementation_gives_the_same(implementation: str) -> None:
    model = tiny_model("mixtral")
    tokens, mask = padded_batch()
    policy = random_selector(model).at_threshold(SOME)
    with skip_experts(model, policy):
        wanted = decode(model, tokens, PROMPT, mask)[1]
    model.set_experts_implementation(implementation)
    with skip_experts(model, policy):
        torch.testing.assert_close(decode(model, tokens, PROMPT, mask)[1], wanted, rtol=1e-4, atol=1e-4)
    assert model.get_experts_implementation()[""] == implementation


def test_a_cache_of_fixed_size_gives_the_same() -> None:
    model = tiny_model("mixtral")
    tokens = words(SMALL, LENGTH)
    policy = random_selector(model).at_threshold(SOME)
    with skip_experts(model, policy) as skipping:
        wanted = decode(model, tokens, PROMPT)[1]
    assert skipping.stats.steps == LENGTH - PROMPT
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    with skip_experts(model, policy) as fixed, torch.no_grad():
        model(input_ids=tokens[:, :PROMPT], past_key_values=cache)
        assert fixed.stats.steps == 0
        steps = [model(input_ids=tokens[:, at : at + 1], past_key_values=cache).logits for at in range(PROMPT, LENGTH)]
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted, rtol=1e-4, atol=1e-4)
    assert fixed.stats == skipping.stats


def test_a_token_on_a_fresh_cache_of_fixed_size_is_prefill() -> None:
    model = tiny_model("mixtral")
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    with skip_experts(model, random_selector(model).at_threshold(SOME)) as skipping, torch.no_grad():
        model(input_ids=words(SMALL, 1), past_key_values=cache)
        assert skipping.stats.steps == 0
        model(input_ids=words(SMALL, 1), past_key_values=cache)
        assert skipping.stats.steps == 1


def test_use_beyond_what_is_certified_is_said_once() -> None:
    """A longer decode when it comes to that, other sampling when attaching; within the limits nothing is said."""
    model = tiny_model("qwen3_moe")
    limits = {"dtype": "bfloat16", "device": "cuda", "length": 8, "temperature": 1.0}
    selector = random_selector(model, thresholds={"kl": {"0.1": {"1": 0.5}}})
    prompts = words(2, 4)
    wanted = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "min_new_tokens": 8}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        skipping = skip_experts(model, selector.with_config(calibration={"kl": limits}), 0.1)
        with skipping:
            model.generate(prompts, **{**wanted, "min_new_tokens": 4}, max_new_tokens=4)
    with skipping, pytest.warns(UserWarning, match=r"not certified for length 9 \(certified: up to 8\)") as said:
        model.generate(prompts, **wanted, max_new_tokens=8)
    assert len(said) == 1
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.7
    with pytest.warns(UserWarning, match=r"not certified for temperature 0\.7 \(certified: 1\.0\)"):
        skip_experts(model, selector.with_config(calibration={"kl": limits}), 0.1)
