"""`lynx-learn bench --offload` on a tiny model: what is compared, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flows import LAYERS, tiny_flow

from lynx_learn.cli import main
from lynx_learn.errors import OptionError
from lynx_learn.files import read_object
from lynx_learn.offload.predict import PREDICTORS
from lynx_learn.offload.replay import ReplayOptions, replay
from lynx_learn.offload.timing import limits
from lynx_learn.offload.timing.bench import OffloadBenchOptions, bench_offload, matched
from lynx_learn.offload.timing.ways import ACCELERATE, MAPPED


@pytest.mark.slow
def test_ways_of_decoding_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    flow, words = tiny_flow(), ["--batch-size", "2", "--prompt", "8", "--steps", "4", "--shares", "0.5"]
    replay(ReplayOptions(str(flow.trace), [0.5], [2], 10, predictors=str(tmp_path / "predictors")))
    own = ["--model", str(flow.model), "--selector", str(flow.selector), "--corpus", str(flow.texts)]
    out = ["--out", str(tmp_path / "report"), "--thresholds", "1000", "--predictors", str(tmp_path / "predictors")]
    assert main(["bench", "--offload", *own, *words, *out]) == 0
    rows = {row["way"]: row for row in read_object(tmp_path / "report" / "offload.json")["rows"]}
    assert list(rows) == ["no skipping", *PREDICTORS, "uniform", "residency", MAPPED, ACCELERATE]
    assert all(rows[way]["kl"] == 0 for way in ("no skipping", *PREDICTORS))
    assert all(rows[way]["kl"] < 1e-6 for way in (MAPPED, ACCELERATE))  # whose copies have their weights elsewhere
    assert rows["uniform"]["kl"] > 0
    assert rows["uniform"]["bytes_per_token"] < rows["no skipping"]["bytes_per_token"]
    assert rows["uniform"]["experts"] <= rows["residency"]["experts"]
    assert all(rows[way]["prefetched_bytes_per_token"] >= rows[way]["unused_bytes_per_token"] for way in PREDICTORS)
    assert all(len(rows[way]["wait_ms"]) == LAYERS for way in ("no skipping", "uniform"))
    assert all(row["peak_rss"] > row["start_rss"] > 0 for row in rows.values())
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["offload.json"]
    shown = capsys.readouterr().out
    assert "Experts on disk" in shown
    assert "Read ahead" in shown
    assert "page cache" in shown


def point(way: str, kl: float, size: float, share: float = 0.5) -> dict[str, Any]:
    return {"way": way, "share": share, "kl": kl, "bytes_per_token": size}


def test_bytes_at_equal_loss_by_hand() -> None:
    rows = [point("uniform", 0.01, 100.0), point("uniform", 0.04, 25.0), point("residency", 0.02, 30.0)]
    (row,) = matched([*rows, point("residency", 0.08, 10.0), point("no skipping", 0.0, 200.0)])[:1]
    # Halfway between .01 and .04 in logarithms, uniform prices read √(100 · 25) bytes.
    assert (row["share"], row["kl"]) == (0.5, 0.02)
    assert (row["uniform"], row["residency"]) == pytest.approx((50.0, 30.0))
    assert row["ratio"] == pytest.approx(0.6)
    assert matched([*rows[:2], point("residency", 0.05, 30.0)]) == []  # out of each other's reach
    assert matched(rows[:2]) == []


def test_what_cannot_be_decoded_leaves_nothing(tmp_path: Path) -> None:
    flow = tiny_flow()
    options = OffloadBenchOptions(str(tmp_path / "out"), model=str(flow.model), corpus=str(flow.texts), shares=[0.01])
    with pytest.raises(OptionError, match=r"fast_memory 0\.01 is not usable"):
        bench_offload(replace(options, batch_size=2, prompt=4, steps=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [{"shares": []}, {"shares": [2.0]}, {"steps": 0}, {"readers": 0}, {"offload": "host"}, {"memory": 0}],
    ids=str,
)
def test_options_that_cannot_be_used(change: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"--{next(iter(change))}"):
        OffloadBenchOptions("out", **change)


def test_memory_cannot_be_limited_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HIERARCHIES", ((tmp_path / "none", "limit"), (tmp_path / "neither", "limit")))
    with (
        pytest.raises(OptionError, match=r"--memory is not usable here: .*; leave it out"),
        limits.memory_limited(1, "x"),
    ):
        pass


def test_a_way_that_takes_more_memory_than_there_is_is_named(tmp_path: Path) -> None:
    try:
        with limits.memory_limited(2**40, "lynx-learn-test"):
            pass
    except OptionError as error:
        pytest.skip(str(error))
    flow = tiny_flow()
    options = OffloadBenchOptions(str(tmp_path / "out"), model=str(flow.model), corpus=str(flow.texts), shares=[0.5])
    with pytest.raises(OptionError, match=r"'no skipping' was ended by the system, .*--memory 100000 is too little"):
        bench_offload(replace(options, batch_size=2, prompt=4, steps=2, memory=100_000, others=False))
    assert not (tmp_path / "out").exists()
    assert not list(limits._hierarchy()[0].glob("lynx-learn-*"))
