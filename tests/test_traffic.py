"""Steps of a trace: decisions equal to those at decode, requests that wait, and the command as a whole."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated, one_line, tiny_flow
from hypothesis import given, settings
from hypothesis import strategies as st
from traffic_cases import Routes, traffic

from lynx_learn import LynxSelector, find_moe_layers, load_model
from lynx_learn.cli import main
from lynx_learn.errors import LynxError, OptionError
from lynx_learn.hardware.simulate import SimulateOptions, simulate
from lynx_learn.hardware.traffic import Selection, Source, Traffic, buffered, largest
from lynx_learn.moe.decision import Routing
from lynx_learn.offload.replay import halves
from lynx_learn.selector.prices import Devices, Price
from lynx_learn.show.speed import measured_table, simulation_table
from lynx_learn.traces.format import Trace

HARDWARE = Path(__file__).parents[1] / "data" / "hardware"
cases = settings(deadline=None, derandomize=True, max_examples=50)


def test_sums_and_losses_by_hand() -> None:
    steps = traffic([[[[0, 1], [0, 2]]], [[[3, 1], [0, 1]]]], experts=4, cost=0.5)
    assert steps.counts().tolist() == [[[2, 1, 1, 0]], [[1, 2, 0, 1]]]
    assert steps.counts(torch.tensor([True, False])).tolist() == [[[1, 1, 0, 0]], [[0, 1, 0, 1]]]
    keep = torch.tensor([[[True, False, True, True]], [[False, True, True, True]]])
    assert steps.loss(keep) == (0.5 + 0.5) / 4


def test_the_largest_scale_within_a_limit() -> None:
    found = largest(lambda scale: torch.tensor(scale), float, 3.0)
    assert 2.99 < float(found) <= 3.0
    assert float(largest(lambda scale: torch.tensor(scale), float, 0.0)) == pytest.approx(1e-6)


def read() -> tuple[Source, LynxSelector]:
    selector = LynxSelector.from_pretrained(calibrated())
    trace = Trace.open(tiny_flow().trace)
    with torch.no_grad():
        return Source.read(trace, *halves(trace), selector), selector


@pytest.mark.parametrize("prices", [None, Devices(2)], ids=["one price", "devices"])
def test_decisions_are_those_at_decode(prices: Devices | None) -> None:
    source, selector = read()
    steps = source.traffic(4, 20)
    layers = find_moe_layers(load_model(str(tiny_flow().model)).model)
    totals = steps.sums(steps.costs)[steps.counts() > 0].sort().values
    threshold = float(totals[len(totals) // 2 :][:2].mean())
    policy = selector.at_threshold(threshold, "torch", prices)
    policy.bind(layers)
    selection = Selection(selector, torch.tensor([0.0, threshold]))
    keep = selection.keep(steps, None if prices is None else [Price(devices=torch.arange(8) * 2 // 8)] * 2)
    trace = Trace.open(tiny_flow().trace)
    for layer in layers:
        parts = {
            key: torch.cat([shard[key] for shard in trace.layer_shards(layer.index)]) for key in ("hidden", "logits")
        }
        # Steps hold what was routed, but not which token that was.
        rows = source_rows(source, steps)
        routing = Routing(
            parts["hidden"][rows],
            parts["logits"][rows],
            steps.indices[:, layer.index],
            steps.weights[:, layer.index],
            steps.active[:, layer.index],
        )
        decision = policy.decide(layer, routing)
        assert decision.loads is not None
        used, run = decision.loads
        assert (used == (steps.counts()[:, layer.index] > 0)).all()
        assert (run == keep[:, layer.index]).all()
        assert 0 < run.sum() < used.sum()


def source_rows(source: Source, steps: Traffic) -> Any:
    from lynx_learn.offload.replay import read_steps

    size, count = steps.indices.shape[2], len(steps.indices)
    return read_steps(source.trace, size, count, source.rows, source.routed).tokens


@st.composite
def routes(draw: st.DrawFn) -> Routes:
    """Up to six steps of two layers and three requests, which use one or two of four experts."""
    steps, top_k = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    experts = st.permutations(range(4)).map(lambda order: list(order[:top_k]))
    return draw(
        st.lists(
            st.lists(st.lists(experts, min_size=3, max_size=3), min_size=2, max_size=2),
            min_size=steps,
            max_size=steps,
        )
    )


@cases
@given(routes(), st.sampled_from([0.0, 0.25, 1.0]))
def test_who_waits_misses_nothing(given: Routes, slack: float) -> None:
    steps = traffic(given, experts=4)
    found = buffered(steps, slack)
    count, layers, requests, _ = steps.indices.shape
    finished = []
    for request in range(requests):
        ran = [
            [
                found.indices[step, layer, request].tolist()
                for step in range(len(found.active))
                if found.active[step, layer, request]
            ]
            for layer in range(layers)
        ]
        # Every layer runs its tokens in order, each once; earlier layers are at most one token ahead.
        for layer, own in enumerate(ran):
            assert own == [given[step][layer][request] for step in range(len(own))]
        lengths = [len(own) for own in ran]
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] - lengths[-1] <= 1
        finished.append(lengths[-1])
        pauses = len(found.active) - lengths[-1]
        assert pauses <= slack * lengths[-1] + 1e-9
    assert found.tokens == sum(finished)
    assert max(finished) == count
    if not slack:
        assert torch.equal(found.indices, steps.indices)
        assert found.active.all()


def test_waiting_for_company_by_hand() -> None:
    """One layer. In the second step request 0 waits for its expert 1, which in the third request 1 wants too."""
    steps = traffic([[[[0], [0]]], [[[1], [0]]], [[[2], [1]]]], experts=3)
    found = buffered(steps, 1.0)
    assert found.active[:, 0].tolist() == [[True, True], [False, True], [True, True]]
    assert found.counts()[:, 0].tolist() == [[2, 0, 0], [1, 0, 0], [0, 2, 0]]
    assert found.tokens == 5


def options(kind: str, **changes: Any) -> SimulateOptions:
    (file,) = HARDWARE.glob(f"{kind}-*.yaml")
    given = {"selector": str(calibrated()), "budget": 0.1, "batch_sizes": [2, 4], "steps": 12, **changes}
    return SimulateOptions(str(file), str(tiny_flow().trace), **given)


@pytest.mark.parametrize(
    ("kind", "unit", "rules"), [("devices", "seconds", 8), ("chiplets", "seconds", 9), ("helpers", "joules", 4)]
)
def test_a_trace_is_simulated(kind: str, unit: str, rules: int, tmp_path: Path) -> None:
    report = tmp_path / "simulated.json"
    found = simulate(options(kind, model=str(tiny_flow().model), report=str(report)))
    assert (found["simulated"], found["kind"]) == (True, kind)
    assert [row["batch_size"] for row in found["rows"]] == [2] * rules + [4] * rules
    for size in (2, 4):
        rows = {row["rule"]: row for row in found["rows"] if row["batch_size"] == size}
        first = next(iter(rows.values()))
        assert first["loss"] == 0 < first[unit]
        # What leaves something out is never slower than the same without, and loses no more than the budget's choice.
        for name, row in rows.items():
            if name.endswith(", selection"):
                plain = rows["EP, replicas, METRO" if name.startswith("METRO") else name.removesuffix(", selection")]
                assert row[unit] <= plain[unit] * 1.001
                assert row["loss"] > 0
        if kind == "helpers":
            sift, own = (rows[name] for name in list(rows)[1:3])
            assert own["joules"] <= sift["joules"] * 1.05  # but for a bound that no price meets exactly
        else:
            limit = rows["EP, selection"]["loss"] * 1.001
            assert all(row["loss"] <= limit for name, row in rows.items() if "buffered" not in name)
    assert json.loads(report.read_text()) == found


def test_without_a_selector_nothing_is_left_out() -> None:
    for kind in ("devices", "chiplets"):
        rows = simulate(options(kind, selector=None))["rows"]
        assert all(row["loss"] == 0 for row in rows)
        assert not any("selection" in row["rule"] for row in rows)


@pytest.mark.parametrize("change", [{"batch_sizes": [0]}, {"batch_sizes": []}, {"steps": 0}], ids=str)
def test_options_that_cannot_be_used(change: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"--{next(iter(change))}"):
        options("devices", **change)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("helpers", {}, "needs --selector, and --model"),
        ("helpers", {"selector": None, "model": "m"}, "needs --selector, and --model"),
        ("devices", {"budget": 0.5}, "not calibrated for a budget of 0.5"),
        ("devices", {"batch_sizes": [500]}, "batches of 500 need more"),
        ("devices", {"selector": "selectors/reference-moe"}, "was trained for reference-moe"),
        ("devices", {"levels": [0.01]}, "--levels is for hardware of helpers"),
        ("devices", {"hardware": "missing.yaml"}, "--hardware missing.yaml cannot be read"),
        ("devices", {"trace": "missing"}, "missing holds no trace"),
    ],
    ids=str,
)
def test_what_cannot_be_simulated(
    kind: str, change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    given = SimulateOptions(**{**vars(options(kind)), **change})
    with pytest.raises(LynxError, match=reason) as error:
        simulate(given)
    one_line(error)


def test_energy_at_equal_measured_loss() -> None:
    """More loss takes less energy; the sequences that decode are those whose steps are replayed."""
    source, _ = read()
    index = source.trace.index()
    tokens = source.groups(4, 20)
    assert sum(own.shape[1] for own in tokens) <= 20
    first = index["sequence"][source.rows].unique()[:4]
    rows = [index["tokens"][index["sequence"] == number][: tokens[0].shape[1]] for number in first]
    assert torch.equal(tokens[0], torch.stack(rows).long())
    given = options("helpers", model=str(tiny_flow().model), batch_sizes=[4], levels=[0.02, 0.05])
    found = simulate(given)["measured"]
    by_rule: dict[str, list[float]] = {}
    for row in found:
        by_rule.setdefault(row["rule"], []).append(row["energy"])
    assert len(by_rule) == 3
    for less, more in by_rule.values():
        assert 0 < more < less < 1
    table = measured_table({"measured": found, "model": "m", "hardware": "h"})
    assert table.head == ["batch, rule", "KL 0.02", "KL 0.05"]
    assert table.rows[0] == [f"4, {found[0]['rule']}", *(f"{energy:.2f}" for energy in by_rule[found[0]["rule"]])]


def test_a_die_must_hold_an_expert(tmp_path: Path) -> None:
    text = (HARDWARE / "chiplets-4.yaml").read_text().replace("8.0e+6", "8")
    (tmp_path / "small.yaml").write_text(text)
    given = vars(options("chiplets")) | {"hardware": str(tmp_path / "small.yaml")}
    with pytest.raises(LynxError, match="8 bytes of memory on a die is not usable"):
        simulate(SimulateOptions(**given))


def test_the_command_says_that_it_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--hardware", str(HARDWARE / "devices-8.yaml"), "--trace", str(tiny_flow().trace), "--batch-sizes", "2"]
    assert main(["--quiet", "simulate", *words, "--steps", "5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Simulated: ")
    assert "1.00" in out
    assert "METRO" in out


def test_the_page_shows_what_the_command_prints() -> None:
    """And in it the published orderings, for both models at every batch size."""
    page = (HARDWARE.parents[1] / "docs" / "simulate.md").read_text()
    tables = re.findall(r"^\| batch, rule (.+)\n\| --- .+\n((?:\|.+\n)+)", page, re.MULTILINE)
    assert len(tables) == 6
    heads = []
    for head, body in tables:
        rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in body.splitlines()}
        columns = head.strip("| ").split(" | ")
        heads.append(columns[-1])
        cost = {name: float(row[-1].strip("| ")) for name, row in rows.items()}
        for size in (4, 16, 64):
            own = {name.partition(", ")[2]: value for name, value in cost.items() if name.startswith(f"{size}, ")}
            if "EP, replicas, METRO" in own:
                assert own["EP, replicas, METRO"] <= min(own["EP"], own["EP, replicas, tokens balanced"])
                assert own["EP, selection by device load"] < min(own["EP, selection"], own["EP, CAEE"])
            elif "streaming" in own:
                assert own["streaming"] < min(own["EP"], own["EP, placed by popularity"])
                assert own["streaming, selection"] < own["EP, selection"]
            else:
                assert own["one price, SiftMoE's bound"] < own["SiftMoE, a limit for each token and layer"] < 1
    assert heads == ["time"] * 4 + ["energy"] * 2
    report = simulate(options("devices"))
    assert simulation_table(report).head == ["batch, rule", *tables[0][0].strip("| ").split(" | ")]
