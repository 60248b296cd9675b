"""What a selector's budgets lose on text of other kinds than the one that they were calibrated on.

    python train/certificate.py --config train/certificate.yaml

Measures the calibrated thresholds with `lynx-learn evaluate`, once for each kind of prompts and each way to write on from
them; what was broken off goes on where it stopped. Writes the tables to `OUT/certificate.md` and prints them.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from lynx_learn.measure.evaluate import EvaluateOptions, evaluate
from lynx_learn.show.tables import Table

Report = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the recipe file sets.

    Attributes:
        selector: selector folder with thresholds.
        out: folder; a report for each pair of prompts and text, and `certificate.md`.
        prompts: name -> options of `lynx-learn evaluate` that say where prompts come from.
        texts: name -> options that say what is written after them.
        base: options that all share.
    """

    selector: str
    out: str
    prompts: dict[str, dict[str, Any]]
    texts: dict[str, dict[str, Any]]
    base: dict[str, Any] = field(default_factory=dict)


def main(options: Options) -> None:
    """Measure every pair, and write the tables after each, so that one that is broken off leaves what there is."""
    out = Path(options.out)
    reports: dict[tuple[str, str], Report] = {}
    page = ""
    for prompts, where in options.prompts.items():
        for text, how in options.texts.items():
            folder = out / re.sub(r"\W+", "-", f"{prompts} {text}")
            own = {**options.base, **where, **how}
            reports[prompts, text] = evaluate(EvaluateOptions(options.selector, str(folder), methods=[], **own))
            page = certificate_page(reports)
            (out / "certificate.md").write_text(page, encoding="utf-8")
    print(page)


def certificate_page(reports: dict[tuple[str, str], Report]) -> str:
    """Two tables in Markdown: the mean loss at each budget, and where along the decode it falls."""
    losses, parts = [], []
    budgets: list[float] = []
    for (prompts, text), report in reports.items():
        points = [p for p in report["points"] if p["setting"].startswith("budget=")]
        for size in sorted({p["batch_size"] for p in points}):
            own = {float(p["setting"].removeprefix("budget=")): p for p in points if p["batch_size"] == size}
            budgets = sorted(own)
            losses.append([prompts, text, str(size), *(loss(own[b], b) for b in budgets)])
            parts.append(
                [prompts, text, str(size), *(" ".join(f"{v:.4f}" for v in own[b]["kl_by_part"]) for b in budgets)]
            )
    options, environment = (next(iter(reports.values()))[key] for key in ("options", "environment"))
    head = ["prompts", "text", "batch", *(f"budget {b:g}" for b in budgets)]
    tokens = min(p["tokens"] for report in reports.values() for p in report["points"])
    return "\n".join(
        [
            f"KL in nats per token ± 95% margin, and bytes of expert weights, at the calibrated thresholds of `{options['selector']}`; bold: "
            f"over the budget by more than the margin. Prompts of {options['prompt']} tokens, sequences of {options['length']}; {tokens:,} "
            f"decode tokens a point or more; {environment['machine']}; simulated decode, one run.\n",
            Table("", head, losses).markdown,
            "\nThe same by quarter of the decode positions.\n",
            Table("", head, parts).markdown,
            "",
        ]
    )


def loss(point: Report, budget: float) -> str:
    shown = f"{point['kl']:.4f} ± {point['kl_margin']:.4f}"
    return f"{f'**{shown}**' if point['kl'] - point['kl_margin'] > budget else shown}, {point['bytes']:.0%}"


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
