"""What an evaluation puts into the card of its selector."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

from evaluate_cases import (
    choices,
    little,
    points,
)
from flows import (
    calibrated,
    contents,
)

from lynx_learn.measure.evaluate import evaluate
from lynx_learn.selector.saving import read_metrics


def test_the_card_shows_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    """Every number in its tables is one of metrics.json or config.json, rounded."""
    folder = tmp_path / "selector"
    shutil.copytree(calibrated(), folder)
    before = contents(folder)
    report = evaluate(choices(tmp_path / "out", selector=str(folder), methods=["xshare", "learned"], card=True))
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} == {
        "README.md",
        "metrics.json",
        "run-evaluate.yaml",
    }
    metrics = read_metrics(folder)
    assert {p["method"] for p in report["points"]} == {"untouched", "xshare", "learned"}
    own = {**report, "points": [p for p in report["points"] if p["method"] != "xshare"]}
    assert metrics == {**json.loads(before["metrics.json"]), "evaluate": own}
    card = after["README.md"].decode()
    assert f"split `test` (even, odd); {report['environment']['machine']}" in card
    config = json.loads(after["config.json"])
    for section, figures in (
        ("Test", report),
        ("Budgets", [config["calibration"], metrics["calibrate"]]),
        ("Training", metrics["train"]),
    ):
        rows = [line for line in card.split(f"## {section}\n")[1].split("\n## ")[0].splitlines() if line[:1] == "|"][2:]
        assert rows
        known = set(numbers(figures))
        for row in rows:
            for word in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?%?", row):
                assert is_rounded(word, known), (section, row, word)
    test = [line for line in card.split("## Test\n")[1].splitlines() if line.startswith("| learned budget=0.1 | 4 |")]
    (row,) = points(report, setting="budget=0.1", batch_size=4, batches="mixed")
    assert f"| {row['experts']:.1f} | {row['bytes']:.0%} | {row['kl']:.4f} ±{row['kl_margin']:.4f} |" in test[0]


def numbers(value: Any) -> list[float]:
    """All numbers in a JSON value, keys and texts that are numbers included."""
    if isinstance(value, dict):
        return [n for pair in value.items() for part in pair for n in numbers(part)]
    if isinstance(value, list):
        return [n for part in value for n in numbers(part)]
    if isinstance(value, str):
        return [float(n) for n in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", value)]
    return [float(value)] if isinstance(value, int | float) else []


def is_rounded(word: str, known: set[float]) -> bool:
    """Whether a number as printed is the rounding of a known one; shares also as what is left of one."""
    mantissa, _, exponent = word.rstrip("%").partition("e")
    given, unit = float(word.rstrip("%")), 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    values = [100 * v for n in known for v in (n, 1 - n)] if word.endswith("%") else [abs(n) for n in known]
    return any(math.isclose(given, value, abs_tol=0.5001 * unit, rel_tol=1e-9) for value in values)


def test_without_card_the_selector_is_left_alone(tmp_path: Path) -> None:
    before = contents(calibrated())
    evaluate(little(tmp_path, methods=["learned"], dtype="bfloat16"))
    assert contents(calibrated()) == before


def test_the_card_holds_what_was_trained_whatever_the_model_ran_in(tmp_path: Path) -> None:
    selector = tmp_path / "selector"
    shutil.copytree(calibrated(), selector)
    weights = (selector / "selector.safetensors").read_bytes()
    evaluate(little(tmp_path / "out", selector=str(selector), methods=["learned"], dtype="bfloat16", card=True))
    assert (selector / "selector.safetensors").read_bytes() == weights
