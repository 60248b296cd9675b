"""Plan: sizes against what the commands write and load."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flows import LENGTH, RANK, contents, one_line, tiny_flow
from tiny import HIDDEN

from lynx_learn.errors import LynxError
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.loading import load_model
from lynx_learn.plan import PlanOptions, Shape, costs, plan, read_shape
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.traces.format import Trace


def test_a_shape_is_that_of_the_loaded_model() -> None:
    found = read_shape(str(tiny_flow().model))
    model = load_model(str(tiny_flow().model), "cpu").model
    layers = find_moe_layers(model)
    assert (found.layers, found.experts, found.top_k, found.hidden) == (len(layers), 8, 2, HIDDEN)
    assert found.expert_numbers * found.itemsize == layers[0].expert_bytes
    assert found.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert read_shape(str(tiny_flow().model / "config.json")) == found
    half = read_shape(str(tiny_flow().model), "bfloat16")
    assert (half.itemsize, half.bytes) == (2, found.bytes // found.itemsize * 2)


def test_sizes_are_those_of_what_is_written() -> None:
    """Of traces and selectors, but for headers and scorers, which are small beside those of a real model."""
    flow = tiny_flow()
    trace, selector = Trace.open(flow.trace), LynxSelector.from_pretrained(flow.selector)
    collect, fit, *_ = costs(
        read_shape(str(flow.model)), PlanOptions(str(flow.model), tokens=trace.collected_tokens, length=LENGTH)
    )
    assert collect.disk == trace.collected_tokens * trace.options.bytes_per_token
    assert collect.disk == pytest.approx(sum(map(len, contents(flow.trace).values())), rel=0.25)
    assert collect.processes == trace.shards
    share = 4 * sum(layer.surrogates.down.numel() * 2 + layer.surrogates.constant.numel() for layer in selector.layers)  # type: ignore[union-attr,operator]
    shape = read_shape(str(flow.model))._replace
    assert fit.processes == len(selector.layers)
    own = costs(shape(), PlanOptions(str(flow.model), surrogate_share=0.2))[1].disk
    rank = read_shape(str(flow.model)).rank(0.2)
    assert own * (2 * RANK + 1) == share * (2 * rank + 1)


SHAPE = Shape(
    layers=48,
    experts=128,
    top_k=8,
    hidden=2048,
    expert_numbers=3 * 2048 * 768,
    rest=10**9,
    vocabulary=150_000,
    itemsize=2,
)


@pytest.mark.parametrize("command", range(4))
def test_costs_grow_with_tokens_and_layers(command: int) -> None:
    # Four times as many are no more than scorers learn from, and halves of them are solved by width: near it, the dense solve
    # among tokens takes longer.
    options = PlanOptions("m", tokens=25_000)
    one, more, deeper = (
        costs(shape, own)[command]
        for shape, own in (
            (SHAPE, options),
            (SHAPE, replace(options, tokens=4 * options.tokens)),
            (SHAPE._replace(layers=96), options),
        )
    )
    assert deeper.operations > 1.5 * one.operations
    if command < 2:
        assert 2 < more.operations / one.operations < 8
    assert (deeper.memory > one.memory) == (command != 1)  # a layer is fitted alone


def test_the_experts_of_a_layer_are_not_held() -> None:
    one, more = (
        costs(SHAPE._replace(experts=count, top_k=count // 16), PlanOptions("m"))[1].memory for count in (64, 128)
    )
    surrogates = SHAPE.selector(PlanOptions.surrogate_share) // SHAPE.layers * SHAPE.itemsize
    assert more - one == pytest.approx(surrogates / 2, rel=0.05)


def test_a_target_of_tokens_for_every_expert() -> None:
    """That of a trace whose experts are alike; of a real one, no more than it needed."""

    def disk(**options: Any) -> float:
        return costs(SHAPE, PlanOptions("m", **options))[0].disk

    assert disk(tokens_per_expert=1000) == disk(tokens=1000 * SHAPE.experts // SHAPE.top_k)
    assert disk(tokens_per_expert=1000, tokens=4096) == disk(tokens=4096)
    assert disk() == disk(tokens=100_000)
    half = disk(hidden_dtype="float8_e4m3fn")
    assert disk() - half == 100_096 * SHAPE.layers * (SHAPE.hidden - 4)  # of 2 bytes; 391 whole sequences
    trace = Trace.open(tiny_flow().trace)
    reached = int(trace.assigned().min())
    shape = read_shape(str(tiny_flow().model))
    assert PlanOptions("m", tokens_per_expert=reached).collected(shape) <= trace.collected_tokens


def test_a_table_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(PlanOptions(str(tiny_flow().model), memory=1e-6))
    said = capsys.readouterr().out
    assert all(cost.command.split(",")[0] in said for cost in found)
    assert " !" in said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": 0}, "--tokens 0"),
        ({"dtype": "float8"}, "--dtype 'float8'"),
        ({"rate": 0.0}, "--rate 0"),
        ({"surrogate_share": 1.0}, "--surrogate_share 1"),
    ],
)
def test_options_that_cannot_be_used(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(LynxError, match=reason) as error:
        PlanOptions("m", **change)
    one_line(error)


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name in (tmp_path / "config.json", tmp_path / "nowhere"):
        with pytest.raises(LynxError) as error:
            read_shape(str(name))
        one_line(error)
