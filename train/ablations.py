"""Train variants of one selector and read them off at equal loss.

    python train/ablations.py --config train/ablations.yaml
    python train/ablations.py --config train/surrogates.yaml

A variant that is there already is not trained again, and its evaluation goes on where it stopped. Writes
`OUT/ablations.json` and prints its table.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jsonargparse import auto_cli

from lynx_learn.fit.train import TrainOptions, train
from lynx_learn.measure.evaluate import EvaluateOptions, evaluate
from lynx_learn.selector.saving import read_metrics
from lynx_learn.show.tables import Table, show


@dataclass(frozen=True)
class Options:
    """What the recipe file sets.

    Attributes:
        trace: trace directory of `lynx-learn collect`.
        out: folder; a selector and a report for each variant, and `ablations.json`.
        corpus, split, tokens, batch_size: what the variants are measured on, as in `lynx-learn evaluate`.
        base: options of `lynx-learn train` that all variants share.
        variants: name -> options that differ.
    """

    trace: str
    out: str
    corpus: str
    base: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    split: str = "test"
    tokens: int = 20_000
    batch_size: int = 16


def main(options: Options) -> None:
    """Train and measure every variant."""
    out = Path(options.out)
    rows = []
    for name, changes in options.variants.items():
        folder = out / re.sub(r"\W+", "-", name)
        selector = folder / "selector"
        if not (selector / "config.json").exists():
            train(TrainOptions(trace=options.trace, out=str(selector), **{**options.base, **changes}))
        report = evaluate(
            EvaluateOptions(
                str(selector),
                str(folder / "report"),
                corpus=options.corpus,
                split=options.split,  # type: ignore[arg-type]
                methods=["learned", "oracle"],
                batch_sizes=[options.batch_size],
                tokens=options.tokens,
            )
        )
        layers = read_metrics(selector)["train"]["layers"]
        row = {"variant": name, "changes": changes, "unexplained": fmean(layer["unexplained"] for layer in layers)}
        rows.append({**row, "matched": report["matched"], "points": report["points"]})
        written = {"options": {**options.__dict__}, "environment": report["environment"], "variants": rows}
        (out / "ablations.json").write_text(json.dumps(written, indent=2) + "\n")
    show(ablation_table(rows))


def ablation_table(rows: list[dict[str, Any]]) -> Table:
    """What surrogates leave unexplained of the held-out energy, mean over layers; bytes and experts of each variant at
    equal KL, and the experts its oracle would need."""
    levels = sorted({row["level"] for row in rows[0]["matched"]})
    head = ["variant", "unexplained", *(f"KL {level:g}" for level in levels)]
    lines = []
    for row in rows:
        cells = {(m["method"], m["level"]): m for m in row["matched"] if m["metric"] == "kl"}
        line = [row["variant"], f"{row['unexplained']:.1%}"]
        for level in levels:
            learned, oracle = cells["learned", level], cells["oracle", level]
            if learned["bytes"] is None:
                line.append("not reached")
            else:
                floor = f"{oracle['experts']:.1f}" if oracle["experts"] is not None else "–"
                line.append(f"{learned['bytes']:.1%}, {learned['experts']:.1f} (oracle {floor})")
        lines.append(line)
    return Table("Bytes and distinct experts per layer at equal loss", head, lines)


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
