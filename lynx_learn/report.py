"""Tables for the terminal, from measured figures."""

from typing import Any

from rich.console import Console
from rich.table import Table


def table(title: str, head: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column is left-aligned, the others right-aligned."""
    made = Table(title=title, title_justify="left")
    for index, name in enumerate(head):
        made.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def show(*parts: object) -> None:
    """Print to standard output, at full width where that is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for part in parts:
        console.print(part, highlight=False)


def evaluation_table(report: dict[str, Any]) -> Table:
    """Every measured point."""
    rows = [
        [
            f"{p['method']} {p['setting']}".strip(),
            str(p["batch_size"]),
            f"{p['experts']:.1f}",
            f"{p['bytes']:.0%}",
            f"{p['kl']:.4f} ± {p['kl_margin']:.4f}",
            f"{p['nll']:+.4f} ± {p['nll_margin']:.4f}",
            f"{1 - p['agreement']:.1%}",
            f"{p['by_source']['kl'][p['worst_source']]:.4f} {p['worst_source']}" if "worst_source" in p else "",
        ]
        for p in report["points"]
    ]
    head = [
        "method",
        "batch",
        "experts",
        "bytes",
        "KL, nats (95%)",
        "ΔNLL, nats (95%)",
        "same greedy",
        "KL, worst source",
    ]
    return table(f"Test text {report['options']['corpus']}, {report['points'][0]['tokens']:,} tokens", head, rows)


def matched_table(report: dict[str, Any]) -> Table:
    """Experts and bytes of every method at equal loss, a row per loss."""
    methods = list(dict.fromkeys(row["method"] for row in report["matched"]))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in report["matched"]:
        loss = f"{'KL' if row['metric'] == 'kl' else 'ΔNLL'} {row['level']:.4f}"
        known = row["experts"] is not None
        cell = f"{row['experts']:.1f} / {row['bytes']:.0%}" if known else "not reached"
        cells.setdefault((loss, str(row["batch_size"])), {})[row["method"]] = cell
    rows = [[loss, size, *(row[method] for method in methods)] for (loss, size), row in cells.items()]
    return table("Experts / bytes at equal loss (on each method's measured curve)", ["loss", "batch", *methods], rows)


def calibration_table(calibration: dict[str, Any]) -> Table:
    """What was certified."""
    rows = []
    for metric, how in calibration.items():
        for budget, cells in how["cells"].items():
            for size, cell in cells.items():
                skips = cell["threshold"] > 0
                rows.append(
                    [
                        f"{metric} {budget}",
                        size,
                        f"{cell['mean']:.4f}" if skips else "–",
                        f"{cell['upper']:.4f}" if skips else "–",
                        f"{cell['experts_before']:.1f} → {cell['experts']:.1f}"
                        if skips
                        else "skips nothing: no threshold qualified",
                        f"{cell['bytes']:.0%}" if skips else "100%",
                    ]
                )
    return table(
        "Calibrated thresholds", ["budget", "batch", "measured", "upper bound", "experts per layer", "bytes"], rows
    )


def training_table(layers: list[dict[str, Any]]) -> Table:
    """Each layer's scorer against the formula, on held-out sequences."""
    kinds = [k for k in ("formula", "linear", "mlp", "gradient_boosting") if k in layers[0]]
    rows = [
        [
            row["name"],
            f"{row['unexplained']:.0%}",
            f"{row['sensitivity']:.3g}",
            *(f"{row[k]['deviance']:.3f} / {row[k]['correlation']:.2f}" for k in kinds),
        ]
        for row in layers
    ]
    return table(
        "Held-out traces: gamma deviance / correlation of predicted and true cost",
        ["layer", "unexplained", "sensitivity", *kinds],
        rows,
    )
