"""Fill the tables and figures of docs/frontier.md and docs/certificate.md from measured reports.

    python docs/measured_pages.py --config docs/measured-pages.yaml
    python docs/measured_pages.py --config docs/measured-pages.yaml --second null

The pages' prose is written by hand; between `<!-- NAME -->` and `<!-- end -->` stands what this script puts there. What no report
is given for stays as it is.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from lynx_learn.show import figures
from lynx_learn.show.quality import guarantees_table, loss
from lynx_learn.show.tables import Table

Report = dict[str, Any]
# Colour and marker of each format of weights, that of the model as it is stored first.
FORMATS = [(figures.RED, "o"), (figures.BLUE, "s"), (figures.SKY, "^"), (figures.GREEN, "D"), (figures.PURPLE, "v")]


@dataclass(frozen=True)
class Options:
    """What the recipe file sets.

    Attributes:
        pages: Markdown files to fill; figures go beside the first.
        main, large_batches, larger, larger_64, top2, second: report folders of `lynx-learn evaluate`: of the reference MoE at a
            small batch with all methods and at large ones, of the larger model and again at 64, of the one with two of eight
            experts, and of the second one.
        ablations, longer: `ablations.json` of `ablations.py`.
        surrogate_kinds, decision_kinds, decision_kinds_larger: Markdown of `surrogate_kinds.py` and of `decision_kinds.py`, of the small
            and of the larger model.
        coverage: `coverage.json` of `lynx-learn coverage`.
        certificate, large_batch, large_batch_all: Markdown of `certificate.py`: of all texts, of one at batch 64, and of all at batch 64
            and fewer positions.
        long_decode, trained_length: Markdown of `long_decode.py`, beyond the positions that the model was trained on and within them.
        quantised, quantised_larger: folders of `quantised.py`, of the small and of the larger model.
        stand_ins, stand_ins_larger: Markdown of `stand_ins.py`, of both.
    """

    pages: list[str]
    main: str | None = None
    large_batches: str | None = None
    larger: str | None = None
    larger_64: str | None = None
    top2: str | None = None
    second: str | None = None
    ablations: str | None = None
    longer: str | None = None
    surrogate_kinds: str | None = None
    decision_kinds: str | None = None
    decision_kinds_larger: str | None = None
    coverage: str | None = None
    certificate: str | None = None
    large_batch: str | None = None
    large_batch_all: str | None = None
    long_decode: str | None = None
    trained_length: str | None = None
    quantised: str | None = None
    quantised_larger: str | None = None
    stand_ins: str | None = None
    stand_ins_larger: str | None = None


def grid(head: list[str], rows: list[list[str]]) -> str:
    return Table("", head, rows).markdown + "\n"


def place(row: Report) -> str:
    return f"{row['batch_size']}, one source" if row["batches"] == "single" else str(row["batch_size"])


def interval(found: dict[str, float | None] | None) -> str:
    if found is None:
        return "not reached"
    span = "" if found["low"] is None else f" ({found['low']:.2f}–{found['high']:.2f})"
    return f"{found['ratio']:.2f}{span}"


def ratios(report: Report) -> str:
    """The learned method at equal loss, relative to the best rule, the formula and the oracle."""
    known = {(m["batch_size"], m["batches"], m["metric"], m["level"], m["method"]): m for m in report["matched"]}
    measured = {m["method"] for m in report["matched"]}
    against = {"bytes_to_best_rule": None, "bytes_to_formula": "formula", "experts_to_oracle": "oracle"}
    rows = []
    for r in report["ratios"]:
        where = (r["batch_size"], r["batches"], r["metric"], r["level"])
        own, best = known[*where, "learned"], known.get((*where, r["best_rule"]))
        rows.append(
            [
                place(r),
                loss(r),
                "not reached" if own["bytes"] is None else f"{own['bytes']:.1%} / {own['experts']:.1f}",
                "none" if best is None else f"{r['best_rule']} {best['bytes']:.1%} / {best['experts']:.1f}",
                *("–" if other and other not in measured else interval(r[key]) for key, other in against.items()),
            ]
        )
    head = ["batch", "loss", "learned: bytes / experts", "best rule", "bytes to best rule"]
    return grid([*head, "bytes to formula", "experts to oracle"], rows)


def matched(report: Report) -> str:
    """Bytes and experts of every method at equal loss, mixed batches of the largest size."""
    size = max(m["batch_size"] for m in report["matched"])
    own = [m for m in report["matched"] if m["batch_size"] == size and m["batches"] == "mixed"]
    losses = list(dict.fromkeys(loss(m) for m in own))
    cells: dict[str, dict[str, str]] = {}
    for m in own:
        reached = m["bytes"] is not None
        cells.setdefault(m["method"], {})[loss(m)] = (
            f"{m['bytes']:.1%} / {m['experts']:.1f}" if reached else "not reached"
        )
    return grid(["method", *losses], [[method, *(row[name] for name in losses)] for method, row in cells.items()])


def worst_sources(report: Report) -> str:
    """KL by source at the calibrated budgets, mixed batches."""
    own = [p for p in report["points"] if p["setting"].startswith("budget=") and p["batches"] == "mixed"]
    names = sorted(own[0]["by_source"]["kl"]) if own else []
    rows = [
        [
            place(p),
            p["setting"].removeprefix("budget="),
            f"{p['kl']:.4f} ± {p['kl_margin']:.4f}",
            f"{p['nll']:+.4f} ± {p['nll_margin']:.4f}",
            f"{p['experts']:.1f}",
            f"{p['bytes']:.1%}",
            *(f"{p['by_source']['kl'][name]:.4f}" for name in names),
        ]
        for p in own
    ]
    return grid(["batch", "budget", "KL (95%)", "ΔNLL (95%)", "experts", "bytes", *names], rows)


def ablation_rows(found: Report) -> str:
    variants = found["variants"]
    levels = sorted({m["level"] for m in variants[0]["matched"]})
    rows = []
    for variant in variants:
        cells = {(m["method"], m["level"]): m for m in variant["matched"] if m["metric"] == "kl"}
        row = [variant["variant"]]
        for level in levels:
            own, oracle = cells["learned", level], cells["oracle", level]
            floor = "–" if oracle["experts"] is None else f"{oracle['experts']:.1f}"
            shown = (
                f"{own['bytes']:.1%} / {own['experts']:.1f} / {floor}" if own["bytes"] is not None else "not reached"
            )
            row.append(shown)
        rows.append(row)
    return grid(["variant", *(f"KL {level:g}: bytes / experts / oracle's experts" for level in levels)], rows)


def coverage_rows(report: Report) -> str:
    exact = report["exact"]
    rows = [
        [
            str(r["batch_size"]),
            f"{r['budget']:g}{', other sources' if r['shift'] else ''}",
            f"{r['test_over']:.1%}",
            f"{r['pool_over']:.1%}",
            *(
                f"{r[name]:.1%} ({r[f'{name}_interval'][0]:.1%}–{r[f'{name}_interval'][1]:.1%})"
                for name in ("true_over", "bound_misses")
            ),
            f"{r['nothing']:.1%}",
            *("–" if r[key] is None else f"{r[key]:.2f}" for key in ("test_share", "upper_share")),
            "–" if r["bytes"] is None else f"{r['bytes']:.0%}",
        ]
        for r in report["rows"]
    ]
    shares = [f"{exact[name]:.1%}" for name in ("test_over", "pool_over", "true_over", "true_over")]
    rows.append(["exact bound", "", *shares, "", "", "", ""])
    head = [
        "batch",
        "budget",
        "test over",
        "pool over",
        "true mean over (95%)",
        "bound misses (95%)",
        "nothing certified",
    ]
    return grid([*head, "test / budget", "bound / budget", "bytes"], rows)


def setting(report: Report) -> str:
    tokens = min(p["tokens"] for p in report["points"])
    e = report["environment"]
    return (
        f"{tokens:,} decode tokens per point or more; {e['machine']}, torch {e['torch']}, transformers "
        f"{e['transformers']}; one run.\n"
    )


# What a block shows, by its name: the option that names its report, and how it is shown.
BLOCKS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "frontier": ("main", ratios),
    "methods": ("main", matched),
    "sources": ("main", worst_sources),
    "setting": ("main", setting),
    "large batches": ("large_batches", ratios),
    "large batches sources": ("large_batches", worst_sources),
    "larger": ("larger", ratios),
    "larger 64": ("larger_64", ratios),
    "top2": ("top2", ratios),
    "top2 methods": ("top2", matched),
    "top2 setting": ("top2", setting),
    "second": ("second", ratios),
    "second methods": ("second", matched),
    "second setting": ("second", setting),
    "ablations": ("ablations", ablation_rows),
    "longer": ("longer", ablation_rows),
    "surrogate kinds": ("surrogate_kinds", str),
    "decision kinds": ("decision_kinds", str),
    "decision kinds larger": ("decision_kinds_larger", str),
    "coverage": ("coverage", coverage_rows),
    "guarantees": ("coverage", lambda report: guarantees_table(report).markdown + "\n"),
    "certificate": ("certificate", str),
    "large batch": ("large_batch", str),
    "large batch all": ("large_batch_all", str),
    "long decode": ("long_decode", str),
    "trained length": ("trained_length", str),
    "quantised": ("quantised", str),
    "quantised larger": ("quantised_larger", str),
    "stand ins": ("stand_ins", str),
    "stand ins larger": ("stand_ins_larger", str),
}


def main(options: Options) -> None:
    """Replace every block that there is a report for."""
    texts = {Path(page): Path(page).read_text() for page in options.pages}
    found = [name for text in texts.values() for name in re.findall(r"<!-- (?!end)(.+?) -->\n", text)]
    if sorted(found) != sorted(BLOCKS):
        raise SystemExit(f"{', '.join(options.pages)}: blocks are {sorted(found)}, expected {sorted(BLOCKS)}")
    for name, (source, make) in BLOCKS.items():
        if (given := getattr(options, source)) is None:
            continue
        (page,) = [page for page, text in texts.items() if f"<!-- {name} -->\n" in text]
        start, rest = texts[page].split(f"<!-- {name} -->\n")
        texts[page] = f"{start}<!-- {name} -->\n{make(read(given))}{rest[rest.index('<!-- end -->') :]}"
    for page, text in texts.items():
        page.write_text(text)
    beside = Path(options.pages[0])
    for given, name in (
        (options.main, "frontier"),
        (options.top2, "frontier-top2"),
        (options.second, "frontier-second"),
    ):
        if given is not None:
            shutil.copyfile(Path(given) / "frontier.svg", beside.with_name(f"{name}.svg"))
    folders = [folder for folder in (options.quantised, options.quantised_larger) if folder is not None]
    if folders:
        quantised_figure([json.loads((Path(f) / "quantised.json").read_text()) for f in folders], beside)


def quantised_figure(reports: list[Report], beside: Path) -> None:
    """Write `quantised.svg`: KL against bytes, a panel for each model; rounding alone, and with skipping on top."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    looks = dict(zip(dict.fromkeys(p["format"] for p in reports[0]["points"]), FORMATS, strict=True))
    with mpl.rc_context(figures.SETTINGS):
        drawn = Figure(figsize=(4.8 * len(reports) + 1.6, 4.4), layout="constrained")
        panels = drawn.subplots(1, len(reports), sharey=True, squeeze=False)[0]
        for panel, report in zip(panels, reports, strict=True):
            for name, (colour, marker) in looks.items():
                own = [p for p in report["points"] if p["format"] == name]
                alone, skipping = ([p for p in own if (p["budget"] is None) == which] for which in (True, False))
                x, y = ([p[key] for p in skipping] for key in ("bytes", "kl"))
                panel.plot(x, y, color=colour, marker=marker, label=name)
                for p in alone:
                    panel.plot(p["bytes"], p["kl"], color=colour, marker=marker, markerfacecolor="white", markersize=9)
            panel.set_title(Path(report["options"]["selector"]).name, loc="left", fontweight="bold", fontsize=13)
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_ylim(bottom=3e-5)
            panel.set_xticks([0.1, 0.15, 0.2, 0.3, 0.5, 0.8])
            panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.grid(color="#DDDDDD", linewidth=0.8)
            panel.set_axisbelow(True)
        panels[0].plot([], [], "o", color=figures.INK, markerfacecolor="white", markersize=9, label="nothing skipped")
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        drawn.supxlabel("weights read per decode step, relative to the untouched model in 16 bits")
        drawn.supylabel("KL to the untouched model, nats per token")
        drawn.savefig(beside.with_name("quantised.svg"), metadata={"Date": None})


def read(given: str) -> Any:
    """A report of a folder or a file, or the text of a Markdown file, of a folder without a report its only one."""
    place = Path(given)
    if place.is_dir():
        report = place / "report.json"
        place = report if report.exists() else next(place.glob("*.md"))
    return place.read_text().strip() + "\n" if place.suffix == ".md" else json.loads(place.read_text())


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
