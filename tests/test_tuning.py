"""Tuning: its decision is the one at decode, its gradient goes to what may learn, and it lowers what it aims at."""

import math
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from flows import LENGTH, reference_flow, tiny_flow, train_options
from tiny import random_selector, tiny_model, words
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from lynx_learn.decode.simulate import simulated_logits
from lynx_learn.errors import OptionError, SelectorError
from lynx_learn.fit import tuning
from lynx_learn.fit.train import TrainOptions, train
from lynx_learn.fit.trainer import ALONE, Team, fit_module
from lynx_learn.fit.tuning import StraightThrough, TuneOptions, tune
from lynx_learn.measure.equal_loss import interpolate
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.loading import load_model
from lynx_learn.selector.saving import read_metrics
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.traces.corpus import read_sequences

OPTIONS = TuneOptions(steps=6, rate=1e-3, batch_sizes=(4, 8), seed=0)


def learnable(selector: LynxSelector) -> dict[str, Tensor]:
    return {name: value.detach().clone().float() for name, value in selector.named_parameters()}


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("keep_top1", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@torch.no_grad()
def test_a_tuned_decision_is_the_one_at_decode(name: str, rank: int, keep_top1: bool) -> None:
    model = tiny_model(name)
    layers = find_moe_layers(model)
    selector = random_selector(model, rank=rank, keep_top1=keep_top1)
    policy, straight = selector.at_threshold(1.0), StraightThrough(selector, 1.0)
    policy.bind(layers)
    wanted, stats = simulated_logits(model, layers, words(6, 12), policy, 4)
    given, _ = simulated_logits(model, layers, words(6, 12), straight, 4)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)
    assert [float(kept) for kept in straight.kept] == pytest.approx(stats.experts_after, rel=1e-5)
    assert sum(stats.experts_after) < sum(stats.experts_before)


def test_gradients_reach_scorers_and_surrogates_and_nothing_else() -> None:
    model = tiny_model("qwen3_moe").requires_grad_(False)
    layers = find_moe_layers(model)
    selector = random_selector(model)
    tuning._parameters(selector, 1e-3)
    tuning._loss(model, layers, selector, words(6, 12), 1.0).backward()
    for name, value in selector.named_parameters():
        assert value.grad is not None, name
        assert torch.isfinite(value.grad).all(), name
    # Every layer's decision counts, the first one's through all later ones.
    for own in selector.layers:
        assert own.scorer.outer.bias.grad.abs() > 0  # type: ignore[union-attr]
        assert own.surrogates.up.grad.abs().sum() > 0  # type: ignore[union-attr]
    assert all(value.grad is None for value in model.parameters())


@torch.no_grad()
def test_the_objective_weighs_an_expert_against_nats() -> None:
    """KL per token in units of the threshold, plus the experts that all layers keep, a token of the batch."""
    model = tiny_model("mixtral")
    layers = find_moe_layers(model)
    selector, tokens = random_selector(model), words(6, 12)
    policy = selector.at_threshold(0.7)
    policy.bind(layers)
    wanted, _ = simulated_logits(model, layers, tokens, None, 3)
    given, stats = simulated_logits(model, layers, tokens, policy, 3)
    kl = (wanted.softmax(-1) * (wanted.log_softmax(-1) - given.log_softmax(-1))).sum(-1).mean()
    expected = float(kl) / 0.7 + sum(stats.experts_after) / 6
    assert float(tuning._loss(model, layers, selector, tokens, 0.7)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_it_lowers_the_loss_on_held_out_text() -> None:
    """On the trained model in the package, fewer experts at as many nats, on documents it has not learned from."""
    flow = reference_flow()
    loaded = load_model("reference-moe", "cpu", "float32")
    layers = find_moe_layers(loaded.model)
    learn, check = (
        torch.tensor([row for row, _ in islice(read_sequences("python-stdlib", loaded.tokenizer, 64, split), count)])
        for split, count in (("fit", 400), ("test", 64))  # type: ignore[arg-type]
    )
    selector = LynxSelector.from_pretrained(flow.selector)
    found = tune(loaded.model, layers, selector, learn, check, TuneOptions(40, 1e-3, (16,), 0))
    before = [(p["kl"], p["experts"], p["experts"]) for p in found["before"]]
    middle = found["after"][1]
    untuned = interpolate(before, middle["kl"])
    assert untuned is not None
    assert middle["experts"] < 0.97 * untuned[0]


def test_equal_seeds_tune_alike_and_the_model_stays_as_it_was() -> None:
    loaded = load_model(str(tiny_flow().model), "cpu")
    layers = find_moe_layers(loaded.model)
    model = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    learning = [value.requires_grad for value in loaded.model.parameters()]
    results = []
    for seed in (0, 0, 1):
        selector = LynxSelector.from_pretrained(tiny_flow().selector)
        start = learnable(selector)
        tune(loaded.model, layers, selector, words(40, LENGTH), words(9, LENGTH, 1), replace(OPTIONS, seed=seed))
        assert not any(value.requires_grad for value in selector.parameters())
        results.append(learnable(selector))
        assert any(not torch.equal(start[name], value) for name, value in results[-1].items())
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())
    assert any(not torch.equal(results[0][name], value) for name, value in results[2].items())
    assert all(torch.equal(model[name], value) for name, value in loaded.model.state_dict().items())
    assert [value.requires_grad for value in loaded.model.parameters()] == learning


@pytest.mark.parametrize("batches", [1, 3])
def test_lightning_tunes_as_a_plain_loop_does(batches: int) -> None:
    """To the bit, with one decode batch a step; the mean gradient of several is summed in another order."""
    loaded = load_model(str(tiny_flow().model), "cpu")
    loaded.model.requires_grad_(False)
    layers, rows = find_moe_layers(loaded.model), words(40, LENGTH)
    spans = {4: (0.01, 0.1), 8: (0.02, 0.3)}
    options = replace(OPTIONS, batches=batches)
    plain, tuned = (LynxSelector.from_pretrained(tiny_flow().selector) for _ in range(2))
    optimiser = torch.optim.Adam(tuning._parameters(plain, options.rate), betas=(0.9, 0.98))
    shape = get_cosine_schedule_with_warmup(optimiser, 1, options.steps)
    rng = random.Random(7)
    for _ in range(options.steps):
        losses = []
        for _ in range(batches):
            size = rng.choice([4, 8])
            low, high = spans[size]
            threshold = math.exp(rng.uniform(math.log(low), math.log(high)))
            losses.append(tuning._loss(loaded.model, layers, plain, tuning._batch(rows, size, rng), threshold))
        torch.stack(losses).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        shape.step()
    drawn = tuning.Batches(rows, spans, options, random.Random(7), ALONE)
    fit_module(
        tuning.Tuning(loaded.model, layers, tuned, options, shown=False),
        drawn,
        max_epochs=1,
        accumulate_grad_batches=batches,
        logger=False,
    )
    for name, value in learnable(tuned).items():
        torch.testing.assert_close(value, learnable(plain)[name], rtol=0, atol=0 if batches == 1 else 1e-5, msg=name)


def test_processes_divide_the_batches_of_each_step() -> None:
    """Which these are does not depend on how many processes there are."""
    options = replace(OPTIONS, batches=4)

    def drawn(team: Team) -> list[tuning.Batch]:
        found = tuning.Batches(words(40, LENGTH), {4: (0.1, 0.2), 8: (0.3, 0.4)}, options, random.Random(3), team)
        batches = list(found)
        assert len(batches) == len(found) == 4 * options.steps // team.size
        return batches

    whole, (even, odd) = drawn(ALONE), [drawn(Team(rank, rank, devices=2)) for rank in (0, 1)]
    for together, own in ((whole[::2], even), (whole[1::2], odd)):
        assert [batch.threshold for batch in together] == [batch.threshold for batch in own]
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(together, own, strict=True))
    assert len({batch.threshold for batch in whole}) == len(whole)


@pytest.mark.parametrize("what", [{"scorer": "formula"}, {"surrogate_share": 0}, {"scorer": "linear"}], ids=str)
def test_what_has_nothing_to_learn_is_left_out(what: dict[str, object], tmp_path: Path) -> None:
    options = train_options(tiny_flow(), tmp_path / "selector", tune_steps=2, tune_batch_sizes=[4], **what)
    train(options)
    figures = read_metrics(tmp_path / "selector")["train"]["tuning"]
    assert figures["steps"] == 2
    assert len(figures["before"]) == len(figures["after"]) == 3
    assert "Tuned through the frozen model on KL for 2 steps" in (tmp_path / "selector" / "README.md").read_text()


def test_batches_are_cut_to_about_as_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(64 * 512).view(64, 512)
    for size, positions in ((1, 512), (8, 256), (16, 128), (32, 64), (64, 64)):
        batch = tuning._batch(rows, size, random.Random(0))
        assert batch.shape == (size, positions)
        assert len(batch[:, 0].unique()) == size
        assert (batch.diff(dim=1) == 1).all()


def test_a_loss_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(str(tiny_flow().model), "cpu")
    selector = LynxSelector.from_pretrained(tiny_flow().selector)
    monkeypatch.setattr(tuning, "_loss", lambda *args: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(SelectorError, match="lower --tune_rate"):
        tune(loaded.model, find_moe_layers(loaded.model), selector, words(40, LENGTH), words(9, LENGTH, 1), OPTIONS)
    assert not any(value.requires_grad for value in selector.parameters())


@pytest.mark.parametrize(
    "wrong", [{"tune_steps": -1}, {"tune_rate": 0.0}, {"tune_batch_sizes": []}, {"tune_batches": 0}], ids=str
)
def test_impossible_options_are_refused(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(OptionError, match=f"--{name} .*expected"):
        TrainOptions("trace", "out", **wrong)  # type: ignore[arg-type]


def test_nothing_to_tune_is_refused() -> None:
    with pytest.raises(OptionError, match="--tune_steps 100 is not usable with --scorer formula"):
        TrainOptions("trace", "out", scorer="formula", surrogate_share=0)
