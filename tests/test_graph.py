"""The exported graph decides as PyTorch does, on every layer and for every number of tokens."""

import math

import numpy as np
import pytest
import torch
from graph_cases import (
    KINDS,
    LAYERS,
    MLP,
    SIZES,
    Kind,
    ask,
    batch,
    content,
    in_front,
    own,
    runner_of,
    selector_of,
)

from lynx_learn.errors import LynxError
from lynx_learn.graph import graph as graph_module
from lynx_learn.graph.check import check, compare, middle
from lynx_learn.graph.graph import to_bytes
from lynx_learn.graph.onnx_runtime import OnnxSelector
from lynx_learn.moe.decision import Routing

# Parity.


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_every_layer_decides_as_pytorch(kind: Kind, tokens: int) -> None:
    for layer in range(LAYERS):
        routing = batch(kind, layer, tokens, seed=tokens)
        part, one = own(kind, layer), in_front(routing)
        costs = part.costs(one)
        totals = part.totals(one, costs)
        for threshold in (0.0, middle(totals), math.inf):
            answer = ask(runner_of(kind), layer, routing, threshold)
            torch.testing.assert_close(torch.from_numpy(answer.costs), costs[0], rtol=1e-4, atol=1e-9)
            keep = part.keep(one, totals, torch.tensor([threshold]))[1][0]
            decision = part.decide(one, torch.tensor([threshold]), costs)
            sure = (totals[0] - threshold).abs() > 1e-4 * max(threshold, 1e-9)
            assert torch.equal(torch.from_numpy(answer.keep)[sure], keep[sure])
            if sure.all():
                assert torch.equal(torch.from_numpy(answer.run_indices), decision.indices[0])
                assert torch.equal(torch.from_numpy(answer.run_weights), decision.weights[0])
                assert (answer.addition is None) == (part.surrogates.rank == 0)
                if answer.addition is not None:
                    given = torch.from_numpy(answer.addition)
                    torch.testing.assert_close(given, decision.addition[0], rtol=1e-4, atol=1e-4)  # type: ignore[index]
        assert answer.keep.sum() < len(answer.keep) or kind[1] or kind[2] == 1


def test_thresholds_between_two_totals_are_decided_alike_bit_by_bit() -> None:
    """No bit of these is within rounding of the threshold, so every one of them has been compared above."""
    for kind in KINDS:
        for layer in range(LAYERS):
            _, relative, bits, differing = compare(own(kind, layer), runner_of(kind), layer, batch(kind, layer, 40))
            assert relative < 1e-4
            assert (bits, differing) == (kind[2], 0)


def test_layers_differ_and_are_chosen_by_their_index() -> None:
    routing = batch(MLP, 0, 9)
    costs = [ask(runner_of(MLP), layer, routing, 1.0).costs for layer in range(LAYERS)]
    assert all(np.abs(costs[a] / costs[b] - 1).max() > 0.1 for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_with_an_infinite_threshold_the_dearest_stays_and_first_experts_if_wanted(kind: Kind) -> None:
    routing = batch(kind, 1, 3)
    routing = routing._replace(active=torch.tensor([True, False, True]))
    answer = ask(runner_of(kind), 1, routing, math.inf)
    total = own(kind, 1).totals(in_front(routing), own(kind, 1).costs(in_front(routing)))[0]
    wanted = {int(total.argmax())}
    if kind[1]:
        wanted |= set(routing.indices[routing.active, routing.weights[routing.active].argmax(-1)].tolist())
    assert set(np.flatnonzero(answer.keep).tolist()) == wanted
    used = set(routing.indices[routing.active].flatten().tolist())
    stays = torch.tensor([expert in wanted & used for expert in routing.indices[1].tolist()])
    assert torch.equal(torch.from_numpy(answer.run_weights[1]), routing.weights[1] * stays), "on what others load"
    assert set(answer.run_indices.flatten().tolist()) <= wanted


def test_tokens_that_are_not_active_count_for_nothing() -> None:
    routing = batch(MLP, 2, 24, seed=5)
    live = routing.active
    assert 0 < int(live.sum()) < 24
    costs = own(MLP, 2).costs(in_front(routing))
    tau = middle(own(MLP, 2).totals(in_front(routing), costs))
    answer = ask(runner_of(MLP), 2, routing, tau)
    alone = ask(runner_of(MLP), 2, Routing(*(part[live] for part in routing)), tau)
    assert np.array_equal(answer.keep, alone.keep)
    assert np.array_equal(answer.run_weights[live.numpy()], alone.run_weights)
    everyone = routing._replace(active=torch.ones(24, dtype=torch.bool))
    assert not np.array_equal(answer.keep, ask(runner_of(MLP), 2, everyone, tau).keep)
    default = runner_of(MLP).run(2, routing.logits, routing.indices, routing.weights, tau, routing.hidden)
    assert np.array_equal(default.keep, ask(runner_of(MLP), 2, everyone, tau).keep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_converted(dtype: torch.dtype) -> None:
    routing = batch(MLP, 0, 5)
    low = Routing(*(part.to(dtype) if part.is_floating_point() else part for part in routing))
    plain = Routing(*(part.float() if part.is_floating_point() else part for part in low))
    arrays = [None if part is None else part.numpy() for part in plain]
    hidden, logits, indices, weights, active = arrays
    answers = [
        ask(runner_of(MLP), 0, low._replace(indices=routing.indices.int()), 1.0),
        ask(runner_of(MLP), 0, plain, 1.0),
        runner_of(MLP).run(0, logits, indices, weights, 1.0, hidden, active),
    ]
    for answer in answers[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(answers[0][:-1], answer[:-1], strict=True))
        assert np.allclose(answers[0].addition, answer.addition)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_cuda_decides_as_pytorch(kind: Kind) -> None:
    try:
        runner = OnnxSelector(content(kind), "cuda")
    except LynxError as error:
        pytest.skip(str(error))
    assert runner.provider == "CUDAExecutionProvider"
    assert check(selector_of(kind), runner, SIZES).relative < 1e-3


def test_scorers_that_no_file_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "LARGEST", 1000)
    with pytest.raises(LynxError, match=r"an \.onnx file holds 2 GiB"):
        to_bytes(selector_of(MLP))
