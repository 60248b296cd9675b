"""The model card, metrics and run records of a selector directory, written from measured figures alone."""

from typing import Any

import yaml

from .floor import floor_lines


def render(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Markdown of the card.

    Args:
        config: what `config.json` of the selector holds.
        metrics: what its `metrics.json` holds.
    """
    c = config
    parts = [
        _front_matter(c["base_model"]),
        f"# Expert selector for {c['base_model']}\n",
        f"Decides at decode which experts of `{c['base_model']}` (revision {c['base_revision']}, {c['model_type']}: {len(c['layers'])} MoE "
        f"layers, {c['num_experts']} experts, top-{c['top_k']}) a batch can skip. Scorer `{c['scorer']}`, surrogates of rank {c['rank']}. "
        "Refused on a model with another routing rule, other routers, experts or other weights.\n",
        "```python\nfrom lynx_learn import LynxSelector, skip_experts\n\n"
        'with skip_experts(model, LynxSelector.from_pretrained("this folder"), budget=0.01):\n    model.generate(**inputs)\n```\n',
        _calibration(metrics.get("calibrate"), c["calibration"]),
        _coverage(metrics.get("coverage")),
        _evaluation(metrics.get("evaluate"), c["calibration"]),
        _training(metrics.get("train"), c["scorer"]),
        _limits(c["calibration"], metrics.get("calibrate")),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(base_model: str) -> str:
    """By a YAML writer, since a path may hold whatever means something there."""
    tags = ["mixture-of-experts", "inference"]
    data = {"library_name": "lynx-learn", "base_model": base_model, "tags": tags}
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10**6)}---\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    rows = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


PROMISE = (
    "1. For {text}, decoded in a batch of a size that the table names, the mean KL per token that skipping adds stays within "
    "the budget, over the whole decode{quarter}; a calibration that goes as this one did puts its threshold "
    "too high in at most {error:.0%} of all cases.\n"
    "2. That covers {scope}; it is a mean over many requests, so one request, one source or one stretch of text may lose more, "
    "and it says nothing of how well the model does a task.\n"
    "3. Other text, other sampling, longer decodes, other precision or another device are not covered: run `lynx-learn "
    "calibrate` on your own prompts, with your own settings.\n"
)
SCOPES = {
    "cell": "each budget and batch size on its own, not all of them at once",
    "sizes": "all batch sizes of a budget at once",
    "all": "all budgets and batch sizes at once",
    "worst-source": "every source of the table's text, for each budget and batch size on its own",
}


def _limits(calibration: dict[str, Any], figures: dict[str, Any] | None) -> str:
    """What is promised and what is not, in three sentences for each metric that was calibrated."""
    parts = ["## Limits\n"]
    for metric, how in calibration.items():
        cells = [cell for row in (figures or {}).get(metric, {}).get("cells", {}).values() for cell in row.values()]
        parted = any("by_part" in cell for cell in cells)
        quarter = " and over its last quarter" if parted else ""
        promise = PROMISE.format(
            text=_text(how), quarter=quarter, error=1 - how["confidence"], scope=SCOPES[how["guarantee"]]
        )
        if cells and not parted:
            parts.append(
                "**These thresholds come from an earlier procedure:** its groups shared documents, so its confidence is lower "
                "than what is named here. `lynx-learn calibrate` finds new ones.\n"
            )
        parts.append(promise if metric == "kl" else promise.replace("KL per token", NAMES[metric]))
    parts.append(
        "Figures are of simulated decode: one pass over the text, in which each step sees what earlier ones left.\n"
    )
    return "\n".join(parts)


NAMES = {"nll": "rise of the loss (ΔNLL) per token", "agreement": "share of changed greedy tokens"}


def _text(how: dict[str, Any]) -> str:
    """The text that a calibration is of, in words."""
    where = f"prompts like those of `{how['corpus']}` ({_shares(how['sources'])})"
    size = f"{how['prompt']} tokens of prompt and {how['length'] - how['prompt']} of decode, in {how['dtype']} on {how['device']}"
    if how["mode"] == "teacher":
        return f"text like that of `{how['corpus']}` ({_shares(how['sources'])}) fed to the model, {size}"
    sampled = (
        "greedily" if how["temperature"] == 0 else f"at temperature {how['temperature']:g}, top-p {how['top_p']:g}"
    )
    writer = "the model itself" if how["mode"] == "generate" else "the skipping model itself"
    stop = "" if how["ignore_eos"] else " up to its end-of-text token"
    return f"what {writer} writes{stop}, sampled {sampled}, after {where}: {size}"


def _calibration(figures: dict[str, Any] | None, calibration: dict[str, Any]) -> str:
    if not figures:
        return "## Budgets\n\nNot calibrated yet: `lynx-learn calibrate`.\n"
    parts = ["## Budgets\n"]
    for metric, how in figures.items():
        limits = calibration[metric]
        rows = []
        for budget, cells in how["cells"].items():
            for size, cell in cells.items():
                if cell["threshold"] > 0:
                    row = [
                        f"{cell['mean']:.4f}",
                        " ".join(f"{value:.4f}" for value in cell.get("by_part", ())) or "–",
                        f"{cell['upper']:.4f}",
                        f"{cell['experts_before']:.1f} → {cell['experts']:.1f}",
                        f"{cell['bytes']:.0%}",
                    ]
                else:
                    row = ["–", "–", "–", "nothing is skipped: no threshold qualified", "100%"]
                rows.append([budget, size, *row, str(cell["groups"])])
        parts.append(
            f"Metric `{metric}`; text: {_text(limits)}; guarantee `{limits['guarantee']}`, confidence {limits['confidence']:.0%}; "
            f"bound: {how['bound']}.\n\n"
            + _table(
                [
                    "budget",
                    "batch",
                    "measured",
                    "by quarter of the decode",
                    "upper bound",
                    "distinct experts per layer",
                    "bytes",
                    "groups",
                ],
                rows,
            )
        )
        parts += _certified_text(how["cells"])
        parts += [f"{' '.join(lines)}\n"] if (lines := floor_lines(how)) else []
    return "\n".join(parts)


def _certified_text(table: dict[str, Any]) -> list[str]:
    """Each budget's source with the highest loss."""
    parts = []
    highest = []
    for budget, cells in table.items():
        found = [(v, name, size) for size, cell in cells.items() for name, v in cell.get("by_source", {}).items()]
        if found:
            value, name, size = max(found)
            highest.append(f"- budget {budget}: highest by source at batch {size}: {name} {value:.4f}\n")
    if highest:
        parts.append("".join(highest))
    return parts


def _shares(sources: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in sources.items())


def _coverage(report: dict[str, Any] | None) -> str:
    if not report:
        return ""
    o, exact = report["options"], report["exact"]
    shift = o["shift"] and f"{', '.join(o['shift']['calibrate'])} → {', '.join(o['shift']['test'])}"
    rows = [
        [
            shift if row["shift"] else "same sources",
            str(row["batch_size"]),
            str(row["budget"]),
            f"{row['test_over']:.1%}",
            f"{row['pool_over']:.1%}",
            *(f"{row[k]:.1%} ({_percents(row[f'{k}_interval'])})" for k in ("true_over", "bound_misses")),
            f"{row['nothing']:.1%}",
            *("–" if row[k] is None else f"{row[k]:.2f}" for k in ("test_share", "upper_share")),
            "–" if row["bytes"] is None else f"{row['bytes']:.0%}",
        ]
        for row in report["rows"]
    ]
    head = ["text", "batch", "budget", "test over", "pool over", "true mean over (95%)", "bound misses (95%)"]
    head += ["nothing certified", "test / budget", "bound / budget", "bytes"]
    splits = ", ".join(f"`{name}`" for name in o["split"])
    parts = [
        f"## Coverage\n\nCalibration repeated on {o['resplits']} random splits of {o['groups']} groups per batch size: "
        f"{o['calibration_groups']} to calibrate, the others to test. Metric `{o['metric']}`, confidence {o['confidence']:.0%}; text: "
        f"`{o['corpus']}`, split {splits} ({_shares(report['sources'])}).\n",
        _table(head, rows),
        "`test over`, `pool over`: share of the splits in which the mean loss of the test groups, of all groups, exceeds the "
        "budget. The splits depend on each other; a bound that is exact, and reached the budget every time, would show "
        f"{exact['test_over']:.1%} and {exact['pool_over']:.1%}. `true mean over`: the same in {o['bootstraps']} independent draws from the "
        "groups, whose mean is then the true one; `bound misses`: share of these draws in which the bound, where the true "
        f"mean is the budget, lies below it. Of both {exact['true_over']:.1%} is allowed."
        + (" On other sources all groups tested on count in the first three.\n" if shift else "\n"),
    ]
    parts += [_together(row, o["guarantee"], exact["true_over"]) for row in report.get("together", ())]
    if shift:
        parts.append(_under_shift([row for row in report["rows"] if row["shift"]], o["shift"]))
    return "\n".join(parts)


def _together(row: dict[str, Any], guarantee: str, allowed: float) -> str:
    """How often what a joint guarantee covers failed anywhere."""
    over = f"{row['true_over']:.1%} ({_percents(row['true_over_interval'])})"
    return f"Guarantee `{guarantee}`, budget {row['budget']}: some cell's true mean over it in {over} of the draws, of {allowed:.0%} allowed.\n"


def _percents(interval: list[float]) -> str:
    return f"{100 * interval[0]:.1f}–{interval[1]:.1%}"


def _under_shift(rows: list[dict[str, Any]], shift: dict[str, list[str]]) -> str:
    """That nothing is guaranteed on other sources, and what was measured there."""
    groups = f"Calibrated on draws from {rows[0]['groups']} groups, tested on {rows[0]['test_groups']} others.\n"
    said = f"**Calibrated on {', '.join(shift['calibrate'])} and tested on {', '.join(shift['test'])}, the guarantee does not hold.** "
    measured = [row for row in rows if row["test_share"] is not None]
    if not measured:
        return f"{said}Nothing was certified there, so nothing was lost. {groups}"
    worst = max(measured, key=lambda row: (row["test_over"], row["test_share"]))
    where = f"at batch {worst['batch_size']}, budget {worst['budget']}"
    if worst["test_over"] > 0:
        return f"{said}Over its budget in {worst['test_over']:.0%} of the splits, and {worst['test_share']:.2f} times it on average, {where}. {groups}"
    return (
        f"{said}By measurement the loss stayed within the budget there, at most {worst['test_share']:.2f} of it ({where}), "
        f"though nothing guarantees it. {groups}"
    )


def _evaluation(report: dict[str, Any] | None, calibration: dict[str, Any]) -> str:
    if not report:
        return ""
    rows = [
        [
            p["method"],
            p["setting"],
            f"{p['batch_size']}, one source each" if p.get("batches") == "single" else str(p["batch_size"]),
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
        + _not_certified(report["sources"], calibration)
    )


def _not_certified(sources: list[str], calibration: dict[str, Any]) -> str:
    """Which sources of the test text the certificate says nothing of; nothing where a calibration did not note its own."""
    known = {name for how in calibration.values() for name in how.get("sources", {})}
    new = [name for name in sources if name not in known]
    if not known or not new:
        return ""
    if len(new) == len(sources):
        return "\nNone of these sources was in the calibration text; the certificate does not cover them.\n"
    return f"\nNot in the calibration text, and not covered by the certificate: {', '.join(new)}.\n"


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
        + _tuning(train.get("tuning"))
        + _nats(train.get("nats"))
    )


def _nats(nats: dict[str, Any] | None) -> str:
    """Predicted against measured loss."""
    if not nats or not nats["curve"]:
        return ""
    curve = [[f"{p['threshold']:.2g}", f"{p['predicted']:.4f}", f"{p['measured']:.4f}"] for p in nats["curve"]]
    layers = [[p["name"], f"{p['predicted']:.4f}", f"{p['measured']:.4f}"] for p in nats["layers"]]
    return (
        "\nPredicted costs of what is left out, summed, and the KL it causes, both in nats per token; batches of the trace:\n\n"
        + _table(["threshold", "predicted", "measured"], curve)
        + "\nAt the threshold that loses .01 in all, by layer, when it alone skips:\n\n"
        + _table(["layer", "predicted", "measured"], layers)
    )


def _tuning(tuning: dict[str, Any] | None) -> str:
    if not tuning:
        return ""
    rows = [
        [
            str(old["batch_size"]),
            f"{old['threshold']:.2g}",
            *(f"{old[key]:{shape}} → {new[key]:{shape}}" for key, shape in (("kl", ".4f"), ("experts", ".1f"))),
        ]
        for old, new in zip(tuning["before"], tuning["after"], strict=True)
    ]
    return (
        f"\nThat table is from before tuning. Tuned through the frozen model on KL for {tuning['steps']} steps; held-out "
        "sequences, before → after:\n\n"
        + _table(["batch", "threshold", "KL, nats per token", "distinct experts per layer"], rows)
    )
