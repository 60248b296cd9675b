"""What hidden states in fewer bits cost: their own error, and that of a selector that is trained from them.

    python train/hidden_states.py --config train/hidden_states.yaml

The hidden states of one trace are stored anew in each type, so that text and routing are the same. A selector is trained
from each, and evaluated at equal loss unless `--tokens 0`. What is there already is not made again. Writes
`OUT/hidden-states.json` and prints its table.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jsonargparse import auto_cli

from lynx_learn.fit.train import TrainOptions, train
from lynx_learn.measure.evaluate import EvaluateOptions, evaluate
from lynx_learn.selector.saving import read_metrics
from lynx_learn.show.tables import Table, show
from lynx_learn.traces.format import Trace, TraceWriter


@dataclass(frozen=True)
class Options:
    """What the recipe file sets.

    Attributes:
        trace: trace directory of `lynx-learn collect`, with hidden states in the model's type.
        out: folder; a trace, a selector and a report for each type, and `hidden-states.json`.
        corpus, split, tokens, batch_size: what the selectors are measured on, as in `lynx-learn evaluate`; 0 tokens: they
            are not.
        base: options of `lynx-learn train`.
        stored: types of hidden states, as `collect --hidden_dtype` takes them; the first is what others are held against.
    """

    trace: str
    out: str
    corpus: str
    base: dict[str, Any]
    split: str = "test"
    tokens: int = 20_000
    batch_size: int = 16
    stored: list[str] = field(default_factory=lambda: ["auto", "bfloat16", "float8_e4m3fn"])


def main(options: Options) -> None:
    """Store, train and measure each type."""
    out, given, rows = Path(options.out), Trace.open(options.trace), []
    for stored in options.stored:
        folder = out / stored
        trace = store_anew(given, folder / "trace", stored)
        selector = folder / "selector"
        if not (selector / "config.json").exists():
            train(TrainOptions(trace=str(trace.folder), out=str(selector), **options.base))
        layers = read_metrics(selector)["train"]["layers"]
        kind = options.base["scorer"]
        row = {
            "stored": stored,
            "bytes": sum(file.stat().st_size for file in trace.folder.rglob("*.safetensors")),
            **errors(given, trace),
            "unexplained": fmean(layer["unexplained"] for layer in layers),
            "deviance": fmean(layer[kind]["deviance"] for layer in layers),
        }
        if options.tokens:
            report = evaluate(
                EvaluateOptions(
                    str(selector),
                    str(folder / "report"),
                    corpus=options.corpus,
                    split=options.split,  # type: ignore[arg-type]
                    methods=["learned"],
                    batch_sizes=[options.batch_size],
                    tokens=options.tokens,
                )
            )
            row["matched"] = [m for m in report["matched"] if m["metric"] == "kl" and m["method"] == "learned"]
        rows.append(row)
        (out / "hidden-states.json").write_text(
            json.dumps({"options": options.__dict__, "rows": rows}, indent=2) + "\n"
        )
    show(table(rows, given.options.dtype))


def store_anew(trace: Trace, folder: Path, stored: str) -> Trace:
    """The trace with its hidden states in another type."""
    writer = TraceWriter(folder, replace(trace.options, hidden_dtype=stored))
    if not writer.complete:
        layers = [trace.layer_shards(layer) for layer in range(len(trace.options.layers))]
        index, start = trace.index(), 0
        kinds = {"sequence": torch.int32, "phase": torch.uint8, "source": torch.int16}
        for shard in range(trace.shards):
            tensors = [next(layer) for layer in layers]
            own = slice(start, start := start + len(tensors[0]["indices"]))
            narrow = [{**t, "indices": t["indices"].to(torch.int16)} for t in tensors]
            writer.write(shard, narrow, {key: v[own].to(kinds.get(key, torch.int32)) for key, v in index.items()})
        writer.finish(trace.shards, trace.sources, trace.phases)
    return Trace.open(folder)


def errors(exact: Trace, trace: Trace) -> dict[str, float]:
    """Relative error of hidden states: of all of them, root of the mean square, and of the worst token."""
    wrong, whole, worst = 0.0, 0.0, 0.0
    for layer in range(len(exact.options.layers)):
        for one, other in zip(*(t.layer_shards(layer, ("hidden", "indices")) for t in (exact, trace)), strict=True):
            energy = one["hidden"].double().square().sum(-1)
            lost = (other["hidden"].double() - one["hidden"].double()).square().sum(-1)
            wrong, whole = wrong + float(lost.sum()), whole + float(energy.sum())
            worst = max(worst, float((lost / energy.clamp_min(1e-30)).max()))
    return {"error": (wrong / whole) ** 0.5, "worst": worst**0.5}


def table(rows: list[dict[str, Any]], dtype: str) -> Table:
    """Means over layers; of selectors that were evaluated the bytes at equal KL."""
    levels = [m["level"] for m in rows[0].get("matched", [])]
    head = ["stored", "MB", "error", "worst token", "unexplained", "deviance", *(f"KL {level:g}" for level in levels)]
    lines = [
        [
            dtype if row["stored"] == "auto" else row["stored"],
            f"{row['bytes'] / 1e6:,.1f}",
            f"{row['error']:.2%}",
            f"{row['worst']:.2%}",
            f"{row['unexplained']:.2%}",
            f"{row['deviance']:.4f}",
            *("not reached" if m["bytes"] is None else f"{m['bytes']:.1%}" for m in row.get("matched", [])),
        ]
        for row in rows
    ]
    return Table("Hidden states in fewer bits, and selectors trained from them", head, lines)


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
