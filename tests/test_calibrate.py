"""Calibrate: the order of the tests, and what is written when."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from flows import (
    LENGTH,
    PROMPT,
    blind,
    contents,
    one_line,
    other_revision,
    reference_flow,
    tiny_flow,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.decode.simulate import Simulation, compare
from lynx_learn.errors import CorpusError, ModelError, OptionError, SelectorError
from lynx_learn.measure.bound import FRACTIONS, threshold_at, upper_bound
from lynx_learn.measure.calibrate import (
    FEWEST_GROUPS,
    PILOT_GROUPS,
    CalibrateOptions,
    Group,
    calibrate,
    certify,
    pilot_curve,
)
from lynx_learn.moe.decision import Decision, Routing
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.moe.loading import REFERENCE, LoadedModel, load_model
from lynx_learn.selector.config import SelectorConfig, by_active
from lynx_learn.selector.prices import Prices
from lynx_learn.selector.saving import read_metrics
from lynx_learn.selector.selector import LynxSelector, ThresholdPolicy
from lynx_learn.traces.groups import decode_groups


def choices(selector: Path, **changes: Any) -> CalibrateOptions:
    options = CalibrateOptions(
        str(selector),
        corpus=str(tiny_flow().texts),
        budgets=[0.1],
        batch_sizes=[2],
        groups=12,
        length=LENGTH,
        prompt=PROMPT,
        mode="teacher",
    )
    return replace(options, **changes)


@pytest.fixture
def selector(tmp_path: Path) -> Path:
    """A copy of the trained tiny selector that a test may write to."""
    shutil.copytree(tiny_flow().selector, tmp_path / "selector")
    return tmp_path / "selector"


def cells(selector: Path, metric: str = "kl") -> dict[str, dict[str, dict[str, Any]]]:
    return read_metrics(selector)["calibrate"][metric]["cells"]


@given(
    st.lists(st.tuples(st.floats(1e-6, 10), st.floats(0, 10)), min_size=1, max_size=8),
    st.floats(1e-6, 20),
    st.floats(1e-6, 20),
)
def test_the_pilot_reads_larger_thresholds_off_for_larger_losses(
    points: list[tuple[float, float]], low: float, high: float
) -> None:
    """On any curve that does not fall, and never beyond its last threshold."""
    curve = list(zip(sorted(tau for tau, _ in points), sorted(loss for _, loss in points), strict=True))
    low, high = sorted((low, high))
    first, second = threshold_at(curve, low), threshold_at(curve, high)
    assert 0 < first <= second * (1 + 1e-9)
    assert second <= curve[-1][0] * (1 + 1e-9)


# Certification.


class Ready(NamedTuple):
    """What `certify` works on."""

    loaded: LoadedModel
    layers: list[MoeLayer]
    selector: LynxSelector
    groups: list[Group]


def ready(size: int, count: int) -> Ready:
    flow = tiny_flow()
    loaded = load_model(str(flow.model), "cpu")
    groups = decode_groups(str(flow.texts), loaded.tokenizer, "calibrate", size, LENGTH, count, seed=1)
    assert len(groups) == count
    return Ready(loaded, find_moe_layers(loaded.model), LynxSelector.from_pretrained(flow.selector), groups)


class Dented:
    """A selector whose loss is no monotone function of the threshold: at one of them it leaves out all it may."""

    def __init__(self, selector: LynxSelector, dent: float) -> None:
        self.selector, self.dent = selector, dent

    def at_threshold(self, threshold: float, prices: Prices) -> ThresholdPolicy:
        return self.selector.at_threshold(1e9 if math.isclose(threshold, self.dent, rel_tol=1e-6) else threshold)


def test_the_last_threshold_before_the_first_failure_is_taken() -> None:
    loaded, layers, selector, groups = ready(6, 16)
    budget = 0.1
    options = CalibrateOptions("unused", mode="teacher", budgets=[budget], prompt=PROMPT, length=LENGTH)
    taus = certified_taus(loaded, layers, selector, groups, options, budget)
    assert taus == sorted(set(taus))
    rest = groups[PILOT_GROUPS:]
    measured = compare(loaded.model, layers, rest, [selector.at_threshold(tau) for tau in taus], PROMPT)
    uppers = [
        max(upper_bound(values, 0.95) for values in (result.group_means("kl"), result.last_part("kl")))
        for result in measured
    ]
    passes = [upper <= budget for upper in uppers]
    last = passes.index(False) - 1 if False in passes else len(passes) - 1
    assert last >= 2  # otherwise the dent below could not be told from the end
    found = certify(loaded, layers, selector, groups, options)[budget]
    assert found["threshold"] == taus[last]
    assert found["upper"] == uppers[last] <= budget
    assert found["mean"] == measured[last].mean("kl") < found["upper"]
    assert found["experts"] == measured[last].mean_stats()["experts"]
    assert found["by_source"] == measured[last].by_source("kl")
    assert found["groups"] == len(rest)
    for dent in range(last):
        dented: Any = Dented(selector, taus[dent])
        found = certify(loaded, layers, dented, groups, options)[budget]
        assert found["threshold"] == (taus[dent - 1] if dent else 0.0)  # though later ones would pass again


class Seeing:
    """A selector that skips as another and notes which groups each threshold saw, by their first layer's input."""

    def __init__(self, selector: LynxSelector) -> None:
        self.selector = selector
        self.seen: dict[float, set[bytes]] = {}

    def at_threshold(self, threshold: float, prices: Prices) -> "SeeingPolicy":
        return SeeingPolicy(
            self.selector.at_threshold(threshold, prices=prices), self.seen.setdefault(threshold, set())
        )


class SeeingPolicy:
    name, setting = "seeing", ""

    def __init__(self, inner: ThresholdPolicy, seen: set[bytes]) -> None:
        self.inner, self.seen = inner, seen

    def bind(self, layers: list[MoeLayer]) -> None:
        self.inner.bind(layers)

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        if layer.index == 0:
            self.seen.add(routing.hidden.numpy().tobytes())
        return self.inner.decide(layer, routing)

    def own_bytes(self, layer: MoeLayer, skipped: Tensor, batches: int) -> float:
        return self.inner.own_bytes(layer, skipped, batches)


def test_thresholds_are_tested_on_other_groups_than_they_were_chosen_on() -> None:
    loaded, layers, selector, groups = ready(2, 12)
    seeing: Any = Seeing(selector)
    options = CalibrateOptions("unused", mode="teacher", budgets=[0.02, 0.1], prompt=PROMPT, length=LENGTH)
    certify(loaded, layers, seeing, groups, options)
    chosen, tested = (
        [seen for seen in seeing.seen.values() if len(seen) == count] for count in (PILOT_GROUPS, 12 - PILOT_GROUPS)
    )
    assert len(chosen) + len(tested) == len(seeing.seen)
    assert chosen
    assert len(tested) > len(FRACTIONS)
    assert all(pilot.isdisjoint(test) for pilot in chosen for test in tested)
    assert all(test == tested[0] for test in tested)


def test_nothing_is_measured_beyond_the_first_failure() -> None:
    loaded, layers, selector, groups = ready(6, 12)
    budget = 0.1
    options = CalibrateOptions("unused", mode="teacher", budgets=[budget], prompt=PROMPT, length=LENGTH)
    taus = certified_taus(loaded, layers, selector, groups, options, budget)
    seeing: Any = Seeing(Dented(selector, taus[2]))  # type: ignore[arg-type]
    certify(loaded, layers, seeing, groups, options)
    tested = sorted(tau for tau, seen in seeing.seen.items() if len(seen) == 12 - PILOT_GROUPS)
    assert tested == taus[:3]
    # The pilot, too, ends at the first threshold beyond the budget.
    whole = pilot_curve(loaded, layers, selector, groups[:PILOT_GROUPS], options)
    walked = sorted(set(seeing.seen) - set(tested))
    assert walked == [tau for tau, _ in whole[: len(walked)]]
    assert whole[len(walked) - 2][1] <= budget < whole[len(walked) - 1][1]


def certified_taus(
    loaded: LoadedModel,
    layers: list[MoeLayer],
    selector: LynxSelector,
    groups: list[Group],
    options: CalibrateOptions,
    budget: float,
) -> list[float]:
    """The thresholds that `certify` plans to test."""
    curve = pilot_curve(loaded, layers, selector, groups[:PILOT_GROUPS], options)
    return [threshold_at(curve, share * budget) for share in FRACTIONS]


def test_no_sequence_is_in_two_groups(selector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the model in a whole run: each sequence in one group alone."""
    from lynx_learn.decode import served

    made: list[Sequence[Group]] = []
    make = served.group_units
    monkeypatch.setattr(served, "group_units", lambda *args, **named: made.append(make(*args, **named)) or made[-1])
    calibrate(choices(selector, batch_sizes=[2, 4]))
    assert [(len(groups), groups[0][0].shape) for groups in made] == [(12, (2, LENGTH)), (12, (4, LENGTH))]
    for groups in made:
        rows = [tuple(row) for tokens, _ in groups for row in tokens.tolist()]
        assert len(set(rows)) == len(rows)


# The whole command.


def test_thresholds_keep_within_the_budget_and_grow_with_it(selector: Path) -> None:
    found = calibrate(choices(selector, batch_sizes=[2, 4], budgets=[0.1, 0.01, 0.03]))
    table = found.config.thresholds["kl"]
    assert list(table) == ["0.01", "0.03", "0.1"]
    for size in ("2", "4"):
        thresholds = [row[size] for row in table.values()]
        assert thresholds == sorted(set(thresholds))
        assert thresholds[0] > 0
    for budget, row in cells(selector).items():
        for size, cell in row.items():
            assert cell["threshold"] == table[budget][size]
            assert 0 < cell["mean"] < cell["upper"] <= float(budget)
            assert cell["groups"] == 12 - PILOT_GROUPS >= FEWEST_GROUPS
            assert 1 <= cell["experts"] < cell["experts_before"] <= 2 * int(size)
    assert SelectorConfig.read(selector / "config.json") == found.config
    assert LynxSelector.from_pretrained(selector).policy(0.03).skips


def test_the_text_is_noted_by_source(selector: Path) -> None:
    """Each source's share of all sequences measured; the losses by source average to the mean."""
    found = calibrate(choices(selector, batch_sizes=[2, 4], budgets=[0.05, 0.1]))
    tokenizer = load_model(str(tiny_flow().model), "cpu").tokenizer
    names: dict[str, list[list[str]]] = {}
    for size in (2, 4):
        groups = decode_groups(str(tiny_flow().texts), tokenizer, "calibrate", size, LENGTH, 12, seed=1)
        names[str(size)] = [sources for _, sources in groups]
    every = [name for groups in names.values() for group in groups for name in group]
    wanted = {source: every.count(source) / len(every) for source in ("even", "odd")}
    assert found.config.calibration["kl"]["sources"] == wanted
    for row in cells(selector).values():
        for batch, cell in row.items():
            tested = [name for group in names[batch][PILOT_GROUPS:] for name in group]
            total = sum(loss * tested.count(source) for source, loss in cell["by_source"].items())
            assert total / len(tested) == pytest.approx(cell["mean"])
            assert len(set(cell["by_source"].values())) == 2


@pytest.mark.parametrize("metric", ["kl", "agreement"])
def test_one_group_is_decoded_for_real(metric: str, selector: Path) -> None:
    """Of the largest batch size up to 16, at the largest budget; in the unit of the metric."""
    found = calibrate(choices(selector, batch_sizes=[2, 4], budgets=[0.1, 0.3], metric=metric))
    figures = read_metrics(selector)["calibrate"][metric]
    floor, real = figures["floor"], figures["real"]
    assert (floor["batch_size"], floor["steps"], floor["other"]) == (4, LENGTH - PROMPT - 1, "bfloat16")
    assert floor["cached"] < 1e-5
    assert 1e-6 < floor["precision"] < 0.05
    assert real["budget"] == "0.3"
    assert real["real"] == pytest.approx(real["simulated"], abs=1e-4)
    loaded = load_model(str(tiny_flow().model), "cpu")
    groups = decode_groups(str(tiny_flow().texts), loaded.tokenizer, "calibrate", 4, LENGTH, 12, seed=1)
    policy = found.at_threshold(found.config.thresholds[metric]["0.3"]["4"])
    wanted = compare(loaded.model, find_moe_layers(loaded.model), groups[:1], [policy], PROMPT)[0]
    assert real["simulated"] == pytest.approx(wanted.mean(metric), abs=1e-5)
    assert real["simulated"] > 0.01


def test_a_model_whose_decode_is_not_its_one_pass_is_refused(selector: Path) -> None:
    def first(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("past_key_values") is not None:
            kwargs["position_ids"] = 0 * kwargs["input_ids"]
        return args, kwargs

    before = contents(selector)
    loaded = load_model(str(tiny_flow().model), "cpu")
    loaded.model.register_forward_pre_hook(first, with_kwargs=True)
    with pytest.raises(ModelError, match="decodes with a cache otherwise than in one pass") as error:
        calibrate(choices(selector), loaded)
    one_line(error)
    assert contents(selector) == before


def test_calibrating_changes_nothing_but_thresholds_and_words(selector: Path) -> None:
    """Not the weights either, when the model runs in lower precision than it was trained in."""
    before = contents(selector)
    calibrate(choices(selector, dtype="bfloat16"))
    after = contents(selector)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"config.json", "metrics.json", "README.md"}
    assert after.keys() - before.keys() == {"run-calibrate-kl.yaml"}
    old, new = (json.loads(files["config.json"]) for files in (before, after))
    assert {key for key in old if old[key] != new[key]} == {"thresholds", "calibration"}


def test_equal_seeds_find_equal_thresholds(selector: Path) -> None:
    first = calibrate(choices(selector)).config
    assert calibrate(choices(selector)).config == first
    assert calibrate(choices(selector, seed=2)).config.thresholds != first.thresholds


@pytest.mark.parametrize("metric", ["nll", "agreement"])
def test_other_metrics_stand_beside_kl(metric: str, selector: Path) -> None:
    first, measured = calibrate(choices(selector)).config, cells(selector)
    second = calibrate(choices(selector, metric=metric, budgets=[0.5])).config
    assert cells(selector) == measured
    assert second.thresholds["kl"] == first.thresholds["kl"]
    assert second.calibration["kl"] == first.calibration["kl"]
    assert second.thresholds[metric]["0.5"]["2"] > 0
    loaded = LynxSelector.from_pretrained(selector)
    assert loaded.policy(0.5, metric).thresholds[2] == pytest.approx(second.thresholds[metric]["0.5"]["2"])
    card = (selector / "README.md").read_text()
    assert "Metric `kl`" in card
    assert f"Metric `{metric}`" in card


def test_calibrating_again_replaces(selector: Path) -> None:
    calibrate(choices(selector))
    found = calibrate(choices(selector, budgets=[0.05], batch_sizes=[4])).config
    assert list(found.thresholds["kl"]) == ["0.05"]
    assert list(found.thresholds["kl"]["0.05"]) == ["4"]
    assert list(cells(selector)) == ["0.05"]
    with pytest.raises(OptionError, match="not calibrated for a budget"):
        LynxSelector.from_pretrained(selector).policy(0.1)


def test_a_budget_that_no_threshold_keeps_skips_nothing(selector: Path) -> None:
    """Such as a small one with a selector whose predictions are useless."""
    found = calibrate(choices(blind(selector), budgets=[1e-6]))
    assert found.config.thresholds["kl"] == {"1e-06": {"2": 0.0}}
    assert not found.policy(1e-6).skips
    rows = [line for line in (selector / "README.md").read_text().splitlines() if line.startswith("| 1e-06 |")]
    assert len(rows) == 1
    assert "skips nothing" in rows[0]
    assert "100%" in rows[0]


def test_the_figures_of_training_stay(selector: Path) -> None:
    before = read_metrics(selector)
    calibrate(choices(selector))
    after = read_metrics(selector)
    assert after.pop("calibrate").keys() == {"kl"}
    assert after == before != {}
    assert "## Training" in (selector / "README.md").read_text()


# Stopped, and refused.


def test_stopping_half_way_leaves_the_selector_as_it_was(selector: Path) -> None:
    """The text is enough for the first batch size but not for the second."""
    before = contents(selector)
    with pytest.raises(CorpusError, match="sequences") as error:
        calibrate(choices(selector, batch_sizes=[2, 64]))
    one_line(error)
    assert contents(selector) == before


def interrupting_forward(rows: int) -> Any:
    """While open, every model that is given so many sequences is interrupted."""

    def stop(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape[:1] == (rows,):
            raise KeyboardInterrupt

    return register_module_forward_pre_hook(stop)


def test_an_interruption_leaves_the_selector_as_it_was(selector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a forward pass of the second batch size."""
    monkeypatch.setattr("lynx_learn.decode.simulate.TOKENS_AT_A_TIME", 1)  # one group to a pass, told by its rows
    before = contents(selector)
    with interrupting_forward(rows=4), pytest.raises(KeyboardInterrupt):
        calibrate(choices(selector, batch_sizes=[2, 4]))
    assert contents(selector) == before
    assert [p.name for p in selector.parent.iterdir()] == ["selector"]


@pytest.mark.parametrize(
    "change",
    [
        {"budgets": []},
        {"budgets": [0.1, 0.0]},
        {"budgets": [-1.0]},
        {"budgets": [math.inf]},
        {"batch_sizes": []},
        {"batch_sizes": [0]},
        {"confidence": 1.0},
        {"confidence": 0.5},
        {"groups": 0},
        {"groups": FEWEST_GROUPS + PILOT_GROUPS - 1},
        {"prompt": 0},
        {"prompt": LENGTH - 1},
        {"speculative_tokens": -1},
        {"length": PROMPT + 9, "speculative_tokens": 1},
    ],
    ids=str,
)
def test_options_that_cannot_be_used(change: dict[str, Any], selector: Path) -> None:
    with pytest.raises(OptionError) as error:
        choices(selector, **change)
    assert f"--{next(iter(change))} " in one_line(error)


def test_another_revision_of_the_model_is_refused(selector: Path, tmp_path: Path) -> None:
    before = contents(selector)
    model = other_revision(tiny_flow().model, tmp_path / "model")
    with pytest.raises(SelectorError, match="was trained for") as error:
        calibrate(choices(selector, model=str(model)))
    one_line(error)
    assert contents(selector) == before


@pytest.mark.slow
def test_a_budget_holds_on_other_text_of_the_reference_model(tmp_path: Path) -> None:
    """Measured on the test split, the loss is near what was certified on the calibration split."""
    shutil.copytree(reference_flow().selector, tmp_path / "selector")
    found = calibrate(
        CalibrateOptions(
            str(tmp_path / "selector"),
            mix={"code": 1.0},  # there are few documents of the other source
            mode="teacher",
            budgets=[0.03],
            batch_sizes=[4],
            groups=12,
            length=48,
            prompt=16,
        )
    )
    loaded = load_model(REFERENCE, "cpu", "float32")
    groups = decode_groups("python-stdlib", loaded.tokenizer, "test", 4, 48, 8, seed=1, mix={"code": 1.0})
    result = compare(loaded.model, find_moe_layers(loaded.model), groups, [found.policy(0.03)], 16)[0]
    assert 0.03 / 4 < result.mean("kl") < 0.03 * 1.25
    stats = result.mean_stats()
    assert stats["experts"] < 0.8 * stats["experts_before"]


def test_prices_are_recorded_and_measured_with(selector: Path) -> None:
    priced = calibrate(choices(selector, prices="residency:0.5"))
    assert SelectorConfig.read(selector / "config.json").calibration["kl"]["prices"] == {
        "source": "residency",
        "share": 0.5,
    }
    with pytest.raises(SelectorError, match=r"calibrated with prices residency:0\.5, not uniform"):
        priced.policy(0.1)
    assert priced.policy(0.1, prices=priced.calibrated_prices()).prices.source == "residency"
    assert "Prices of reading an expert: `residency:0.5`" in (selector / "README.md").read_text()
    assert cells(selector)["0.1"]["2"]["mean"] <= 0.1


def test_drafts_are_calibrated_with_the_tokens_that_they_follow(selector: Path) -> None:
    """Thresholds are stored under the rows of a step, and the configuration says for how many drafts they hold."""
    calibrate(choices(selector, batch_sizes=[1, 2], speculative_tokens=1, length=PROMPT + 10))
    config = SelectorConfig.read(selector / "config.json")
    assert list(config.thresholds["kl"]["0.1"]) == ["2", "4"]
    assert config.calibration["kl"]["speculative_tokens"] == 1
    assert cells(selector)["0.1"]["4"]["threshold"] == config.thresholds["kl"]["0.1"]["4"] > 0
    with pytest.warns(UserWarning, match=r"not certified for speculative_tokens 0 \(certified: 1\)"):
        skip_experts(load_model(str(tiny_flow().model)).model, LynxSelector.from_pretrained(selector), 0.1)


@pytest.mark.slow
def test_a_threshold_by_rows_loses_as_much_whoever_they_are_of() -> None:
    """Of the shipped selector, on text of the corpus: rows of several sequences, or of a few with two drafts each."""
    folder = Path(__file__).parents[1] / "selectors" / "reference-moe"
    selector = LynxSelector.from_pretrained(folder)
    options = CalibrateOptions(str(folder), length=80, prompt=32, seed=3, mode="teacher")
    loaded = load_model(REFERENCE, dtype="float32")
    layers, rows, drafts = find_moe_layers(loaded.model), 12, 2
    policy = options.at(selector, by_active(selector.config.calibrated(0.01))[rows])
    units = options.text.units(loaded, [(rows, 16), (rows // (1 + drafts), 48)])
    losses = []
    for together, count in ((1, 16), (1 + drafts, 48)):
        groups = options.text.groups(loaded, units, rows // together, count, 1)
        (found,) = Simulation(loaded.model, layers, options.prompt, together=together).compare(groups, [policy])
        losses.append(found.mean("kl"))
        spread = found.group_means("kl").std() / len(groups) ** 0.5
        print(f"{rows // together} sequences of {together}: KL {losses[-1]:.5f} (standard error {spread:.5f})")
    assert losses[0] == pytest.approx(losses[1], rel=0.25)
