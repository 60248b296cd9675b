"""An evaluation that was stopped goes on and ends with the same bytes; another one in its folder is refused."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from evaluate_cases import (
    SEED,
    choices,
    little,
    points,
    tiny_report,
)
from flows import (
    calibrated,
    contents,
    one_line,
    tiny_flow,
)

from lynx_learn.errors import OptionError
from lynx_learn.measure.evaluate import evaluate
from lynx_learn.selector.selector import LynxSelector


def test_equal_seeds_give_equal_reports(tmp_path: Path) -> None:
    again, other = (
        evaluate(choices(tmp_path / str(seed), batch_sizes=[2], batches=["mixed"], seed=seed)) for seed in (SEED, 3)
    )
    assert again["points"] == points(tiny_report(), batch_size=2)
    assert again["matched"] == [row for row in tiny_report()["matched"] if row["batch_size"] == 2]
    assert again["ratios"] == [row for row in tiny_report()["ratios"] if row["batch_size"] == 2]
    assert other["points"] != again["points"]


# Begins a program that is killed as soon as a file is in its place.
KILLED_AT = """
import os, signal
replace = os.replace
def stop(source, target, **more):
    replace(source, target, **more)
    if str(target).endswith("{last}"):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = stop
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """And ends with the same bytes in every file as one that was not killed."""
    out = tmp_path / "out"
    options = choices(out, batch_sizes=[2], batches=["mixed", "single"], methods=["random", "gate_sq"], tokens=700)
    evaluate(options)
    expected = contents(out)
    shutil.rmtree(out)
    program = KILLED_AT.format(last="2-single/00002.json") + (
        f"from lynx_learn.measure.evaluate import *\nevaluate(EvaluateOptions(**{asdict(options)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "report.json").exists()
    finished = {file: file.stat().st_mtime_ns for file in (out / "groups").rglob("[0-9]*.json")}
    assert 3 <= len(finished) < 2 * 16
    evaluate(options)
    assert contents(out) == expected
    assert {file: file.stat().st_mtime_ns for file in finished} == finished


def test_a_finished_run_is_not_repeated_and_a_damaged_group_is(tmp_path: Path) -> None:
    report = evaluate(little(tmp_path))
    before, group = contents(tmp_path), tmp_path / "groups" / "2-mixed" / "00003.json"
    first = group.stat().st_mtime_ns
    group.write_bytes(group.read_bytes()[:-7])
    others = {file: file.stat().st_mtime_ns for file in group.parent.iterdir() if file != group}
    assert evaluate(little(tmp_path)) == report
    assert contents(tmp_path) == before
    assert group.stat().st_mtime_ns > first
    assert {file: file.stat().st_mtime_ns for file in others} == others


def test_another_run_in_the_same_folder_is_refused_by_name(tmp_path: Path) -> None:
    out, selector, texts = (tmp_path / name for name in ("out", "selector", "texts"))
    shutil.copytree(calibrated(), selector)
    shutil.copytree(tiny_flow().texts, texts)
    evaluate(little(out, corpus=str(texts)))
    before = contents(out)
    for changes, named in (
        ({"seed": 9, "levels": [0.2]}, "seed, levels, text_sha256 "),
        ({"tokens": 800}, "tokens, text_sha256 "),
        ({"methods": ["gate_sq"]}, "methods "),
        ({"corpus": str(tiny_flow().texts)}, "corpus "),
        ({"selector": str(selector)}, "selector "),
    ):
        with pytest.raises(OptionError, match="holds an evaluation with other") as error:
            evaluate(little(out, **{"corpus": str(texts), **changes}))
        assert f"other {named}" in one_line(error)
    lines = (texts / "odd.jsonl").read_text().splitlines(keepends=True)
    (texts / "odd.jsonl").write_text("".join(line.replace("router", "batch") for line in lines))
    with pytest.raises(OptionError, match="other text_sha256 "):
        evaluate(little(out, corpus=str(texts)))
    (texts / "odd.jsonl").write_text("".join(lines))
    options = json.loads(before["options.json"])
    options["versions"]["torch"] = "1.0"
    (out / "options.json").write_text(json.dumps(options))
    with pytest.raises(OptionError, match="other versions "):
        evaluate(little(out, corpus=str(texts)))
    (out / "options.json").write_text("{")
    with pytest.raises(OptionError, match="other model, corpus, mix"):
        evaluate(little(out, corpus=str(texts)))
    assert {k: v for k, v in contents(out).items() if k != "options.json"} == {
        k: v for k, v in before.items() if k != "options.json"
    }


def test_a_selector_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    selector = tmp_path / "selector"
    shutil.copytree(calibrated(), selector)
    options = little(tmp_path / "out", selector=str(selector))
    report = evaluate(options)
    assert evaluate(replace(options, card=True))["points"] == report["points"]  # a new card is no other selector
    changed = LynxSelector.from_pretrained(selector)
    changed.with_config(thresholds={"kl": {"0.1": {"2": 0.5}}}).save_pretrained(selector)
    with pytest.raises(OptionError, match="other selector_sha256 "):
        evaluate(options)


@pytest.mark.parametrize("name", ["out", "out/file.txt"])
def test_folders_that_are_in_use(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(OptionError, match="choose another") as error:
        evaluate(little(tmp_path / "out"))
    assert str(tmp_path / "out") in one_line(error)
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.slow
def test_several_workers_give_the_same_report(tmp_path: Path) -> None:
    options = choices(tmp_path / "out", batch_sizes=[4], workers=2)
    report = evaluate(options)
    expected = [p for p in tiny_report()["points"] if p["batch_size"] == 4]
    assert [p["setting"] for p in report["points"]] == [p["setting"] for p in expected]
    for found, wanted in zip(report["points"], expected, strict=True):
        for key in ("kl", "nll", "experts", "bytes", "kl_margin"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-6)
        assert (
            found["by_source"]
            == {metric: pytest.approx(values, rel=1e-4, abs=1e-6) for metric, values in wanted["by_source"].items()}
            if "by_source" in wanted
            else True
        )
    alone = evaluate(replace(options, workers=1))  # what is there is gone on with
    assert alone["points"] == report["points"]
