"""The threshold rule by hand, the selector's files, and what is refused."""

import errno
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EXPERTS, HIDDEN, random_selector, randomise, tiny_model
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.errors import LynxError, OptionError, SelectorError
from lynx_learn.moe.decision import Decision, Routing
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.selector import selector as selector_module
from lynx_learn.selector.config import FORMAT_VERSION
from lynx_learn.selector.features import assignment_features
from lynx_learn.selector.layer import LayerSelector, sum_in_order
from lynx_learn.selector.selector import LynxSelector, ThresholdPolicy

THRESHOLDS = {"kl": {"0.01": {"4": 0.5, "8": 2.0}, "0.1": {"1": 3.0}}, "nll": {"0.01": {"2": 0.25}}}


def own(selector: LynxSelector, layer: int = 0) -> LayerSelector:
    return selector.layers[layer]  # type: ignore[return-value]


def random_routing(layer: MoeLayer, batches: int = 3, tokens: int = 6, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batches, tokens, HIDDEN, generator=generator)
    logits = 2 * torch.randn(batches, tokens, layer.num_experts, generator=generator)
    active = torch.rand(batches, tokens, generator=generator) < 0.8
    return Routing(hidden, logits, *layer.rule.route(logits), active)


def same(a: Decision, b: Decision) -> bool:
    (x, form), (y, other) = tree_flatten(tuple(a)), tree_flatten(tuple(b))
    return form == other and all(p is q or torch.equal(p, q) for p, q in zip(x, y, strict=True))


# Three tokens of a layer with four experts. Costs by expert: 0: 5, 1: 0.25 + 0.25, 2: 0.375 + 0.125, 3: 1.
INDICES = torch.tensor([[[0, 1], [1, 2], [3, 2]]])
WEIGHTS = torch.tensor([[[0.75, 0.25], [0.625, 0.375], [0.6, 0.4]]])
COSTS = torch.tensor([[[5.0, 0.25], [0.25, 0.375], [1.0, 0.125]]])


def hand_decision(threshold: float, keep_top1: bool = False, rank: int = 0, costs: Tensor = COSTS) -> Decision:
    config = random_selector(tiny_model("mixtral"), rank=rank, keep_top1=keep_top1).config
    selector = LynxSelector(replace(config, num_experts=4, hidden_size=2))
    randomise(selector)
    active = torch.ones(1, 3, dtype=torch.bool)
    routing = Routing(torch.ones(1, 3, 2), torch.zeros(1, 3, 4), INDICES, WEIGHTS, active)
    return own(selector).decide(routing, torch.tensor([threshold]), costs)


def test_experts_below_the_threshold_together_are_left_out() -> None:
    decision = hand_decision(0.75)  # experts 1 and 2 cost 0.5 each; 0 is the anchor
    assert decision.indices.tolist() == [[[0, 0], [0, 0], [3, 0]]]
    torch.testing.assert_close(decision.weights, torch.tensor([[[0.75, 0.0], [0.0, 0.0], [0.6, 0.0]]]))
    assert decision.addition is None
    assert decision.answered is None


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_cost_equal_to_the_threshold_keeps(threshold: float) -> None:
    decision = hand_decision(threshold)
    assert torch.equal(decision.indices, INDICES)
    assert torch.equal(decision.weights, WEIGHTS)


def test_the_costliest_expert_always_stays() -> None:
    decision = hand_decision(math.inf)
    assert decision.indices.unique().tolist() == [0]
    torch.testing.assert_close(decision.weights, torch.tensor([[[0.75, 0.0], [0.0, 0.0], [0.0, 0.0]]]))


def test_keep_top1_keeps_each_first_expert() -> None:
    decision = hand_decision(math.inf, keep_top1=True)
    assert decision.indices.tolist() == [[[0, 1], [1, 0], [3, 0]]]  # only 2 is nobody's first
    torch.testing.assert_close(decision.weights, torch.tensor([[[0.75, 0.25], [0.625, 0.0], [0.6, 0.0]]]))


def test_a_cost_that_is_no_number_keeps_its_expert() -> None:
    costs = COSTS.clone()
    costs[0, 0, 1] = costs[0, 2, 1] = math.nan  # experts 1 and 2; only 3 costs less than 2
    decision = hand_decision(2.0, costs=costs)
    torch.testing.assert_close(decision.weights, torch.tensor([[[0.75, 0.25], [0.625, 0.375], [0.0, 0.4]]]))
    assert decision.indices[decision.weights > 0].tolist() == [0, 1, 1, 2, 2]
    assert decision.indices[0, 2, 0] in (1, 2)


@pytest.mark.parametrize(("batches", "tokens", "rank"), [(1, 6, 4), (1, 12, 3), (3, 6, 4)])
def test_surrogates_answer_with_the_original_weight(batches: int, tokens: int, rank: int) -> None:
    selector = random_selector(tiny_model("mixtral"), rank=rank)
    layer = find_moe_layers(tiny_model("mixtral"))[0]
    routing = random_routing(layer, batches, tokens)
    part = own(selector).surrogates
    decision = own(selector).decide(routing, torch.full((batches,), 2.0))
    assert decision.addition is not None
    assert decision.answered is not None
    wanted = torch.zeros_like(routing.hidden)
    for g, t, k in decision.answered.nonzero().tolist():
        expert, weight = int(routing.indices[g, t, k]), routing.weights[g, t, k]
        assert decision.weights[g, t, k] == 0
        if routing.active[g, t]:
            wanted[g, t] += weight * (
                part.up[expert].T @ (part.down[expert] @ routing.hidden[g, t]) + part.constant[expert]
            )
    torch.testing.assert_close(decision.addition, wanted, rtol=1e-4, atol=1e-4)
    kept = ~decision.answered & routing.active.unsqueeze(-1)
    assert torch.equal(decision.indices[kept], routing.indices[kept])
    assert torch.equal(decision.weights[kept], routing.weights[kept])
    assert 0.05 < decision.answered[routing.active].float().mean() < 0.9


def test_costs_are_scores_times_sensitivity_and_what_does_not_run_adds_none() -> None:
    model = tiny_model("olmoe")
    selector = random_selector(model)
    routing = random_routing(find_moe_layers(model)[0])
    part = own(selector)
    with torch.no_grad():
        features = assignment_features(routing.logits, routing.indices, routing.weights)
        logarithms = part.scorer(features, routing.indices, routing.hidden)
    wanted = logarithms.exp() * part.sensitivity
    torch.testing.assert_close(part.costs(routing), wanted)
    assert not routing.active.all()
    assert part.sensitivity != 1
    total = torch.zeros(len(routing.active), EXPERTS)
    for g, t in routing.active.nonzero().tolist():
        total[g].index_add_(0, routing.indices[g, t], wanted[g, t])
    torch.testing.assert_close(part.totals(routing, wanted), total)


@pytest.mark.parametrize("scorer", ["formula", "linear", "mlp"])
def test_decode_runs_the_same_costs_folded(scorer: str) -> None:
    model = tiny_model("olmoe")
    layers = find_moe_layers(model)
    selector = random_selector(model, scorer=scorer)
    policy = selector.at_threshold(1.0)
    policy.bind(layers)
    for layer in layers:
        routing = random_routing(layer, batches=3, tokens=40)
        part: LayerSelector = selector.layers[layer.index]  # type: ignore[assignment]
        torch.testing.assert_close(policy.ready[layer.index].costs(routing), part.costs(routing), rtol=1e-4, atol=1e-6)


def test_a_policy_leaves_the_selector_as_it_is() -> None:
    model = tiny_model("olmoe").bfloat16()
    selector = random_selector(model)
    before = {key: value.clone() for key, value in selector.state_dict().items()}
    selector.at_threshold(1.0).bind(find_moe_layers(model))
    assert all(value.dtype == before[key].dtype for key, value in selector.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in selector.state_dict().items())


def test_threshold_is_that_of_the_largest_size_not_above_the_active_tokens() -> None:
    model = tiny_model("mixtral")
    selector = random_selector(model)
    policy = ThresholdPolicy(selector, {8: 6.0, 4: 3.0}, "")
    layer = find_moe_layers(model)[0]
    policy.bind(find_moe_layers(model))
    for count, threshold in {1: 0.0, 3: 0.0, 4: 3.0, 7: 3.0, 8: 6.0, 12: 6.0}.items():
        routing = random_routing(layer, batches=1, tokens=12)
        routing = routing._replace(active=(torch.arange(12) < count).unsqueeze(0))
        decision = policy.decide(layer, routing)
        for tau in (0.0, 3.0, 6.0):
            assert same(decision, own(selector).decide(routing, torch.tensor([tau]))) == (tau == threshold), count
        live = routing.active
        assert torch.equal(decision.indices[live], routing.indices[live]) == (threshold == 0)
    assert policy.skips
    assert not selector.at_threshold(0.0).skips


def test_budgets_find_their_calibrated_thresholds() -> None:
    selector = random_selector(tiny_model("mixtral"), thresholds=THRESHOLDS)
    for budget, metric, thresholds in [
        (0.01, "kl", {4: 0.5, 8: 2.0}),
        (0.1, "kl", {1: 3.0}),
        (0.01, "nll", {2: 0.25}),
    ]:
        assert selector.policy(budget, metric).thresholds == thresholds
    assert not selector.policy(0).skips


@pytest.mark.parametrize(
    ("budget", "metric", "reason"),
    [
        (0.02, "kl", "not calibrated for a budget of 0.02 (calibrated: 0.01, 0.1)"),
        (0.01, "agreement", "not calibrated for metric 'agreement'"),
        (-0.01, "kl", "expected 0 or more"),
        (math.nan, "kl", "expected 0 or more"),
        (math.inf, "kl", "not calibrated"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(budget: float, metric: str, reason: str) -> None:
    model = tiny_model("mixtral")
    selector = random_selector(model, thresholds=THRESHOLDS)
    with pytest.raises(OptionError) as caught:
        skip_experts(model, selector, budget, metric)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("scorer", ["formula", "linear", "mlp"])
def test_saved_and_loaded_decides_the_same(scorer: str, rank: int, tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    layers = find_moe_layers(model)
    saved = random_selector(model, rank, scorer, THRESHOLDS, keep_top1=rank > 0)
    saved.save_pretrained(tmp_path / "selector", {"README.md": "card", "logs/loss.csv": "1,2"})
    loaded = LynxSelector.from_pretrained(tmp_path / "selector")
    assert loaded.config == saved.config
    assert (tmp_path / "selector" / "logs" / "loss.csv").read_text() == "1,2"
    for layer in layers:
        decisions = []
        for policy in (saved.policy(0.01), loaded.policy(0.01), saved.with_config(keep_top1=rank > 0).policy(0.01)):
            policy.bind(layers)
            decisions.append(policy.decide(layer, random_routing(layer, tokens=9, seed=layer.index)))
        assert same(decisions[0], decisions[1])
        assert same(decisions[0], decisions[2])
        assert not torch.equal(decisions[0].weights, random_routing(layer, tokens=9, seed=layer.index).weights)


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def drop_key(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    del values["rank"]
    (folder / "config.json").write_text(json.dumps(values))


def truncate(folder: Path) -> None:
    data = (folder / "selector.safetensors").read_bytes()
    (folder / "selector.safetensors").write_bytes(data[: len(data) // 2])


def spoil(value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "selector.safetensors")
        tensors["layers.1.surrogates.up"][2, 1, 3] = value
        save_file(tensors, folder / "selector.safetensors")

    return change


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "selector.safetensors")
    del tensors["layers.1.sensitivity"]
    save_file(tensors, folder / "selector.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown key": (lambda f: edit_config(f, temperature=1.0), "unknown keys temperature"),
    "missing key": (drop_key, "lacks rank"),
    "other format": (lambda f: edit_config(f, format_version=FORMAT_VERSION + 1), f"version {FORMAT_VERSION + 1}"),
    "unknown scorer": (lambda f: edit_config(f, scorer="tree"), "'tree'"),
    "other rank": (lambda f: edit_config(f, rank=7), "cannot be loaded"),
    "rank of another type": (lambda f: edit_config(f, rank="4"), "rank"),
    "negative rank": (lambda f: edit_config(f, rank=-1), "rank"),
    "layers of another type": (lambda f: edit_config(f, layers=2), "layers"),
    "threshold of another type": (lambda f: edit_config(f, thresholds={"kl": {"0.1": {"4": None}}}), "thresholds"),
    "threshold below 0": (lambda f: edit_config(f, thresholds={"kl": {"0.1": {"4": -1.0}}}), "thresholds"),
    "budget that is no number": (lambda f: edit_config(f, thresholds={"kl": {"low": {"4": 1.0}}}), "thresholds"),
    "batch size that is no number": (lambda f: edit_config(f, thresholds={"kl": {"0.1": {"all": 1}}}), "thresholds"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda f: (f / "selector.safetensors").unlink(), "selector.safetensors"),
    "truncated weights": (truncate, "cannot be loaded"),
    "a tensor missing": (without_a_tensor, "cannot be loaded"),
    "not a number": (spoil(math.nan), "layers.1.surrogates.up"),
    "infinite": (spoil(math.inf), "layers.1.surrogates.up"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    damage, reason = DAMAGE[case]
    random_selector(tiny_model("mixtral")).save_pretrained(tmp_path)
    LynxSelector.from_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(SelectorError) as caught:
        LynxSelector.from_pretrained(tmp_path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SelectorError, match="neither a folder nor a Hub repository") as caught:
        LynxSelector.from_pretrained(tmp_path / "nothing here")
    assert "\n" not in str(caught.value)


def test_another_model_is_refused() -> None:
    model = tiny_model("qwen3_moe")
    selector = random_selector(model)
    router = find_moe_layers(model)[1].router
    with torch.no_grad():
        next(router.parameters())[0, 0] += 1.0
    for other, reason in ((model, "routers"), (tiny_model("granitemoe"), "other ones")):
        with pytest.raises(LynxError) as caught:
            skip_experts(other, selector, budget=0)
        assert caught.type is SelectorError
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_full_disk_leaves_the_old_selector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    folder = tmp_path / "selector"
    random_selector(model, seed=1).save_pretrained(folder, {"README.md": "old"})
    before = contents(tmp_path)

    def full(tensors: dict[str, Tensor], filename: Path) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(selector_module, "save_file", full)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            random_selector(model, seed=2).save_pretrained(target, {"README.md": "new"})
        assert contents(tmp_path) == before
        assert [p.name for p in tmp_path.iterdir()] == ["selector"]
    monkeypatch.undo()
    random_selector(model, seed=2).save_pretrained(folder)
    after = contents(tmp_path)
    assert after["selector/README.md"] == b"old"
    assert after.keys() == before.keys()
    assert after["selector/selector.safetensors"] != before["selector/selector.safetensors"]


@pytest.mark.parametrize(
    ("scorer", "rank", "keep_top1", "batches", "tokens"),
    [("formula", 0, False, 3, 6), ("linear", 4, True, 1, 4), ("mlp", 4, False, 1, 20), ("mlp", 8, True, 3, 6)],
)
def test_deciding_is_one_graph_for_any_values(
    scorer: str, rank: int, keep_top1: bool, batches: int, tokens: int
) -> None:
    """No break, and no shape or branch that depends on data, from the router's output to what is run instead."""
    model = tiny_model("mixtral").to(torch.bfloat16 if rank == 8 else torch.float32)
    layer = find_moe_layers(model)[0]
    policy = random_selector(model, rank, scorer, keep_top1=keep_top1).at_threshold(2.0)
    policy.bind(find_moe_layers(model))
    policy.ready[0].selector.surrogates.form = "grouped" if rank == 8 else "dense"  # those of other devices than a CPU
    torch.compiler.reset()
    traced = torch.compile(
        lambda routing: policy.decide(layer, routing), fullgraph=True, backend="eager", dynamic=False
    )
    for seed in range(3):
        routing = random_routing(layer, batches, tokens, seed)
        routing = routing._replace(hidden=routing.hidden.to(layer.dtype))
        if seed == 2:
            routing = routing._replace(active=torch.zeros_like(routing.active))
        with torch.no_grad(), torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            assert same(traced(routing), policy.decide(layer, routing))


def test_sums_in_order_are_those_of_scatter_add() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, 6, (3, 20), generator=generator)
    values = torch.rand(3, 20, generator=generator)
    values[0, 0], values[1, 0] = torch.inf, torch.nan
    wanted = torch.zeros(3, 7).scatter_add(-1, places, values)
    torch.testing.assert_close(sum_in_order(places, values, 7), wanted, equal_nan=True)
