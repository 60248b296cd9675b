"""Thresholds by batch size and budget, and the selector's files: what comes back, and what is refused."""

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from decisions import own, random_routing, same
from safetensors.torch import load_file, save_file
from tiny import EXPERTS, random_selector, tiny_model
from torch import Tensor

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.errors import LynxError, OptionError, SelectorError
from lynx_learn.moe.decision import Routing, used_experts
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.selector import selector as selector_module
from lynx_learn.selector.config import FORMAT_VERSION
from lynx_learn.selector.selector import LynxSelector, ThresholdPolicy

THRESHOLDS = {"kl": {"0.01": {"4": 0.5, "8": 2.0}, "0.1": {"1": 3.0}}, "nll": {"0.01": {"2": 0.25}}}


def test_a_policy_leaves_the_selector_as_it_is() -> None:
    model = tiny_model("olmoe").bfloat16()
    selector = random_selector(model)
    before = {key: value.clone() for key, value in selector.state_dict().items()}
    selector.at_threshold(1.0).bind(find_moe_layers(model))
    assert all(value.dtype == before[key].dtype for key, value in selector.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in selector.state_dict().items())


def test_any_number_of_thresholds_holds_one_copy_of_the_selector() -> None:
    model = tiny_model("qwen3_moe")
    layers = find_moe_layers(model)
    selector = random_selector(model)
    policies = [selector.at_threshold(10.0**-step) for step in range(18)]
    for policy in policies:
        policy.bind(layers)
    for layer in layers:
        parts = [[*policy.ready[layer.index].selector.parameters()] for policy in policies]
        assert len({tuple(part.data_ptr() for part in own) for own in parts}) == 1
        assert len({float(policy.ready[layer.index].thresholds.max()) for policy in policies}) == 18


def test_threshold_is_that_of_the_number_of_active_tokens() -> None:
    model = tiny_model("mixtral")
    selector = random_selector(model)
    policy = ThresholdPolicy(selector, {8: 6.0, 4: 3.0}, "", "torch")
    layer = find_moe_layers(model)[0]
    policy.bind(find_moe_layers(model))
    for count, threshold in {1: 0.0, 3: 0.0, 4: 3.0, 8: 6.0, 12: 6.0}.items():
        routing = random_routing(layer, batches=1, tokens=12)
        routing = routing._replace(active=(torch.arange(12) < count).unsqueeze(0))
        decision = policy.decide(layer, routing)
        for tau in (0.0, 3.0, 6.0):
            wanted = own(selector).decide(routing, torch.tensor([tau]))._replace(addition=None)
            assert same(decision._replace(addition=None), wanted) == (tau == threshold), count
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
        tensors["layers.1.surrogates.up"][9, 3] = value
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
    "more than any memory": (lambda f: edit_config(f, num_experts=10**12, hidden_size=10**6), "wants"),
    "more than any number": (lambda f: edit_config(f, num_experts=10**30), "cannot be loaded"),
    "no identity": (lambda f: edit_config(f, identity={"routers": [3]}), "identity"),
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
    with pytest.raises(SelectorError, match="there is no such folder") as caught:
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


@pytest.mark.parametrize("rank", [0, 4])
def test_exempt_tokens_keep_their_experts_and_do_not_count(rank: int) -> None:
    """The others are decided as alone, with the experts of exempt ones loaded anyway."""
    model = tiny_model("mixtral")
    layer = find_moe_layers(model)[0]
    policy = ThresholdPolicy(random_selector(model, rank=rank), {5: 1.0, 6: 0.0}, "")
    policy.bind(find_moe_layers(model))
    routing = random_routing(layer, batches=2, tokens=8)._replace(active=torch.arange(8).expand(2, 8) < 7)
    exempt = torch.tensor([[True, False, False, False, True, False, False, True]] * 2)
    with torch.no_grad():
        whole = policy.decide(layer, routing)
        assert torch.equal(
            whole.weights[routing.active], routing.weights[routing.active]
        )  # seven count: none is left out
        done = policy.decide(layer, routing, torch.where(exempt, torch.inf, 1.0))
        alone = policy.decide(layer, Routing(*(part[:, ~exempt[0]] for part in routing)))
    kept = exempt & routing.active
    assert torch.equal(done.weights[kept], routing.weights[kept])
    assert torch.equal(done.indices[kept], routing.indices[kept])
    assert done.loads is not None
    assert alone.loads is not None
    needed = used_experts(routing.indices, kept, EXPERTS)
    assert torch.equal(done.loads[1], alone.loads[1] | needed)
    others = done.weights[:, ~exempt[0]]
    assert ((others == 0) & (alone.weights > 0)).sum() == 0
    assert (others == 0).any()
    if rank:
        assert done.addition is not None
        assert not done.addition[kept].any()


def test_a_config_that_is_nested_without_end_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(SelectorError, match="cannot be read") as error:
        LynxSelector.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
