"""The model card, metrics and run records of a selector directory, written from measured figures alone."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import SelectorError
from .selector import CARD, METRICS, LynxSelector


def write_card(folder: Path, selector: LynxSelector, metrics: dict[str, Any], files: dict[str, str]) -> None:
    """Save the selector with `metrics.json`, the card made from it, and further `files` (name -> text).

    Raises:
        SelectorError: the folder cannot be written to.
    """
    text = json.dumps(metrics, indent=2) + "\n"
    try:
        selector.save_pretrained(folder, {METRICS: text, CARD: render(selector, metrics), **files})
    except (OSError, SafetensorError) as error:  # the latter when the disk is full while the weights are written
        raise SelectorError(
            f"{folder} cannot be written ({error}): make room there or choose another place, then run the command again"
        ) from error


def run_record(command: str, options: dict[str, Any]) -> str:
    """YAML with the exact options and the versions of what ran."""
    import yaml

    packages = ("torch", "transformers", "lightning", "scikit-learn", "safetensors", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    record = {command: options, "versions": {"python": platform.python_version(), **versions}}
    return yaml.safe_dump(record, sort_keys=False)


def render(selector: LynxSelector, metrics: dict[str, Any]) -> str:
    """Markdown of the card."""
    c = selector.config
    parts = [
        f"---\nlibrary_name: lynx-learn\nbase_model: {c.base_model}\ntags: [mixture-of-experts, inference]\n---\n",
        f"# Expert selector for {c.base_model}\n",
        f"Decides at decode which experts of `{c.base_model}` (revision {c.base_revision}, {c.model_type}: {len(c.layers)} MoE "
        f"layers, {c.num_experts} experts, top-{c.top_k}) a batch can skip. Scorer `{c.scorer}`, surrogates of rank {c.rank}. "
        "Refused on any other model by the fingerprint of its routers.\n",
        "```python\nfrom lynx_learn import LynxSelector, skip_experts\n\n"
        'with skip_experts(model, LynxSelector.from_pretrained("this folder"), budget=0.01):\n    model.generate(**inputs)\n```\n',
        _calibration(c.calibration),
        _evaluation(metrics.get("evaluate")),
        _training(metrics.get("train"), c.scorer),
        "## Limits\n\nThe budget is a bound on a mean over text like the calibration text, decoded in batches of the sizes named; "
        "it says nothing of other text, of single requests, or of tasks. Figures are of teacher-forced simulated decode.\n",
    ]
    return "\n".join(part for part in parts if part)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _calibration(calibration: dict[str, Any]) -> str:
    if not calibration:
        return "## Budgets\n\nNot calibrated yet: `lynx-learn calibrate`.\n"
    parts = ["## Budgets\n"]
    for metric, how in calibration.items():
        rows = []
        for budget, cells in how["cells"].items():
            for size, cell in cells.items():
                if cell["threshold"] > 0:
                    row = [
                        f"{cell['mean']:.4f}",
                        f"{cell['upper']:.4f}",
                        f"{cell['experts_before']:.1f} → {cell['experts']:.1f}",
                        f"{cell['bytes']:.0%}",
                    ]
                else:
                    row = ["–", "–", "nothing is skipped: no threshold qualified", "100%"]
                rows.append([budget, size, *row, str(cell["groups"])])
        parts.append(
            f"Metric `{metric}`; bound: {how['bound']}, confidence {how['confidence']:.0%}; text: `{how['corpus']}`, split `{how['split']}`.\n\n"
            + _table(
                ["budget", "batch", "measured", "upper bound", "distinct experts per layer", "bytes", "groups"], rows
            )
        )
    return "\n".join(parts)


def _evaluation(report: dict[str, Any] | None) -> str:
    if not report:
        return ""
    rows = [
        [
            p["method"],
            p["setting"],
            str(p["batch_size"]),
            f"{p['experts']:.1f}",
            f"{p['bytes']:.0%}",
            f"{p['kl']:.4f} ± {p['kl_margin']:.4f}",
            f"{p['nll']:+.4f}",
            f"{1 - p['agreement']:.1%}",
        ]
        for p in report["points"]
        if p["method"] == "untouched" or p["setting"].startswith("budget")
    ]
    sources = ", ".join(report["sources"])
    return (
        f"## Test\n\nText `{report['options']['corpus']}`, split `{report['options']['split']}` ({sources}); {report['environment']['machine']}.\n\n"
        + _table(["method", "setting", "batch", "experts", "bytes", "KL (95%)", "ΔNLL", "same greedy token"], rows)
    )


def _training(train: dict[str, Any] | None, scorer: str) -> str:
    if not train:
        return ""
    kinds = [k for k in ("formula", scorer, "gradient_boosting") if k in train["layers"][0]]
    kinds = list(dict.fromkeys(kinds))
    rows = [
        [
            row["name"],
            f"{row['unexplained']:.0%}",
            f"{row['sensitivity']:.3g}",
            *(f"{row[k]['deviance']:.3f} / {row[k]['correlation']:.2f}" for k in kinds),
        ]
        for row in train["layers"]
    ]
    t = train["trace"]
    return (
        f"## Training\n\n{t['tokens']:,} tokens of `{t['corpus']}` (split `{t['split']}`, mode {t['mode']}). Held-out sequences: energy the surrogates leave "
        "unexplained; gamma deviance (less is better) / correlation of predicted and true cost.\n\n"
        + _table(["layer", "unexplained", "sensitivity", *kinds], rows)
    )
