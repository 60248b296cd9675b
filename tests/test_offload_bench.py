"""`lynx-learn bench --offload` on a tiny model: what is compared, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from flows import tiny_flow

from lynx_learn.cli import main
from lynx_learn.errors import OptionError
from lynx_learn.files import read_object
from lynx_learn.offload.timing.bench import OffloadBenchOptions


def test_ways_of_decoding_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    flow, words = tiny_flow(), ["--batch-size", "2", "--prompt", "8", "--steps", "4", "--shares", "0.5"]
    own = ["--model", str(flow.model), "--selector", str(flow.selector), "--corpus", str(flow.texts)]
    out = ["--out", str(tmp_path / "report"), "--thresholds", "1000"]
    assert main(["bench", "--offload", *own, *words, *out]) == 0
    rows = {row["way"]: row for row in read_object(tmp_path / "report" / "offload.json")["rows"]}
    assert list(rows) == ["untouched", "uniform", "residency", "accelerate"]
    assert rows["untouched"]["kl"] == 0
    assert rows["uniform"]["kl"] > 0
    assert rows["uniform"]["bytes_per_token"] < rows["untouched"]["bytes_per_token"]
    assert rows["untouched"]["bytes_per_token"] < rows["accelerate"]["bytes_per_token"]
    assert rows["uniform"]["experts"] <= rows["residency"]["experts"]
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["offload.json"]
    assert "Experts on disk" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"shares": []}, {"shares": [2.0]}, {"steps": 0}, {"readers": 0}, {"offload": "host"}], ids=str
)
def test_options_that_cannot_be_used(change: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"--{next(iter(change))}"):
        OffloadBenchOptions("out", **change)
