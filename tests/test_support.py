"""Every MoE decoder of transformers: acted on wholly and rightly, or refused by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from support_table import support_table
from tiny import EXPERTS, decode, random_selector, words
from torch import Tensor, nn
from zoo import ABSENT, NEWEST, NOT_DECODERS, OLDEST, VARIANTS, ZOO, build, class_of, modeling

from lynx_learn.decode.runtime import skip_experts, unwrapped
from lynx_learn.errors import ModelError
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.selector.selector import LynxSelector

ROWS, PROMPT, LENGTH = 6, 5, 9
KINDS = {name: kind for name, kind in {**ZOO, **VARIANTS}.items() if kind.reason in ("", ABSENT)}
REFUSED = {name: kind for name, kind in ZOO.items() if kind.reason and kind.reason != ABSENT}


class Call(NamedTuple):
    """One call of a layer's experts as a spy saw it."""

    router: Any
    hidden: Tensor
    indices: Tensor
    weights: Tensor
    output: Tensor


@contextmanager
def spying(layers: list[MoeLayer]) -> Iterator[list[list[Call]]]:
    """Calls of each layer's experts. Around a skipping context: as routed; inside of it: as run, with what is added."""
    calls: list[list[Call]] = [[] for _ in layers]
    handles: list[Any] = []

    def watch(layer: MoeLayer, seen: list[Call]) -> None:
        held: dict[str, Any] = {}

        def after_router(module: nn.Module, args: Any, output: Any) -> None:
            held["router"] = output

        def before_experts(module: nn.Module, args: Any, kwargs: Any) -> None:
            held["call"] = [*args, *kwargs.values()][:3]

        def after_experts(module: nn.Module, args: Any, output: Tensor) -> None:
            seen.append(Call(held["router"], *held["call"], output))

        handles.append(layer.router.register_forward_hook(after_router))
        handles.append(layer.experts.register_forward_pre_hook(before_experts, with_kwargs=True))
        handles.append(layer.experts.register_forward_hook(after_experts))

    for layer, seen in zip(layers, calls, strict=True):
        watch(layer, seen)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def by_expert(indices: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros(indices.shape[0], EXPERTS).scatter_add(1, indices, weights.float())


def expert_output(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    """One expert on all tokens from its weights, past the experts module's forward and its implementations."""
    parameters = dict(experts.named_parameters(recurse=False))

    def linear(name: str, states: Tensor) -> Tensor:
        weight = parameters[name][expert]
        out = states @ (weight if getattr(experts, "is_transposed", False) else weight.T)
        bias = parameters.get(f"{name}_bias")
        return out if bias is None else out + bias[expert]

    if "gate_up_proj" not in parameters:
        return linear("down_proj", experts.act_fn(linear("up_proj", hidden)))
    gate_up = linear("gate_up_proj", hidden)
    if "_apply_gate" in vars(type(experts)) and type(experts)._apply_gate.__module__ == type(experts).__module__:
        return linear("down_proj", experts._apply_gate(gate_up))
    gate, up = gate_up.chunk(2, dim=-1)
    return linear("down_proj", experts.act_fn(gate) * up)


def loaded(call: Call) -> set[int]:
    """Experts that are run; the index after the last one means none."""
    return set(call.indices.flatten().tolist()) - {EXPERTS}


def kept_and_surrogates(layer: MoeLayer, selector: LynxSelector, routed: Call, kept: set[int]) -> Tensor:
    """What the experts module shall give: every assignment's expert, or its surrogate, with the weight as routed."""
    part: Any = selector.layers[layer.index].surrogates
    wanted = torch.zeros_like(routed.output)
    outputs = {expert: expert_output(layer.experts, expert, routed.hidden) for expert in kept}
    for token, (chosen, weights) in enumerate(zip(routed.indices.tolist(), routed.weights, strict=True)):
        for expert, weight in zip(chosen, weights, strict=True):
            if expert in kept:
                wanted[token] += weight * outputs[expert][token]
            else:
                down, up, constant = part.of(expert)
                answer = (down @ routed.hidden[token]) @ up + constant
                wanted[token] += weight * answer
    return wanted


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_acts_on_every_block_and_rightly(name: str) -> None:
    if KINDS[name].reason == ABSENT:
        pytest.skip(f"not in transformers {transformers.__version__}")
    model = build(KINDS[name])
    tokens = words(ROWS, LENGTH)
    steps = LENGTH - PROMPT

    # Found: every module that holds the weights of experts.
    layers = find_moe_layers(model)
    holders = [m for m in model.modules() if sum(p.ndim == 3 for p in m.parameters(recurse=False)) > 1]
    assert [layer.experts for layer in layers] == holders
    assert len(layers) == 2

    # The rule is the router's own, on the hidden states of a real decode.
    with spying(layers) as calls:
        untouched = decode(model, tokens, PROMPT)
    for layer, seen in zip(layers, calls, strict=True):
        assert len(seen) == 1 + steps
        for call in seen:
            logits = layer.logits_of(call.router)
            assert logits.shape == (len(call.hidden), EXPERTS)
            assert call.hidden.shape[1] == layer.hidden_size
            found, wanted = by_expert(*layer.rule.route(logits)), by_expert(call.indices, call.weights)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    # Skipping loads fewer experts, none that were not chosen, and gives what the kept ones and surrogates give.
    selector = random_selector(unwrapped(model))
    with (
        spying(layers) as as_routed,
        skip_experts(model, selector.at_threshold(KINDS[name].threshold)) as skipping,
        spying(layers) as as_run,
    ):
        skipped = decode(model, tokens, PROMPT)
    assert skipping.stats.steps == steps
    assert torch.equal(skipped[0], untouched[0])
    assert not torch.allclose(skipped[1], untouched[1], atol=1e-3)
    for layer, routed_calls, run_calls in zip(layers, as_routed, as_run, strict=True):
        assert len(run_calls) == 1 + steps
        before = after = 0
        for routed, run in list(zip(routed_calls, run_calls, strict=True))[1:]:
            chosen = set(routed.indices.flatten().tolist())
            assert loaded(run) <= chosen
            before, after = before + len(chosen), after + len(loaded(run))
            wanted = kept_and_surrogates(layer, selector, routed, loaded(run))
            torch.testing.assert_close(run.output, wanted, rtol=1e-4, atol=1e-4)
        assert 0 < after < before

    # Off, it was never there.
    with skip_experts(model, selector, budget=0):
        assert all(torch.equal(a, b) for a, b in zip(decode(model, tokens, PROMPT), untouched, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(decode(model, tokens, PROMPT), untouched, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_the_reason(name: str) -> None:
    kind = REFUSED[name]
    model = build(kind)
    with pytest.raises(ModelError) as caught:
        find_moe_layers(model)
    message = str(caught.value)
    assert f"'{name}'" in message
    assert kind.reason in message
    assert "\n" not in message


@pytest.mark.skipif(transformers.__version__ not in (OLDEST, NEWEST), reason="the zoo knows the oldest and the newest")
def test_the_zoo_knows_what_is_absent() -> None:
    absent = {name for name, kind in ZOO.items() if class_of(kind) is None}
    assert absent == {name for name, kind in ZOO.items() if kind.reason == ABSENT}


@pytest.mark.skipif(transformers.__version__ != NEWEST, reason=f"the table is of transformers {NEWEST}")
def test_the_committed_table_is_what_is_true() -> None:
    assert (Path(__file__).parents[1] / "docs" / "support.md").read_text() == support_table()


@pytest.mark.skipif(transformers.__version__ != NEWEST, reason=f"the zoo is of transformers {NEWEST}")
def test_the_zoo_misses_nothing_in_transformers() -> None:
    classes = {name: class_of(kind) for name, kind in ZOO.items()}
    assert all(classes.values())
    folders = {str(found.__module__).split(".")[2] for found in classes.values() if found is not None}
    assert folders | set(NOT_DECODERS) == set(modeling())
    assert not folders & set(NOT_DECODERS)
    assert all(build(kind).config.model_type == name for name, kind in ZOO.items())
