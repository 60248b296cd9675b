"""What reading an expert costs: the rule by hand for each source, and that all forms of the decision read prices alike."""

import math
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph_cases import MLP, batch, in_front, own, runner_of
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import check_rewritten, decide_one, put_between, ready_for, routing_of
from tiny import random_selector, tiny_model, words
from torch import Tensor

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.errors import OptionError, SelectorError
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.selector.prices import (
    Bytes,
    Devices,
    Offer,
    Price,
    Recent,
    Residency,
    Uniform,
    check_prices,
    level_prices,
    read_prices,
)

INF = math.inf


def kept(total: list[float], prices: Tensor, threshold: float) -> list[int]:
    """Experts that the rule keeps."""
    return [
        e for e, (cost, price) in enumerate(zip(total, prices.tolist(), strict=True)) if not cost < threshold * price
    ]


def layer_of(experts: int, index: int = 0, size: int = 8) -> Any:
    return SimpleNamespace(index=index, num_experts=experts, expert_bytes=size, device=torch.device("cpu"))


def by_levels(total: list[float], devices: list[int], threshold: float) -> list[int]:
    return kept(total, level_prices(torch.tensor(total), torch.tensor(devices)), threshold)


def test_device_load_by_hand() -> None:
    """Two devices, three experts of the first and one of the second are used."""
    total, devices = [4.0, 1.0, 0.9, 2.0, 0.0], [0, 0, 0, 1, 1]
    prices = level_prices(torch.tensor(total), torch.tensor(devices))
    # Level 1: 4 and 2, which share the price of two experts; levels 2 and 3 are one expert each, of the busiest device.
    assert prices.tolist() == pytest.approx([2 * 4 / 6, 2.0, 2.0, 2 * 2 / 6, 1.0])
    assert by_levels(total, devices, 0.46) == [0, 1, 3]  # .9 < .46 · 2
    assert by_levels(total, devices, 0.51) == [0, 3]  # 1 < .51 · 2, which with one price for all would stay
    assert by_levels(total, devices, 2.9) == [0, 3]  # the second device's one expert makes no step shorter on its own
    assert by_levels(total, devices, 3.1) == []


def test_experts_of_devices_that_are_equally_full_go_together() -> None:
    total, devices = [3.0, 1.0, 3.0, 0.1], [0, 0, 1, 1]
    # No single one of the second level shortens a step; both together cost 1.1, less than the price of two at .6.
    assert by_levels(total, devices, 0.6) == [0, 2]
    assert by_levels(total, devices, 0.5) == [0, 1, 2, 3]


def test_ties_stand_on_levels_of_their_own() -> None:
    assert level_prices(torch.tensor([1.0, 1.0, 1.0, 3.0]), torch.tensor([0, 0, 1, 1])).tolist() == pytest.approx(
        [2 * 1 / 4, 2 * 1 / 2, 2 * 1 / 2, 2 * 3 / 4]
    )


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_device_load_finds_the_best_choice(data: st.DataObject) -> None:
    """Cost of what is left out + threshold · devices · the most experts on a device, against every choice there is."""
    costs = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=7, unique=True))
    devices = data.draw(st.lists(st.integers(0, 2), min_size=len(costs), max_size=len(costs)))
    threshold = data.draw(st.integers(1, 40)) / 8 + 0.01

    def worth(chosen: Any) -> float:
        loads = [sum(k and d == device for k, d in zip(chosen, devices, strict=True)) for device in range(3)]
        left = sum(cost for k, cost in zip(chosen, costs, strict=True) if not k)
        return left + threshold * (max(devices) + 1) * max(loads)

    found = by_levels([float(c) for c in costs], devices, threshold)
    best = min(worth(chosen) for chosen in product([False, True], repeat=len(costs)))
    assert worth([e in found for e in range(len(costs))]) == pytest.approx(best)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 2.0**90, width=32), min_size=1, max_size=9))
def test_on_one_device_every_price_is_one(total: list[float]) -> None:
    assert level_prices(torch.tensor(total), torch.zeros(len(total), dtype=torch.int64)).tolist() == [1.0] * len(total)


def test_bytes_are_relative_to_the_mean() -> None:
    layers, prices = [layer_of(2, 0, 4), layer_of(2, 1, 12)], Bytes()
    prices.bind(layers)
    assert [prices.of(layer).each.tolist() for layer in layers] == [[0.5, 0.5], [1.5, 1.5]]  # type: ignore[union-attr]


def test_devices_hold_blocks() -> None:
    prices = Devices(3)
    prices.bind([layer_of(7)])
    assert prices.of(layer_of(7)).devices.tolist() == [0, 0, 0, 1, 1, 2, 2]  # type: ignore[union-attr]
    with pytest.raises(OptionError, match="the model has 2 experts"):
        prices.bind([layer_of(2)])


def test_slots_hold_what_was_used_last() -> None:
    slots = Recent(5, 2)

    def use(*experts: int) -> list[int]:
        mask = torch.zeros(5, dtype=torch.bool)
        mask[list(experts)] = True
        slots.use(mask.numpy())
        return slots.held.nonzero()[0].tolist()

    assert use(0, 3) == [0, 3]
    assert use(0) == [0, 3]
    assert use(1) == [0, 1]  # 3 was used longest ago
    assert use(0, 2) == [0, 2]
    assert use(0, 1, 2, 4) == [1, 4]  # what is held is used first, so the others come to lie there
    assert use() == [1, 4]


def test_residency_by_hand() -> None:
    """One slot, three steps: what the step before has read is free."""
    prices = Residency(0.4)
    prices.bind([layer_of(3)])
    total = torch.tensor([[2.0, 0.5, 0.0], [2.0, 0.0, 0.5], [0.2, 0.0, 2.0]])
    must = torch.zeros(3, 3, dtype=torch.bool)
    found = prices.of(layer_of(3)).of(Offer(total, torch.ones(3), must))
    # 0 is read; then it lies there and 2 is left out; then it costs next to nothing and yet stays, and 2 is read.
    assert found.tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1]]
    one_by_one = [
        prices.of(layer_of(3)).of(Offer(t[None], torch.ones(1), m[None])) for t, m in zip(total, must, strict=True)
    ]
    assert torch.equal(torch.cat(one_by_one), found)


@pytest.mark.parametrize(
    "text", ["residency", "residency:0", "residency:1.5", "devices:x", "devices:0", "bytes:2", "lowest", ""]
)
def test_sources_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="prices"):
        read_prices(text)


def test_a_selector_is_used_with_the_prices_it_was_calibrated_with() -> None:
    recorded = {"prices": Residency(0.5).describe()}
    for other in (Uniform(), Devices(2), Residency(0.25)):
        with pytest.raises(SelectorError, match=r"calibrated with prices residency:0\.5, not"):
            check_prices(other, recorded)
    check_prices(Residency(0.75), recorded)  # more that is free
    check_prices(Uniform(), {})
    with pytest.raises(SelectorError, match=r"calibrated with prices uniform, not devices:2: .*--prices devices:2"):
        check_prices(Devices(2), {})


PRICES = {
    "bytes": Price(each=torch.tensor([1.5, 0.5] * 6)),
    "residency": Price(each=(torch.arange(12) % 3 > 0).float()),
    "devices": Price(devices=torch.arange(12) // 4),
    "one": Price(torch.ones(12), torch.zeros(12, dtype=torch.int64)),
}


@pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
@pytest.mark.parametrize("keep_top1", [False, True])
@pytest.mark.parametrize("source", PRICES)
def test_the_compiled_decision_reads_prices_as_pytorch_does(source: str, keep_top1: bool) -> None:
    from lynx_learn.selector.kernels.compiled import Compiled

    different = 0
    for seed in range(20):
        routing, ready = routing_of(5, 12, 3, 8, active=1, seed=seed), ready_for(12, 3, 8, keep_top1=keep_top1)
        put_between(ready, routing)
        own_ = ready.selector
        compiled = Compiled(ready.folded, own_.surrogates, ready.thresholds, keep_top1)
        done = decide_one(compiled, routing, None, PRICES[source])
        check_rewritten(done, ready.rewrite(routing, None, PRICES[source]))
        different += not torch.equal(done.indices, ready.rewrite(routing).indices)
    assert (different > 2) == (source != "one")


@pytest.mark.parametrize("source", PRICES)
def test_the_graph_reads_prices_as_pytorch_does(source: str) -> None:
    each, devices = (None if part is None else part[:8] for part in PRICES[source])
    different = 0
    for seed in range(10):
        routing = batch(MLP, 0, 6, seed)
        part, one = own(MLP, 0), in_front(routing)
        total = part.totals(one, part.costs(one))
        threshold = float(total[total > 0].median()) * 1.01
        keep = part.keep(one, total, torch.tensor([threshold]), Price(each, devices))[1][0]
        arguments = (routing.logits, routing.indices, routing.weights, threshold, routing.hidden, routing.active)
        answer = runner_of(MLP).run(0, *arguments, each, devices)
        assert torch.from_numpy(answer.keep).tolist() == keep.tolist()
        different += keep.tolist() != part.keep(one, total, torch.tensor([threshold]))[1][0].tolist()
    assert (different > 1) == (source != "one")


def test_prices_of_one_are_bit_for_bit_the_rule_without() -> None:
    for seed in range(10):
        routing, ready = routing_of(5, 12, 3, 8, seed=seed, coarse=seed % 2 == 0), ready_for(12, 3, 8, seed=seed)
        total = ready.selector.totals(routing, ready.costs(routing))
        ready = replace(
            ready, thresholds=total[0].nanmedian().reshape(1)
        )  # the total of one of them: no room for rounding
        a, b = ready.rewrite(routing), ready.rewrite(routing, None, PRICES["one"])
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.weights, b.weights)


@pytest.mark.parametrize("text", ["residency:0.5", "devices:2", "bytes"])
def test_a_model_decodes_with_prices(text: str) -> None:
    model = tiny_model("qwen3_moe")
    thresholds = {"kl": {"0.1": {"1": 0.5}}}
    selector = random_selector(model, thresholds=thresholds)
    prompt = words(4, 6)
    generate: Any = model.generate

    def loads(prices: str, recorded: dict[str, Any]) -> list[float]:
        own_ = selector.with_config(calibration={"kl": {"prices": recorded}})
        with skip_experts(model, own_, budget=0.1, prices=prices) as skipping:
            generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        return skipping.stats.experts_after

    with pytest.raises(SelectorError, match="calibrated with prices uniform"):
        loads(text, Uniform().describe())
    priced = loads(text, read_prices(text).describe())
    assert (priced == loads("uniform", Uniform().describe())) == (text == "bytes")  # whose layers are alike


def test_residency_without_a_store_is_refused() -> None:
    model = tiny_model("mixtral")
    assert find_moe_layers(model)
    selector = random_selector(model, thresholds={"kl": {"0.1": {"1": 0.5}}})
    with pytest.raises(OptionError, match="offload_experts"):
        skip_experts(model, selector, budget=0.1, prices="residency")
