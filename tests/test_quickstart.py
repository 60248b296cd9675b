"""The whole flow in one command, on the tiny model."""

import json
import random
from pathlib import Path

import pytest
from flows import VOCABULARY, tiny_flow

from lynx_learn.quickstart import QuickstartOptions, quickstart


@pytest.mark.slow
def test_the_whole_flow_ends_with_a_table_and_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tiny model and enough random sentences; the closing table has the untouched row and both budgets."""
    choose = random.Random(0)
    lines = (json.dumps({"text": " ".join(choose.choices(VOCABULARY, k=128))}) + "\n" for _ in range(2200))
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    model, texts = str(tiny_flow().model), str(tmp_path / "texts.jsonl")
    options = QuickstartOptions(str(out), model, texts, tokens=4096, test_tokens=1, budget=0.05)
    monkeypatch.setattr("lynx_learn.quickstart.in_repository", lambda folder: None)
    capsys.readouterr()
    found = quickstart(options)
    printed = capsys.readouterr().out
    places = [printed.index(f"{step}/6 ") for step in range(1, 7)]
    assert places == sorted(places)
    closing = printed[printed.index("Distinct experts") :]
    assert all(text in closing for text in ("untouched", "budget 0.05", "budget 0.15", "×)"))
    assert "left out: it is in lynx-learn's repository" in printed
    assert "## Test" in (out / "selector" / "README.md").read_text()
    summary = json.loads((out / "quickstart.json").read_text())
    assert summary == json.loads(json.dumps(found))
    assert [p["setting"] for p in summary[model]["points"]] == ["", "budget=0.05"]
    assert summary[model]["decode_step"]["steps"] > 0
    assert summary[model]["generate"]["tokens_per_s_on"] > 0
    assert {p.name for p in out.iterdir()} == {"trace", "selector", "report", "quickstart.json"}
