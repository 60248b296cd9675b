"""Statistics of experts against direct computations, from traces of tiny models."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import one_line, trace_of
from tiny import EXPERTS, FAMILIES, HIDDEN, build, tiny_model
from torch import Tensor

from lynx_learn.errors import OptionError, TraceError
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.rules import expert_stats
from lynx_learn.rules.expert_stats import measure_experts
from lynx_learn.rules.keep_sets import GateNorm
from lynx_learn.rules.substitutes import ExFold
from lynx_learn.traces.format import Trace


def everything(trace: Trace, layer: int) -> dict[str, Tensor]:
    shards = list(trace.layer_shards(layer))
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


def outputs(layer: MoeLayer, hidden: Tensor) -> Tensor:
    """`(experts, tokens, hidden)`."""
    return torch.stack([layer.expert_output(e, hidden) for e in range(layer.num_experts)])


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_are_those_of_a_direct_computation(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    layers, trace = find_moe_layers(model), trace_of(model, tmp_path / "trace")
    stats = measure_experts(layers, trace)
    assert stats.norms.shape == (len(layers), EXPERTS)
    for layer in layers:
        seen = everything(trace, layer.index)
        out = outputs(layer, seen["hidden"])
        for i in range(EXPERTS):
            routed = (seen["indices"] == i).any(1)
            mine = out[i][routed] if routed.any() else out[i]
            assert stats.norms[layer.index, i] == pytest.approx(float(mine.norm(dim=1).mean()), rel=1e-4)
            assert stats.lengths[layer.index, i] == pytest.approx(float(out[i].norm(dim=1).mean()), rel=1e-4)
            squared = float(mine.square().sum(1).mean())
            assert stats.squares[layer.index, i] == pytest.approx(squared, rel=1e-4)
        apart = out[:, None] - out[None]
        differences = apart.flatten(2).norm(dim=-1)
        torch.testing.assert_close(stats.distances[layer.index], apart.norm(dim=-1).mean(-1), rtol=1e-4, atol=1e-4)
        wanted = 1 - differences / differences.max()
        torch.testing.assert_close(stats.similarities[layer.index], wanted, rtol=1e-4, atol=1e-4)
        low, high = seen["weights"].sort(dim=1).values.unbind(1)
        torch.testing.assert_close(stats.ratios[layer.index], (low / high).sort().values)
        for key in ("hidden", "logits"):
            assert torch.equal(getattr(stats, key)[layer.index], seen[key])
        assert torch.equal(stats.indices[layer.index], seen["indices"])
        torch.testing.assert_close(stats.weights[layer.index], seen["weights"].float())


def test_an_expert_that_saw_no_token_has_its_norm_over_all_of_them(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    layers = find_moe_layers(model)
    with torch.no_grad():
        layers[0].router.get_parameter("weight")[3:5] = 0.0
    trace = trace_of(model, tmp_path / "trace")
    seen = everything(trace, 0)
    unseen = sorted(set(range(EXPERTS)) - set(seen["indices"].flatten().tolist()))
    assert unseen, "every expert saw a token, so this tests nothing"
    norms = outputs(layers[0], seen["hidden"]).norm(dim=-1).mean(-1)
    torch.testing.assert_close(measure_experts(layers, trace).norms[0][unseen], norms[unseen])


def test_a_sample_is_spread_over_the_whole_trace(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    layers, trace = find_moe_layers(model), trace_of(model, tmp_path / "trace")
    stats = measure_experts(layers, trace, tokens=4)
    seen = everything(trace, 1)
    chosen = torch.tensor([0, 24, 48, 72])
    assert trace.collected_tokens == 96
    low, high = seen["weights"][chosen].sort(dim=1).values.unbind(1)
    torch.testing.assert_close(stats.ratios[1], (low / high).sort().values)
    out = outputs(layers[1], seen["hidden"][chosen])
    torch.testing.assert_close(
        stats.distances[1], (out[:, None] - out[None]).norm(dim=-1).mean(-1), rtol=1e-4, atol=1e-4
    )


def test_chunks_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_moe")
    layers, trace = find_moe_layers(model), trace_of(model, tmp_path / "trace")
    whole = measure_experts(layers, trace)
    held: list[int] = []
    original = MoeLayer.expert_output

    def counting(self: MoeLayer, expert: int, hidden: Tensor) -> Tensor:
        held.append(len(hidden))
        return original(self, expert, hidden)

    monkeypatch.setattr(MoeLayer, "expert_output", counting)
    monkeypatch.setattr(expert_stats, "CHUNK_BYTES", 7 * 4 * EXPERTS * HIDDEN)
    parts = measure_experts(layers, trace)
    # tokens of which all experts run, and those of which the routed two do
    assert held.count(7) >= EXPERTS
    assert max(held) <= 7 * EXPERTS // 2
    for name in ("norms", "squares", "lengths", "scalars", "losses", "distances", "similarities", "ratios"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-4)


def test_pairs_are_compared_on_the_tokens_routed_to_both(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    layers, trace = find_moe_layers(model), trace_of(model, tmp_path / "trace")
    stats, layer = measure_experts(layers, trace), layers[1]
    seen = everything(trace, 1)
    found = set()
    for i, j in itertools.product(range(EXPERTS), repeat=2):
        scalar, loss = float(stats.scalars[1, i, j]), float(stats.losses[1, i, j])
        both = (seen["indices"] == i).any(1) & (seen["indices"] == j).any(1)
        if i == j:
            assert (scalar, loss) == (1.0, 0.0)
        elif not both.any():
            assert (scalar, loss) == (0.0, pytest.approx(1e30))
            found.add("unseen")
        else:
            u, v = (layer.expert_output(e, seen["hidden"][both]).double() for e in (i, j))
            w = u.norm(dim=1)
            best = float((w * (u * v).sum(1)).sum() / ((w * v.square().sum(1)).sum() + 1e-3))
            assert scalar == pytest.approx(min(4.0, max(-4.0, best)), rel=1e-3, abs=1e-6)
            left = (w * (u - scalar * v).square().sum(1)).sum() / (w * u.square().sum(1)).sum()
            assert loss == pytest.approx(float(left), rel=1e-3)
            found.add("seen")
    assert found == {"seen", "unseen"}


def test_equal_experts_are_at_distance_0_and_wholly_alike(tmp_path: Path) -> None:
    # enough experts for distances to be computed by matrix products, which leave rounding where there is none
    model = build("Qwen3Moe", num_experts=32, moe_intermediate_size=16, head_dim=16)
    layers = find_moe_layers(model)
    with torch.no_grad():
        for value in layers[0].experts.parameters():
            value[5] = value[2]
    stats = measure_experts(layers, trace_of(model, tmp_path / "trace"))
    assert stats.distances[0, 2, 5] == pytest.approx(0.0, abs=1e-2 * float(stats.norms[0].mean()))
    assert stats.similarities[0, 2, 5] == pytest.approx(1.0, abs=1e-2)
    assert stats.similarities[0].min() == 0
    assert (stats.distances.diagonal(dim1=1, dim2=2) == 0).all()
    assert (stats.similarities.diagonal(dim1=1, dim2=2) == 1).all()


def test_a_model_with_one_expert_per_token_has_no_ratios(tmp_path: Path) -> None:
    model = build("Qwen3Moe", num_experts=EXPERTS, num_experts_per_tok=1, moe_intermediate_size=48, head_dim=16)
    stats = measure_experts(find_moe_layers(model), trace_of(model, tmp_path / "trace"))
    assert stats.ratios.shape == (2, 0)
    assert torch.isfinite(stats.norms).all()


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    trace = trace_of(tiny_model("mixtral"), tmp_path / "trace")
    with pytest.raises(TraceError, match="this model differs in its routing rule") as error:
        measure_experts(find_moe_layers(tiny_model("olmoe")), trace)
    assert str(trace.folder) in one_line(error)


def test_an_expert_that_overflows_is_named(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    layers, trace = find_moe_layers(model), trace_of(model, tmp_path / "trace")
    with torch.no_grad():
        next(layers[1].experts.parameters())[3] = float("inf")
    with pytest.raises(TraceError, match="not finite") as error:
        measure_experts(layers, trace)
    assert layers[1].name in one_line(error)


def test_no_tokens_are_refused(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(OptionError, match="expected 1 or more"):
        measure_experts(find_moe_layers(model), trace_of(model, tmp_path / "trace"), tokens=0)


def shaped(**changes: Any) -> list[MoeLayer]:
    return find_moe_layers(
        build("Qwen3Moe", moe_intermediate_size=48, head_dim=16, **{"num_experts": EXPERTS, **changes})
    )


@pytest.mark.parametrize("changes", [{"num_experts": 2 * EXPERTS}, {"num_hidden_layers": 3}], ids=["experts", "layers"])
def test_statistics_of_another_shape_are_refused(changes: dict[str, int], tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    stats = measure_experts(find_moe_layers(model), trace_of(model, tmp_path / "trace"))
    stats.check(shaped())
    with pytest.raises(OptionError, match=f"of 2 layers of {EXPERTS} experts") as error:
        stats.check(shaped(**changes))
    assert "trace of this model" in one_line(error)


def test_pairs_are_measured_only_where_they_are_wanted(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    layers = find_moe_layers(model)
    trace = trace_of(model, tmp_path / "trace")
    whole, without = (measure_experts(layers, trace, pairs=pairs) for pairs in (True, False))
    assert without.scalars is without.losses is None
    assert whole.scalars is not None
    assert all(
        torch.equal(getattr(whole, name), getattr(without, name)) for name in ("norms", "similarities", "hidden")
    )
    with pytest.raises(OptionError, match="pairs=True") as error:
        ExFold(GateNorm(4, without), without).bind(layers)
    one_line(error)
