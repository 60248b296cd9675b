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

from lynx_learn.show.quality import guarantees_table, loss
from lynx_learn.show.tables import Table

Report = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the recipe file sets.

    Attributes:
        pages: Markdown files to fill; figures go beside the first.
        main, second: report folders of `lynx-learn evaluate`, of the reference MoE and of the second model.
        ablations: `ablations.json` of `ablations.py`.
        coverage: `coverage.json` of `lynx-learn coverage`.
        certificate, large_batch, large_batch_all: Markdown of `certificate.py`: of all texts, of one at batch 64, and of all at batch 64
            and fewer positions.
        long_decode, trained_length: Markdown of `long_decode.py`, beyond the positions that the model was trained on and within them.
        quantised, quantised_larger, stand_ins, stand_ins_larger: Markdown of `quantised.py` and of `stand_ins.py`, of the small and
            of the larger model.
    """

    pages: list[str]
    main: str | None = None
    second: str | None = None
    ablations: str | None = None
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
                *(interval(r[key]) for key in ("bytes_to_best_rule", "bytes_to_formula", "experts_to_oracle")),
            ]
        )
    head = ["batch", "loss", "learned: bytes / experts", "best rule", "bytes to best rule"]
    return grid([*head, "bytes to formula", "experts to oracle"], rows)


def matched(report: Report, size: int) -> str:
    """Bytes and experts of every method at equal loss, mixed batches of one size."""
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
    "methods": ("main", lambda report: matched(report, 16)),
    "sources": ("main", worst_sources),
    "setting": ("main", setting),
    "second": ("second", ratios),
    "second methods": ("second", lambda report: matched(report, 16)),
    "second setting": ("second", setting),
    "ablations": ("ablations", ablation_rows),
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
    for given, name in ((options.main, "frontier"), (options.second, "frontier-second")):
        if given is not None:
            shutil.copyfile(Path(given) / "frontier.svg", Path(options.pages[0]).with_name(f"{name}.svg"))


def read(given: str) -> Any:
    """A report of a folder or a file, or the text of a Markdown file."""
    place = Path(given)
    place = place / "report.json" if place.is_dir() else place
    return place.read_text().strip() + "\n" if place.suffix == ".md" else json.loads(place.read_text())


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
