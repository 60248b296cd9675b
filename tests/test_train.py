"""Train: costs and figures against loops written here, equal seeds give equal bytes, and nothing is left half-written."""

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import (
    LAYERS,
    LENGTH,
    RANK,
    SHARE,
    Flow,
    change_weights,
    contents,
    layer_figures,
    one_line,
    other_revision,
    save_model,
    tiny_flow,
    train_options,
)
from tiny import random_selector, tiny_model, words
from torch import Tensor
from torch.nn import functional

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.errors import OptionError, TraceError
from lynx_learn.fit import layer as fit_of_layer
from lynx_learn.fit import train as training
from lynx_learn.fit.layer import CHECK, blocks_within, gathered, shard_routing
from lynx_learn.fit.scorer import Assignments, quality
from lynx_learn.fit.train import train
from lynx_learn.moe import loading
from lynx_learn.moe.decision import Routing
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.moe.loading import load_model
from lynx_learn.parts import deciding
from lynx_learn.rules.oracle import Answer, squared_errors
from lynx_learn.selector.layer import LayerSelector
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.selector.surrogates import Fit, Surrogates
from lynx_learn.traces.collect import CollectOptions, collect, record
from lynx_learn.traces.format import Trace

# What a selector directory holds after training, logs aside.
FILES = {"config.json", "selector.safetensors", "metrics.json", "README.md", "run.yaml"}


def held_out_shards(trace: Trace, layer: int) -> list[dict[str, Tensor]]:
    """The layer's tensors of every tenth sequence."""
    rows = (trace.index()["sequence"] % 10 == 9).split([len(s["weights"]) for s in trace.layer_shards(layer)])
    return [{k: v[own] for k, v in shard.items()} for own, shard in zip(rows, trace.layer_shards(layer), strict=True)]


# Costs.


def qwen_expert(experts: Any, e: int, x: Tensor) -> Tensor:
    gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
    return experts.down_proj[e] @ (functional.silu(gate) * up)


def gpt_oss_expert(experts: Any, e: int, x: Tensor) -> Tensor:
    """Interleaved gate and up, both clamped, with biases and transposed weights."""
    both = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
    gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
    return ((up + 1) * gate * (1.702 * gate).sigmoid()) @ experts.down_proj[e] + experts.down_proj_bias[e]


@torch.no_grad()
def loop_costs(
    layer: MoeLayer, surrogates: Surrogates, shard: dict[str, Tensor], expert: Callable[[Any, int, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    costs, squares = torch.zeros_like(shard["weights"]), torch.zeros_like(shard["weights"])
    for t, x in enumerate(shard["hidden"]):
        for k, e in enumerate(shard["indices"][t].tolist()):
            y = expert(layer.experts, e, x)
            down, up, constant = surrogates.of(e)
            answer = up.T @ (down @ x) + constant
            weight = float(shard["weights"][t, k])
            costs[t, k] = (weight * (y - answer)).square().sum()
            squares[t, k] = (weight * y).square().sum()
    return costs, squares


@pytest.mark.parametrize(("family", "expert"), [("qwen3_moe", qwen_expert), ("gpt_oss", gpt_oss_expert)])
@pytest.mark.parametrize("rank", [0, 3])
def test_costs_are_those_of_a_loop(family: str, expert: Callable[[Any, int, Tensor], Tensor], rank: int) -> None:
    model = tiny_model(family)
    layers = find_moe_layers(model)
    shard = record(model, layers, words(3, 10))[1]
    shard["indices"] = shard["indices"].long()
    selector = random_selector(model, rank=rank)
    surrogates: Surrogates = selector.layers[1].surrogates  # type: ignore[assignment]
    if not rank:
        surrogates.constant.zero_()
    costs, squares = squared_errors(layers[1], [surrogates.output], shard_routing(shard))[:, 0]
    wanted, energy = loop_costs(layers[1], surrogates, shard, expert)
    torch.testing.assert_close(costs, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(squares, energy, rtol=1e-4, atol=1e-6)
    assert (costs.allclose(squares)) == (rank == 0)


def test_surrogates_lower_the_cost_on_held_out_sequences() -> None:
    """The share of the energy that they leave, as reported and by a loop."""
    flow = tiny_flow()
    trace, layers = Trace.open(flow.trace), find_moe_layers(load_model(str(flow.model), "cpu").model)
    selector = LynxSelector.from_pretrained(flow.selector)
    for layer, figures in zip(layers, layer_figures(flow.selector), strict=True):
        surrogates: Surrogates = selector.layers[layer.index].surrogates  # type: ignore[assignment]
        found = [loop_costs(layer, surrogates, s, qwen_expert) for s in held_out_shards(trace, layer.index)]
        left, energy = (float(sum(part.sum() for part in parts)) for parts in zip(*found, strict=True))
        assert figures["unexplained"] == pytest.approx(left / energy, rel=1e-3)
        assert left < 0.9 * energy


def test_with_few_tokens_scorers_learn_from_errors_on_unseen_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each half they are what the surrogates of the other half leave there."""
    flow = tiny_flow()
    trace, layer = Trace.open(flow.trace), find_moe_layers(load_model(str(flow.model), "cpu").model)[1]
    tenth = trace.index()["sequence"] % 10
    config = LynxSelector.from_pretrained(flow.selector).config
    answers: dict[int, list[Answer]] = {}
    found = {}
    for few in (0, 10**9):
        monkeypatch.setattr(fit_of_layer, "FEW_TOKENS", few)
        surrogates = LayerSelector(config).surrogates
        halves = fit_of_layer._fit_surrogates(layer, surrogates, trace, tenth, tmp_path)
        ranks = surrogates.ranks.tolist()
        answers[few] = [surrogates.output, *(partial(of_half, half, ranks) for half in halves)]
        found[few] = fit_of_layer._assignments(layer, answers[few], trace, tenth)
    assert [len(own) for own in answers.values()] == [1, 3]
    (seen, unseen, _), (crossed, same, _) = found.values()
    assert torch.equal(unseen.costs, same.costs)
    assert float(seen.costs.mean()) < 0.95 * float(unseen.costs.mean())
    assert float(seen.costs.mean()) < float(crossed.costs.mean())
    shards = list(trace.layer_shards(1))
    order = tenth.eq(fit_of_layer.HELD_OUT).long().argsort(stable=True)  # learned from first, as they are worked out
    whole = {name: torch.cat([shard[name] for shard in shards])[order] for name in shards[0]}
    learned = tenth[tenth < fit_of_layer.HELD_OUT]
    by = squared_errors(layer, answers[10**9], shard_routing(whole))[:, 0, : len(learned)]
    for span, answer in ((range(4), 2), (range(4, 8), 1), (range(8, 9), 0)):
        own = torch.isin(learned, torch.tensor(span))
        assert torch.equal(crossed.costs[own], by[answer][own])


def test_what_is_left_unexplained_is_of_the_tokens_that_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = tiny_flow()
    trace, layer = Trace.open(flow.trace), find_moe_layers(load_model(str(flow.model), "cpu").model)[1]
    tenth = trace.index()["sequence"] % 10
    monkeypatch.setattr(fit_of_layer, "MOST_TOKENS", trace.collected_tokens // 4)
    fit, held_out, energy = fit_of_layer._assignments(layer, [lambda _, x: torch.zeros_like(x)], trace, tenth)
    thinned = len(fit.costs) + len(held_out.costs)
    assert 0.2 < thinned / trace.collected_tokens < 0.3
    assert float(held_out.costs.sum()) == pytest.approx(float(energy), rel=1e-5)


def test_a_layers_tokens_are_given_back_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's objects hold each other, and what they were trained on, until they are collected."""
    flow, left = tiny_flow(), []

    def counted(*args: Any) -> Any:
        left.append(sum(isinstance(thing, Assignments) for thing in gc.get_objects()))
        return fit_of_layer.fit_layer(*args)

    monkeypatch.setattr(training, "fit_layer", counted)
    gc.collect()
    gc.disable()
    try:
        train(train_options(flow, tmp_path / "s"))
    finally:
        gc.enable()
    assert left == [0] * LAYERS


def of_half(fits: list[Fit], ranks: list[int], expert: int, x: Tensor) -> Tensor:
    return fits[expert].output(x, ranks[expert])


def test_rank_0_has_no_surrogates_and_still_skips(tmp_path: Path) -> None:
    flow = tiny_flow()
    selector = train(train_options(flow, tmp_path / "s", surrogate_share=0))
    assert [row["unexplained"] for row in layer_figures(tmp_path / "s")] == pytest.approx([1.0] * LAYERS, rel=1e-6)
    assert all(not layer.surrogates.constant.any() for layer in selector.layers)  # type: ignore[union-attr]
    model = load_model(str(flow.model), "cpu").model
    again = LynxSelector.from_pretrained(tmp_path / "s")
    with skip_experts(model, again.at_threshold(1e9)) as skipping:
        model.generate(words(4, 6) % 40, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    assert skipping.stats.experts_after == [1.0] * LAYERS
    assert skipping.stats.answered_share == 0.0


@pytest.mark.parametrize("scorer", ["mlp", "linear", "formula"])
def test_the_saved_selector_predicts_as_reported(scorer: str, tmp_path: Path) -> None:
    """The way a decode step takes, on held-out tokens, gives the figures in metrics.json."""
    flow = tiny_flow()
    train(train_options(flow, tmp_path / "s", scorer=scorer))
    selector, trace = LynxSelector.from_pretrained(tmp_path / "s"), Trace.open(flow.trace)
    layers = find_moe_layers(load_model(str(flow.model), "cpu").model)
    for layer, figures in zip(layers, layer_figures(tmp_path / "s"), strict=True):
        own: LayerSelector = selector.layers[layer.index]  # type: ignore[assignment]
        shards = held_out_shards(trace, layer.index)
        true = torch.cat([loop_costs(layer, own.surrogates, shard, qwen_expert)[0] for shard in shards])
        hidden, logits, indices, weights = (
            torch.cat([shard[key] for shard in shards]).unsqueeze(0)
            for key in ("hidden", "logits", "indices", "weights")
        )
        routing = Routing(hidden, logits, indices, weights, torch.ones(hidden.shape[:2], dtype=torch.bool))
        assert quality(own.costs(routing)[0], true) == pytest.approx(figures[scorer], rel=1e-2)


def test_equal_seeds_write_equal_bytes(tmp_path: Path) -> None:
    flow = tiny_flow()
    for name, seed in (("again", 0), ("other", 1)):
        train(train_options(flow, tmp_path / name, seed=seed))
    for file in ("selector.safetensors", "metrics.json"):
        assert (tmp_path / "again" / file).read_bytes() == (flow.selector / file).read_bytes()
        assert (tmp_path / "other" / file).read_bytes() != (flow.selector / file).read_bytes()


def test_a_selector_directory_says_how_it_was_made(tmp_path: Path) -> None:
    import yaml

    flow = tiny_flow()
    options = train_options(flow, tmp_path / "s", keep_top1=True)
    (tmp_path / "s").mkdir()  # an empty folder is as good as none
    selector = train(options)
    found = contents(tmp_path / "s")
    assert {name for name in found if not name.startswith("logs/")} == FILES
    assert len([name for name in found if name.startswith("logs/layer-")]) >= LAYERS
    run = yaml.safe_load(found["run.yaml"])
    assert run["train"] == deciding(options)
    assert run["versions"]["torch"] == torch.__version__.split("+")[0] or run["versions"]["torch"] == torch.__version__
    config, trace = selector.config, Trace.open(flow.trace).options
    assert (config.base_model, config.identity) == (str(flow.model), trace.identity)
    assert (config.rank, config.keep_top1, config.thresholds) == (RANK, True, {})
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


# What is refused, and what is left then.


def collected(flow: Flow, out: Path, sequences: int) -> Flow:
    collect(CollectOptions(str(flow.model), str(out), str(flow.texts), tokens=sequences * LENGTH, length=LENGTH))
    return flow._replace(trace=out)


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    flow = tiny_flow()
    model = other_revision(flow.model, tmp_path / "model")
    with pytest.raises(TraceError, match="this model differs in") as error:
        train(train_options(flow, tmp_path / "s", model=str(model)))
    assert str(flow.trace) in one_line(error)
    # The first layer is that of the trace and was fitted; the second one's router is not.
    assert not (tmp_path / "s").exists()


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    flow = tiny_flow()
    before = contents(flow.selector)
    with pytest.raises(OptionError, match="not empty") as error:
        train(train_options(flow, flow.selector))
    assert str(flow.selector) in one_line(error)
    assert contents(flow.selector) == before


@pytest.mark.parametrize(
    "change",
    [
        {"surrogate_share": -1},
        {"surrogate_share": 1.0},
        {"epochs": 0},
        {"batch": 0},
        {"sensitivity_groups": 0},
        {"rate": -1.0},
    ],
    ids=str,
)
def test_options_that_cannot_be_used(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError) as error:
        train(train_options(tiny_flow(), tmp_path / "s", **change))
    ((name, value),) = change.items()
    assert f"--{name} {value:g} " in one_line(error)
    assert not (tmp_path / "s").exists()


def test_what_auto_means_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the checkpoint is read twice, layer by layer and as a whole."""
    flow, model = collected(tiny_flow(), tmp_path / "t", 10), tmp_path / "model"
    shutil.copytree(flow.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    monkeypatch.setattr(loading, "has_native_bfloat16", lambda: False)
    train(train_options(flow, tmp_path / "s", model=str(model)))
    assert capsys.readouterr().err.count(" runs in float32: ") == 1


@pytest.mark.parametrize("sequences", [1, 9])
def test_too_few_sequences_are_refused(sequences: int, tmp_path: Path) -> None:
    flow = collected(tiny_flow(), tmp_path / "t", sequences)
    with pytest.raises(TraceError, match="too few sequences") as error:
        train(train_options(flow, tmp_path / "s"))
    assert f"--tokens {10 * LENGTH}" in one_line(error)
    assert not (tmp_path / "s").exists()


def test_ten_sequences_are_enough(tmp_path: Path) -> None:
    train(train_options(collected(tiny_flow(), tmp_path / "t", 10), tmp_path / "s"))
    assert contents(tmp_path / "s").keys() >= FILES


@pytest.mark.parametrize("share", [0, SHARE])
def test_an_expert_that_overflows_is_refused_and_leaves_nothing(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer's, when the first is fitted already."""
    monkeypatch.setattr("lynx_learn.fit.train.differences", lambda *_: [])
    flow, broken = tiny_flow(), tmp_path / "model"
    shutil.copytree(flow.model, broken)
    change_weights(broken, lambda name, value: value * 1e25 if "layers.1.mlp.experts" in name else value)
    with pytest.raises(TraceError, match=r"layers\.1\.mlp.* not finite") as error:
        train(train_options(flow, tmp_path / "s", model=str(broken), surrogate_share=share))
    assert "--dtype float32" in one_line(error)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("most", [10**6, 40])
def test_an_expert_is_fitted_on_every_nth_of_its_tokens(most: int) -> None:
    trace = Trace.open(tiny_flow().trace)
    tenth = trace.index()["sequence"] % 10
    names = ("hidden", "indices", "weights")
    hidden, indices, weights = (torch.cat(column) for column in zip(*(
        [shard[name] for name in names] for shard in trace.layer_shards(1, names)
    ), strict=True))  # fmt: skip
    learned = tenth <= CHECK
    counts = torch.bincount(indices[learned].flatten(), minlength=trace.options.num_experts)
    blocks = list(blocks_within(counts.tolist(), most))
    assert len(blocks) == (1 if most > counts.sum() else len(counts))
    found = [rows for block in blocks for rows in gathered(trace, 1, tenth, block, counts, most)]
    for expert, (x, squares, part) in enumerate(found):
        token, slot = ((indices == expert) & learned.unsqueeze(-1)).nonzero(as_tuple=True)
        kept = slice(None, None, -(-len(token) // most))
        assert torch.equal(x, hidden[token[kept]])
        assert torch.equal(squares, weights[token, slot][kept].square())
        assert torch.equal(part, tenth[token[kept]])
    assert any(len(x) < count for (x, *_), count in zip(found, counts.tolist(), strict=True)) == (most == 40)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    """The peak after 16 times as many tokens; thinning to 1,000 stands for what 100,000 do to a real trace."""
    flow = tiny_flow()
    model = save_model(tmp_path / "model", hidden_size=256, num_hidden_layers=4, num_experts=4, moe_intermediate_size=8)
    program = (
        "import resource, sys\nfrom lynx_learn.fit import layer, train as fit\nfrom lynx_learn.traces.collect import *\n"
        "layer.MOST_TOKENS, layer.ROWS_BYTES = 1_000, 2**20\nmodel, texts, trace, tokens = sys.argv[1:]\n"
        "collect(CollectOptions(model, trace, texts, split='all', tokens=int(tokens), length=32))\n"
        "few = dict(surrogate_share=0.05, epochs=1, reference=False, sensitivity_groups=1, tune_steps=1)\n"
        "fit.train(fit.TrainOptions(trace, trace + '-selector', **few))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    peaks, sizes = [], []
    # A process each: a second training in one process finds its memory in pieces, and takes more.
    for tokens in (2_048, 32_768):
        trace = tmp_path / str(tokens)
        command = [sys.executable, "-c", program, str(model), str(flow.texts), str(trace), str(tokens)]
        # Every thread would have memory of its own, and what is freed in small pieces would stay.
        own = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]))
        sizes.append(sum(map(len, contents(trace).values())))
    (before, after), (smaller, larger) = peaks, sizes
    assert larger - smaller > 100e6
    assert after - before < (larger - smaller) / 4
