"""Tables of what was trained and certified, and of the loss and bytes that were measured."""

from typing import Any

from .floor import floor_lines
from .tables import Table


def evaluation_table(report: dict[str, Any]) -> Table:
    """Every measured point."""
    rows = [
        [
            f"{p['method']} {p['setting']}".strip(),
            place(p),
            f"{p['experts']:.1f}",
            f"{p['bytes']:.0%}",
            f"{p['kl']:z.4f} ±{p['kl_margin']:.4f}",
            f"{p['nll']:+z.4f} ±{p['nll_margin']:.4f}",
            f"{1 - p['agreement']:.1%}",
            f"{p['by_source']['kl'][p['worst_source']]:z.4f} {p['worst_source']}" if "worst_source" in p else "",
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
    fewest = min(p["tokens"] for p in report["points"])
    return Table(f"Test text {report['options']['corpus']}, {fewest:,} tokens per point or more", head, rows)


def matched_table(report: dict[str, Any]) -> Table:
    """Bytes, with experts beside them, of every method at equal loss; a row per batch size and method."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in report["matched"]:
        reached = row["bytes"] is not None
        share = f"{row['bytes']:.0%}" if reached else ""
        # Where nothing is saved the experts are the untouched model's, and the cell would not fit.
        cell = f"{share}/{row['experts']:{'.0f' if share == '100%' else '.1f'}}" if reached else "not reached"
        cells.setdefault((row["method"], place(row)), {})[loss(row)] = cell
    losses = list(dict.fromkeys(loss(row) for row in report["matched"]))
    rows = [[method, batch, *(cell[name] for name in losses)] for (method, batch), cell in cells.items()]
    return Table("Bytes/experts at equal loss (on each method's measured curve)", ["method", "batch", *losses], rows)


def ratios_table(report: dict[str, Any]) -> Table:
    """The learned method against the best rule, the formula and the oracle at equal loss."""
    keys = ("bytes_to_best_rule", "bytes_to_formula", "experts_to_oracle")
    rows = [
        [loss(row), place(row), row["best_rule"] or "none", *(interval(row[key]) for key in keys)]
        for row in report["ratios"]
    ]
    head = ["loss", "batch", "best rule", "bytes / best rule", "bytes / formula", "experts / oracle"]
    return Table("The learned method relative to others at equal loss (95%)", head, rows)


def place(row: dict[str, Any]) -> str:
    """Batch size, and whether its batches are of one source."""
    return f"{row['batch_size']} single" if row["batches"] == "single" else str(row["batch_size"])


def loss(row: dict[str, Any]) -> str:
    return f"{'KL' if row['metric'] == 'kl' else 'ΔNLL'} {row['level']:g}"


def interval(found: dict[str, float | None] | None) -> str:
    """A ratio with its interval, as far as there is one."""
    if found is None:
        return "not reached"
    if found["low"] is None:
        return f"{found['ratio']:.3f}"
    return f"{found['ratio']:.3f} ({found['low']:.3f}–{found['high']:.3f})"


def calibration_lines(calibration: dict[str, Any]) -> list[object]:
    """What was certified of each metric, and the noise floor beside it."""
    lines: list[object] = []
    for metric, how in calibration.items():
        lines += [calibration_table(metric, how).without("by quarter of the decode", "groups"), *floor_lines(how)]
    return lines


def calibration_table(metric: str, how: dict[str, Any]) -> Table:
    """A metric's cells below its noise floor."""
    rows = []
    if floor := how.get("floor"):
        kinds = {"with a cache": floor["cached"], floor["other"]: floor["precision"]}
        rows += [
            ["floor", str(floor["batch_size"]), f"{value:.1g}", "–", "–", f"untouched, {kind}", "100%", "–"]
            for kind, value in kinds.items()
            if value is not None
        ]
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
                row = ["–", "–", "–", "skips nothing: no threshold qualified", "100%"]
            rows.append([budget, size, *row, str(cell["groups"])])
    head = ["budget", "batch", "measured", "by quarter of the decode", "upper bound", "experts per layer", "bytes"]
    return Table(f"Calibrated thresholds, metric {metric}", [*head, "groups"], rows)


def percents(row: dict[str, Any], key: str) -> str:
    """A share and its interval."""
    low, high = row[f"{key}_interval"]
    return f"{row[key]:.1%} {100 * low:.1f}–{high:.1%}"


def guarantees_table(report: dict[str, Any]) -> Table:
    """How often what each guarantee promises fails when it is calibrated anew, and the bytes that being sure costs."""
    rows = [
        [
            row["guarantee"],
            str(row["groups"]),
            *(percents(row, key) for key in ("true_over", "bound_misses")),
            *(f"{row[key]:.1%}" for key in ("bytes", "least_bytes")),
        ]
        for row in report["guarantees"]
    ]
    head = ["guarantee", "groups", "promise fails", "bound misses", "bytes", "bytes if means were known"]
    return Table(f"Every guarantee, {report['options']['bootstraps']:,} independent calibrations", head, rows)


def coverage_table(report: dict[str, Any]) -> Table:
    """How often calibration repeated on random splits exceeds its budget, and how close to it it comes."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else f"{value:{form}}"

    rows = [
        [
            f"{row['budget']}{', shifted' if row['shift'] else ''}",
            str(row["batch_size"]),
            f"{row['test_over']:.1%}",
            f"{row['pool_over']:.1%}",
            percents(row, "true_over"),
            percents(row, "bound_misses"),
            f"{row['nothing']:.1%}",
            *(number(row[key], ".2f") for key in ("test_share", "upper_share")),
            number(row["bytes"], ".0%"),
        ]
        for row in report["rows"]
    ]
    exact = report["exact"]
    allowed = ["exact", "", *(f"{exact[key]:.1%}" for key in ("test_over", "pool_over", "true_over", "true_over"))]
    head = ["budget", "batch", "test over", "pool over", "true mean over", "bound misses", "none", "test", "bound"]
    title = f"Calibration repeated, {report['options']['metric']}; loss and bound relative to the budget"
    return Table(title, [*head, "bytes"], [*rows, [*allowed, *[""] * 4]])


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
    return Table(
        "Held-out traces: gamma deviance / correlation of predicted and true cost",
        ["layer", "unexplained", "sensitivity", *(kind.replace("_", " ") for kind in kinds)],
        rows,
    )
