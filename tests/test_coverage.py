"""Coverage: right and wrong bounds on populations whose mean is known, the procedure against `calibrate`, and resuming."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from flows import LENGTH, PROMPT, contents, one_line, tiny_flow
from pool_cases import SIZE, doubles, loss_at, made_up, pool_of
from shared import SHARED
from torch import Tensor

from lynx_learn.cli import main
from lynx_learn.decode import simulate
from lynx_learn.errors import CorpusError, OptionError
from lynx_learn.measure import coverage as module
from lynx_learn.measure import pools
from lynx_learn.measure.bound import Curve, clopper_pearson, plan, upper_bound
from lynx_learn.measure.calibrate import PILOT_GROUPS, Guarantee, certify, pilot_curve, pilot_thresholds
from lynx_learn.measure.coverage import (
    CoverageOptions,
    bootstrap,
    coverage,
    figures,
    guarantees,
    read_groups,
    recertify,
    resplit,
)
from lynx_learn.measure.pools import Meter, Pool, grid
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.loading import load_model
from lynx_learn.options import parse
from lynx_learn.parts import deciding
from lynx_learn.selector.saving import read_metrics
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.traces.groups import Group

BUDGETS = [0.05, 0.1]
SHIFT = {"calibrate": ["even"], "test": ["odd"]}


# Pools that are made up: what is true of them is known.


def drawing(**changes: Any) -> CoverageOptions:
    return replace(CoverageOptions("unused", "unused", batch_sizes=[SIZE], bootstraps=600), **changes)


def plain_mean(values: Tensor, confidence: float) -> float:
    """A bound that is none."""
    return float(values.mean())


def test_a_right_bound_holds_and_is_used_well() -> None:
    """The share of overruns stays below what the confidence allows, and the bound on its own comes close to it."""
    pool, options = made_up(96, seed=0), drawing()
    for over, missed, *_ in bootstrap(pool, None, options, SIZE).values():
        assert over.sum() <= 0.05 * options.bootstraps
        assert 0.015 * options.bootstraps < missed < 0.05 * options.bootstraps
    for budget, outcomes in resplit(pool, None, options, SIZE).items():
        assert sum(o.whole > budget for o in outcomes) <= 0.03 * options.resplits
        assert sum(o.test > budget for o in outcomes) <= 0.06 * options.resplits
        assert 0.8 < sum(o.test for o in outcomes) / len(outcomes) / budget < 1.0
        assert all(o.upper <= budget for o in outcomes)


def test_a_wrong_bound_is_shown_to_fail() -> None:
    pool, options = made_up(96, seed=0), drawing()
    for over, missed, *_ in bootstrap(pool, None, options, SIZE, plain_mean).values():
        assert clopper_pearson(int(over.sum()), options.bootstraps)[0] > 0.05
        assert 0.4 * options.bootstraps < missed < 0.6 * options.bootstraps
    for budget, outcomes in resplit(pool, None, options, SIZE, plain_mean).items():
        assert sum(o.whole > budget for o in outcomes) > 0.04 * options.resplits
        assert sum(o.test > budget for o in outcomes) > 0.07 * options.resplits


def test_a_lower_confidence_is_less_careful() -> None:
    pool = made_up(96, seed=1)
    careful, bold = (bootstrap(pool, None, drawing(confidence=c), SIZE) for c in (0.99, 0.8))
    for budget in careful:
        assert careful[budget].over.sum() < bold[budget].over.sum()
        assert careful[budget].missed < 0.03 * 600 < 0.15 * 600 < bold[budget].missed
        assert careful[budget].least_bytes == bold[budget].least_bytes < bold[budget].bytes < careful[budget].bytes


def test_shares_of_the_whole_pool_tell_of_the_expected_loss() -> None:
    """Over many pools of one distribution, whose true mean is known, as over the draws from one."""
    options, wrong = drawing(resplits=1), 0
    for seed in range(400):
        ((outcome,), _) = resplit(made_up(40, seed), None, options, SIZE).values()
        wrong += loss_at_true_mean(outcome.threshold) > 0.01
    assert wrong <= 0.05 * 400


def loss_at_true_mean(tau: float) -> float:
    """The expected loss of a made-up group, by the same straight lines as the pools'."""
    pool = made_up(1, 0)
    exact = [[loss_at(t) if t else 0.0] for t in pool.thresholds.tolist()]
    return replace(pool, sums=doubles(exact).unsqueeze(1)).worst_at(tau)


def test_other_groups_that_lose_more_show_as_overruns() -> None:
    pool, other = made_up(48, seed=0), made_up(48, seed=1, scale=1.4)
    for row in figures(pool, other, drawing(bootstraps=200), SIZE):
        assert row["shift"]
        assert (row["groups"], row["test_groups"]) == (48, 48)
        assert row["test_over"] == row["pool_over"] > 0.95
        assert row["true_over_interval"][0] > 0.95
        assert 1.2 < row["test_share"] < 1.4
        assert row["bound_misses"] < 0.1  # the bound is about the text that was calibrated on
    for row in figures(pool, made_up(48, seed=1, scale=0.7), drawing(bootstraps=20), SIZE):
        assert row["test_over"] == row["true_over"] == 0.0
        assert 0.5 < row["test_share"] < 0.7


def test_a_pool_that_loses_too_much_certifies_nothing() -> None:
    """As of a selector that takes every expert to be free: any threshold leaves out all it may."""
    taus = [0.0, *grid([(tau, 1.0) for tau in pilot_thresholds(BUDGETS, SIZE)], BUDGETS)]
    losses = doubles([[float(tau > 0)] * 40 for tau in taus])
    for row in figures(pool_of(taus, losses, losses), None, drawing(bootstraps=20, budgets=BUDGETS), SIZE):
        assert row["nothing"] == 1.0
        assert row["test_over"] == row["true_over"] == 0.0
        assert row["test_share"] is row["upper_share"] is row["bytes"] is None


def test_a_row_counts_what_the_splits_and_draws_gave() -> None:
    """Shares of all splits, means of those that certified something; few groups that differ much, so that all occur."""
    pool, options = made_up(32, seed=4, spread=0.5), drawing(confidence=0.8, bootstraps=50, groups=32)
    pool = replace(pool, sums=pool.sums * 1.5)
    drawn = bootstrap(pool, None, options, SIZE)
    for row, (budget, outcomes) in zip(
        figures(pool, None, options, SIZE), resplit(pool, None, options, SIZE).items(), strict=True
    ):
        assert (row["shift"], row["batch_size"], row["budget"]) == (False, SIZE, budget)
        assert (row["groups"], row["test_groups"]) == (32, 8)
        tests, wholes = ([getattr(o, name) for o in outcomes] for name in ("test", "whole"))
        assert row["test_over"] == sum(test > budget for test in tests) / 200
        assert row["pool_over"] == sum(whole > budget for whole in wholes) / 200
        assert row["test_over"] > row["pool_over"]
        over, missed = int(drawn[budget].over.sum()), drawn[budget].missed
        assert (row["true_over"], row["bound_misses"]) == (over / 50, missed / 50)
        assert row["true_over_interval"] == clopper_pearson(over, 50)
        assert row["bound_misses_interval"] == clopper_pearson(missed, 50)
        certified = [o for o in outcomes if o.threshold > 0]
        assert 0 < len(certified) < 200
        assert row["nothing"] == pytest.approx(1 - len(certified) / 200)
        for key, values in (
            ("test_share", [o.test / budget for o in certified]),
            ("upper_share", [o.upper / budget for o in certified]),
            ("bytes", [o.bytes for o in certified]),
        ):
            assert row[key] == pytest.approx(np.mean(values))


def test_every_guarantee_is_drawn_with_several_numbers_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """What promises more is kept as well, and reads more; more groups make it sharper."""
    monkeypatch.setattr(module, "TESTED_GROUPS", (8, 32))
    pools = []
    for pool in (made_up(96, 0), made_up(96, 1)):
        # All, the last quarter, and two sources, of which the second loses more.
        sums = torch.cat([pool.sums, pool.sums, 0.5 * pool.sums, 1.5 * pool.sums], 1)
        pools.append((SIZE, replace(pool, sums=sums, counts=pool.counts.expand(4, -1))))
    rows = guarantees(pools, drawing(batch_sizes=[SIZE, 4], bootstraps=60))
    assert [(row["guarantee"], row["groups"]) for row in rows] == list(product(get_args(Guarantee), (8, 32)))
    assert all(row["true_over"] <= 0.1 and row["least_bytes"] < row["bytes"] for row in rows)
    found = {name: [row["bytes"] for row in rows if row["guarantee"] == name] for name in get_args(Guarantee)}
    assert all(few > many for few, many in found.values())
    for less, more in pairwise(("cell", "sizes", "all", "worst-source")):
        assert all(a < b for a, b in zip(found[less], found[more], strict=True))


def test_a_promise_that_covers_more_fails_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any margin each cell fails in many draws, and any of several in more of them."""
    monkeypatch.setattr(module, "TESTED_GROUPS", (16,))
    monkeypatch.setattr(module, "bootstrap", partial(bootstrap, bound=plain_mean))
    rows = guarantees([(SIZE, made_up(96, seed, spread=0.4)) for seed in range(2)], drawing(bootstraps=60))
    fails = {row["guarantee"]: row["true_over"] for row in rows}
    assert 0 < fails["cell"] < fails["sizes"] <= fails["all"]


def test_a_split_uses_each_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pilot, tested groups and the rest are disjoint, and the loss of the test is the mean of the rest."""
    pool, options = made_up(40, seed=0), drawing(resplits=5)
    drawn: list[tuple[set[int], set[int]]] = []

    def fixed(pool: Pool, pilot: Tensor, tested: Tensor, *rest: Any) -> dict[float, tuple[float, float]]:
        drawn.append((set(pilot.tolist()), set(tested.tolist())))
        return {0.01: (0.02, 0.009)}

    monkeypatch.setattr(module, "recertify", fixed)
    outcomes = resplit(pool, None, replace(options, budgets=[0.01]), SIZE)[0.01]
    for (pilot, tested), outcome in zip(drawn, outcomes, strict=True):
        assert (len(pilot), len(tested)) == (PILOT_GROUPS, options.calibration_groups - PILOT_GROUPS)
        assert not pilot & tested
        rest = [g for g in range(40) if g not in pilot | tested]
        assert len(rest) == 40 - options.calibration_groups
        assert outcome.test == pytest.approx(pool.worst_at(0.02, torch.tensor(rest)))
        assert outcome.whole == pytest.approx(pool.worst_at(0.02))
        assert outcome.bytes == pytest.approx(float(pool.bytes_at(0.02).mean()))
    assert len({frozenset(pilot) for pilot, _ in drawn}) == 5


# The whole command, on the tiny model.


def choices(out: Path, **changes: Any) -> CoverageOptions:
    options = CoverageOptions(
        str(tiny_flow().selector),
        str(out),
        corpus=str(tiny_flow().texts),
        budgets=BUDGETS,
        batch_sizes=[SIZE],
        groups=24,
        calibration_groups=12,
        resplits=20,
        bootstraps=20,
        length=LENGTH,
        prompt=PROMPT,
        mode="teacher",
    )
    return replace(options, **changes)


@cache
def measured() -> Path:
    """The folder of a run with two batch sizes; nobody may write to it."""
    run = SHARED.folder("covered", lambda folder: coverage(choices(folder / "deep" / "out", batch_sizes=[4, SIZE])))
    return run / "deep" / "out"


@cache
def shifted() -> Path:
    """The folder of a run with a shift; nobody may write to it."""

    def make(folder: Path) -> None:
        shutil.copytree(measured(), folder, dirs_exist_ok=True)
        coverage(choices(folder, shift=SHIFT))

    return SHARED.folder("covered-shifted", make)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "coverage.json").read_text())


class Measuring(Exception):
    """A model was run."""


@contextmanager
def not_measuring(error: type[BaseException] = Measuring, size: int | None = None) -> Iterator[None]:
    """While open, measuring a pool (of groups of that size) raises the error."""
    own = Meter._measure

    def stop(meter: Meter, groups: list[Group], thresholds: list[float], sources: list[str]) -> dict[str, Tensor]:
        if size in (None, len(groups[0][1])):
            raise error
        return own(meter, groups, thresholds, sources)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meter, "_measure", stop)
        yield


def test_what_calibrate_certifies_is_certified_again(tmp_path: Path) -> None:
    """The same groups in the same parts give the same plan; bounds are read between measured thresholds, hence nearly."""
    options = choices(tmp_path)
    loaded = load_model(str(tiny_flow().model), "cpu")
    selector, layers = LynxSelector.from_pretrained(tiny_flow().selector), find_moe_layers(loaded.model)
    groups = read_groups(options, loaded, SIZE, None, 24)
    pool = Meter(tmp_path, options.procedure(), selector, loaded).pool(groups)
    found = 0
    for seed in (0, 2):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:12]
        own = [groups[i] for i in order]
        cells = certify(loaded, layers, selector, own, options.procedure())
        plans = plan(pilot_curve(loaded, layers, selector, own[:PILOT_GROUPS], options.procedure()), BUDGETS)
        again = recertify(pool, order[:PILOT_GROUPS], order[PILOT_GROUPS:], options, SIZE, upper_bound)
        for budget, (tau, upper) in again.items():
            steps = [0.0, *plans[budget]]
            place = min(range(len(steps)), key=lambda i: abs(steps[i] - tau))
            assert tau == pytest.approx(steps[place], rel=1e-6)
            assert abs(place - steps.index(cells[budget]["threshold"])) <= 1
            if tau:
                result = simulate.compare(
                    loaded.model, layers, own[PILOT_GROUPS:], [selector.at_threshold(tau)], PROMPT
                )[0]
                guarded = (result.group_means("kl"), result.last_part("kl"))
                assert upper == pytest.approx(max(upper_bound(values, 0.95) for values in guarded), rel=0.2)
                found += 1
    assert found >= 3


def test_the_report_is_what_is_written() -> None:
    report = report_of(measured())
    assert {path.split("/")[0] for path in contents(measured())} == {"coverage.json", "pools"}
    assert report["options"] == deciding(choices(measured(), batch_sizes=[4, SIZE]))
    assert report["base_model"] == str(tiny_flow().model)
    assert report["sources"] == {"even": pytest.approx(0.5, abs=0.1), "odd": pytest.approx(0.5, abs=0.1)}
    assert sum(report["sources"].values()) == pytest.approx(1.0)
    places = [(row["shift"], row["batch_size"], row["budget"]) for row in report["rows"]]
    assert places == [(False, size, budget) for size in (SIZE, 4) for budget in BUDGETS]
    places = [(row["shift"], row["batch_size"], row["budget"]) for row in report_of(shifted())["rows"]]
    assert places == [(shift, SIZE, budget) for shift in (False, True) for budget in BUDGETS]
    for row in [*report["rows"], *report_of(shifted())["rows"]]:
        assert row["nothing"] < 1
        assert 0.5 < row["upper_share"] <= 1
        assert 0.3 < row["bytes"] < 1.1
        assert row["true_over_interval"][0] <= row["true_over"] <= row["true_over_interval"][1]
        assert 0.4 < row["test_share"] < 1.3


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    """Nor for another confidence or guarantee, other draws, or without the shift; the figures follow those options."""
    shutil.copytree(measured(), tmp_path / "out")
    options = choices(tmp_path / "out", batch_sizes=[SIZE], confidence=0.6, guarantee="sizes", resplits=10)
    with not_measuring():
        report = coverage(options)
    assert len(report["rows"]) == 2
    assert report["exact"]["true_over"] == pytest.approx(0.4)
    for row, careful in zip(report["rows"], report_of(measured())["rows"], strict=False):
        assert row["test_share"] > careful["test_share"]


@pytest.mark.parametrize("change", [{"metric": "nll"}, {"budgets": [0.1]}, {"seed": 4}, {"prompt": 9}], ids=str)
def test_what_other_options_decide_is_measured(change: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(measured(), tmp_path / "out")
    with not_measuring(), pytest.raises(Measuring):
        coverage(choices(tmp_path / "out", **change))


def test_another_selector_or_text_is_measured(tmp_path: Path) -> None:
    shutil.copytree(measured(), tmp_path / "out")
    shutil.copytree(tiny_flow().selector, tmp_path / "selector")
    shutil.copytree(tiny_flow().texts, tmp_path / "texts")
    options = choices(tmp_path / "out", selector=str(tmp_path / "selector"), corpus=str(tmp_path / "texts"))
    with not_measuring():
        coverage(options)  # moved, but equal
    text = (tmp_path / "texts" / "even.jsonl").read_text()
    (tmp_path / "texts" / "even.jsonl").write_text(text.replace("router", "batch"))
    with not_measuring(), pytest.raises(Measuring):
        coverage(options)
    (tmp_path / "texts" / "even.jsonl").write_text(text)
    other = LynxSelector.from_pretrained(tmp_path / "selector")
    other.layers[0].sensitivity.mul_(1.01)  # type: ignore[operator]
    other.save_pretrained(tmp_path / "selector")
    with not_measuring(), pytest.raises(Measuring):
        coverage(options)


def test_an_interrupted_run_goes_on_to_the_same_report(tmp_path: Path) -> None:
    """Stopped in the second batch size, and again after the first one's file was damaged, as a crash may do it."""
    out = tmp_path / "out"
    options = choices(out, batch_sizes=[4, SIZE])
    with not_measuring(KeyboardInterrupt, size=4), pytest.raises(KeyboardInterrupt):
        coverage(options)
    (file,) = (out / "pools").iterdir()  # its groups share one pass
    assert file.name.startswith(f"batch-{SIZE}-")
    assert not (out / "coverage.json").exists()
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with not_measuring(), pytest.raises(Measuring):
        coverage(options)
    file.write_bytes(whole)
    with not_measuring(size=SIZE):
        coverage(options)
    again = {name: data for name, data in contents(out).items() if name != "coverage.json"}
    assert again == {name: data for name, data in contents(measured()).items() if name != "coverage.json"}
    first, second = report_of(measured()), report_of(out)
    assert {**second, "options": {**second["options"], "out": str(measured())}} == first


def test_a_shift_calibrates_on_some_sources_and_tests_on_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is run: groups of all sources, of the first ones alone, of the others alone; the last at the second's grid."""
    seen: list[tuple[set[str], int, list[str]]] = []
    run = simulate.compare

    def spy(model: Any, layers: Any, groups: Any, policies: Any, *rest: Any, **more: Any) -> Any:
        seen.append(({n for _, names in groups for n in names}, len(groups), [p.setting for p in policies]))
        return run(model, layers, groups, policies, *rest, **more)

    made: list[Curve] = []
    monkeypatch.setattr(pools, "compare", spy)
    monkeypatch.setattr(pools, "grid", lambda curve, budgets: made.append(curve) or grid(curve, budgets))  # type: ignore[func-returns-value]
    coverage(choices(tmp_path, shift=SHIFT, groups=25))
    assert [(names, count) for names, count, _ in seen] == [({"even", "odd"}, 25), ({"even"}, 16), ({"odd"}, 9)]
    assert seen[1][2] == seen[2][2]
    assert len(made) == 2


def test_groups_of_a_pool_are_of_all_splits_and_share_no_sequence() -> None:
    flow, options = tiny_flow(), choices(Path("unused"))
    loaded = load_model(str(flow.model), "cpu")
    groups = read_groups(options, loaded, SIZE, None, 24)
    found = [tuple(row) for tokens, _ in groups for row in tokens.tolist()]
    assert len(set(found)) == len(found) == 24 * SIZE
    for split in ("calibrate", "test"):
        alone = read_groups(replace(options, split=[split]), loaded, SIZE, None, 24)
        own = {tuple(row) for tokens, _ in alone for row in tokens.tolist()}
        assert own & set(found)
    fitted = read_groups(replace(options, split=["fit"]), loaded, SIZE, None, 100)
    assert not {tuple(row) for tokens, _ in fitted for row in tokens.tolist()} & set(found)


def test_the_card_takes_the_figures_and_nothing_else_changes(tmp_path: Path) -> None:
    """The figures of training stay; without --card the selector is left alone."""
    folder = tmp_path / "selector"
    shutil.copytree(tiny_flow().selector, folder)
    before = contents(folder)
    coverage(choices(tmp_path / "out", selector=str(folder)))
    assert contents(folder) == before
    report = coverage(choices(tmp_path / "out", selector=str(folder), card=True))
    after = contents(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"README.md", "metrics.json", "run-coverage.yaml"}
    assert read_metrics(folder) == {**json.loads(before["metrics.json"]), "coverage": report}
    assert "## Coverage" in (folder / "README.md").read_text()


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option in the spelling of a terminal; the table says what was found, and what an exact bound would show."""
    shutil.copytree(shifted(), tmp_path / "out")
    words = (
        f"--selector {tiny_flow().selector} --out {tmp_path / 'out'} --corpus {tiny_flow().texts} --length {LENGTH} "
    )
    words += f"--prompt {PROMPT} --mode teacher --groups 24 --calibration-groups 12 --resplits 20 --bootstraps 20 --batch-sizes {SIZE} "
    given = [*words.split(), "--budgets", "0.05", "0.1", "--split", "calibrate", "test", "--shift", json.dumps(SHIFT)]
    assert parse("coverage", CoverageOptions, given) == choices(tmp_path / "out", shift=SHIFT)
    capsys.readouterr()
    with not_measuring():
        assert main(["coverage", *given]) == 0
    out = capsys.readouterr().out
    report = report_of(tmp_path / "out")
    assert all(len(line) <= 80 for line in out.splitlines())
    out, _, below = out.partition("Every guarantee, 20 independent calibrations")
    rows = re.split(r"\n(?=0\.|exact)", out.partition("─\n")[2])
    assert [row.split()[0] for row in rows] == ["0.05", "0.1", "0.05,", "0.1,", "exact"]
    for text, row in zip(rows, report["rows"], strict=False):
        low, high = row["true_over_interval"]
        wanted = {f"{row['test_over']:.1%}", f"{row['test_share']:.2f}", f"{100 * low:.1f}–{high:.1%}"}
        assert wanted <= set(text.split())
        assert ("shifted" in text) == row["shift"]
    assert f" {report['exact']['test_over']:.1%} " in rows[-1]
    shown = [line.split()[:3] for line in below.partition("─\n")[2].splitlines() if line.strip()]
    assert shown == [[r["guarantee"], str(r["groups"]), f"{r['true_over']:.1%}"] for r in report["guarantees"]]


# What is refused.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"budgets": []}, "--budgets is empty"),
        ({"confidence": 1.0}, "--confidence 1 "),
        ({"prompt": 0}, "--prompt 0 "),
        ({"batch_sizes": [0]}, "--batch_sizes 0 "),
        ({"calibration_groups": 11}, "--calibration_groups 11 is not usable: expected 12 or more"),
        ({"groups": 19}, "--groups 19 is not usable: expected 20 or more"),
        ({"groups": 23, "shift": SHIFT}, "--groups 23 is not usable with --shift: expected 24 or more"),
        ({"resplits": 0}, "--resplits 0 "),
        ({"bootstraps": 0}, "--bootstraps 0 "),
        ({"split": []}, "--split (nothing) "),
        ({"split": ["test", "test"]}, "--split test test "),
        ({"split": ["all", "test"]}, "--split all test "),
        ({"shift": {"calibrate": ["even"]}}, "--shift "),
        ({"shift": {"calibrate": ["even"], "test": []}}, "--shift "),
        ({"shift": {"calibrate": ["even"], "test": ["odd", "even"]}}, "--shift "),
    ],
    ids=str,
)
def test_options_that_cannot_be_used(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as error:
        choices(tmp_path, **change)
    assert reason in one_line(error)


def test_a_shift_of_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"names strange, .*: expected some of even, odd") as error:
        coverage(choices(tmp_path / "out", shift={"calibrate": ["even"], "test": ["strange"]}))
    one_line(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shift", [None, SHIFT], ids=["", "shift"])
def test_too_little_text_for_one_batch_size_is_said_before_any_is_measured(shift: Any, tmp_path: Path) -> None:
    options = choices(tmp_path / "out", batch_sizes=[SIZE, 8], groups=60, shift=shift)
    with pytest.raises(
        CorpusError, match=r"sequences of 32 tokens .* groups of 8 without a common document are needed"
    ) as error:
        coverage(options)
    one_line(error)
    assert not (tmp_path / "out").exists()


def test_a_budget_far_beyond_the_pilot_is_no_hindrance(tmp_path: Path) -> None:
    """No threshold loses so much: the plan ends at the pilot's largest, which loses little."""
    report = coverage(choices(tmp_path, budgets=[50.0]))
    (row,) = report["rows"]
    assert row["nothing"] == 0.0
    assert row["test_share"] < 0.5
