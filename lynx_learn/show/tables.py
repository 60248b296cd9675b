"""Tables from measured figures, for the terminal and for pages."""

from dataclasses import dataclass
from typing import Any

import rich.table
from rich import box
from rich.console import Console

from ..errors import printable
from .floor import floor_lines

# Columns of a page, and those between two columns of a table.
WIDTH, GAP = 80, 2


@dataclass(frozen=True)
class Table:
    """Heads and rows, which a terminal shows and a page holds as Markdown. Names in them may come from anybody's files."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", printable(self.title))
        object.__setattr__(self, "rows", [[printable(" ".join(cell.split())) for cell in row] for row in self.rows])

    def without(self, *names: str) -> "Table":
        """The same without these columns."""
        kept = [index for index, name in enumerate(self.head) if name not in names]
        return Table(self.title, [self.head[i] for i in kept], [[row[i] for i in kept] for row in self.rows])

    @property
    def markdown(self) -> str:
        """Without the title; a cell may hold whatever means something there."""
        rows = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        lines = [self.head, ["---"] * len(self.head), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def __rich__(self) -> rich.table.Table:
        """At most 80 columns wide; the first column is left-aligned, the others right-aligned."""
        made = rich.table.Table(
            title=self.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
        )
        widths = fit([[name, *(row[index] for row in self.rows)] for index, name in enumerate(self.head)])
        for index, (name, width) in enumerate(zip(self.head, widths, strict=True)):
            made.add_column(name, justify="left" if index == 0 else "right", width=width, overflow="fold")
        for row in self.rows:
            made.add_row(*row)
        return made


def fit(columns: list[list[str]]) -> list[int]:
    """Widths with which columns fit: cells wrap between words, first where that narrows most, then within words."""
    words = [max((len(word) for cell in column for word in cell.split()), default=1) for column in columns]
    widths = [max(least, *map(len, column[1:] or [""])) for least, column in zip(words, columns, strict=True)]
    while (excess := sum(widths) + GAP * len(widths) - 1 - WIDTH) > 0:
        most = max(range(len(widths)), key=lambda i: (widths[i] - words[i], widths[i]))
        least = words[most] if widths[most] > words[most] else 1
        widths[most] = max(least, widths[most] - excess) if least > 1 else widths[most] - 1
    return widths


def show(*parts: object) -> None:
    """Print to standard output; paths and other lines of text stay whole, so that they can be copied."""
    plain: dict[str, Any] = {"markup": False, "emoji": False}  # names may hold brackets and colons
    console = Console(**plain)
    if not console.is_terminal:
        console = Console(width=WIDTH, **plain)
    for part in parts:
        is_text = isinstance(part, str)
        console.print(part, highlight=False, soft_wrap=is_text, end="\n" if is_text else "\n\n")


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


def export_lines(found: dict[str, Any]) -> list[object]:
    """What was exported, how far it is from PyTorch, and its times if it was timed."""
    parity = found["parity"]
    sizes = ", ".join(map(str, parity["tokens"]))
    lines: list[object] = [
        f"{found['file']}: {found['bytes'] / 1e3:,.0f} kB, checked with onnxruntime on {found['provider']}",
        f"against PyTorch on {parity['layers']} layers, batches of {sizes}: costs differ by at most "
        f"{parity['absolute']:.1e} nats, {parity['relative']:.1e} relatively; keep bits: {parity['differing']} of "
        f"{parity['bits']:,} differ",
    ]
    if times := found.get("times"):
        names = {
            "eager": "PyTorch, eager",
            "compiled": "PyTorch, torch.compile",
            "onnxruntime": "onnxruntime",
            "bound": "onnxruntime, IO binding",
            "runner": "OnnxSelector.run, from tensors",
        }
        rows = []
        for key, name in names.items():
            row = times["microseconds"][key]
            rows.append([name, *(f"{row[part]:.1f}" for part in ("median", "low", "high"))] if row else [name, *"–––"])
        lines.append(
            f"{times['experts']} experts, {times['tokens']} tokens, top {times['top_k']}, width {times['hidden']}, scorer "
            f"{times['scorer']}; one thread, {times['machine']['processor']}"
        )
        lines.append(Table("Microseconds of one layer's decision", ["by", "median", "10%", "90%"], rows))
        if "reason" in times["microseconds"]:
            lines.append(f"torch.compile is not usable here: {times['microseconds']['reason']}")
    return lines


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


def offload_tables(report: dict[str, Any]) -> list[Table | str]:
    """Decode steps with experts on disk by what reads them and what skips, what was read ahead, and bytes at equal loss."""
    rows, ahead = report["rows"], [row for row in report["rows"] if row.get("prefetched_bytes_per_token")]
    size = f"{report['options']['model']}, batch {report['options']['batch_size']}"
    head = ["way, share held", "experts", "MB / token", "there", "wait, ms", "n", "KL", "tokens / s", "peak MB"]
    lines: list[Table | str] = [
        Table(
            f"Experts on disk: {size}",
            head,
            [
                [
                    _way(row),
                    _or_none(row["experts"], "{:.1f}"),
                    _or_none(row["bytes_per_token"], "{:.3f}", 1e6),
                    _or_none(row["hits"], "{:.0%}"),
                    _or_none(row["wait_ms"] and sum(row["wait_ms"]) / len(row["wait_ms"]), "{:.2f}"),
                    _or_none(row["batches"], "{:.0f}"),
                    f"{row['kl']:z.4f}",
                    f"{row['tokens_per_s']:.1f}",
                    _or_none(row["peak_rss"], "{:.0f}", 2**20),
                ]
                for row in rows
            ],
        ),
        "wait: for the disk, of a layer and step; there: of the experts needed, when the gate has chosen; n: such batches that would "
        "have to decode as one for computing to hide the reading. peak MB: of each way's own "
        f"process, {_or_none(rows[0]['start_rss'], '{:.0f}', 2**20)} of them before it loads the model.",
    ]
    if any(row["share"] is None for row in rows):
        lines.append(
            "Memory mapping and accelerate read through the page cache, which held nothing of the model when they began and may "
            "come to hold all of it; their bytes are what the system counts as read from disks. The other ways read past it."
        )
    if ahead:
        lines.append(
            Table(
                "Read ahead",
                ["by, share held", "there", "MB / token", "of it unused"],
                [
                    [
                        _way(row),
                        f"{row['hits']:.0%}",
                        f"{row['prefetched_bytes_per_token'] / 1e6:.3f}",
                        f"{row['unused_bytes_per_token'] / row['prefetched_bytes_per_token']:.0%}",
                    ]
                    for row in ahead
                ],
            )
        )
    if report["matched"]:
        lines.append(
            Table(
                "MB read for a token at equal KL, by prices",
                ["share held", "KL", "uniform", "residency", "ratio"],
                [
                    [
                        f"{row['share']:.0%}",
                        f"{row['kl']:.4f}",
                        f"{row['uniform'] / 1e6:.3f}",
                        f"{row['residency'] / 1e6:.3f}",
                        f"{row['ratio']:.2f}",
                    ]
                    for row in report["matched"]
                ],
            )
        )
    return lines


def _way(row: dict[str, Any]) -> str:
    tau = f" {row['threshold']:g}" if row["threshold"] else ""
    return f"{row['way']}{tau}" + ("" if row["share"] is None else f", {row['share']:.0%}")


def _or_none(value: float | None, form: str, unit: float = 1.0) -> str:
    return "–" if value is None else form.format(value / unit)


def replay_tables(report: dict[str, Any]) -> list[Table]:
    """Hits of fast memory by eviction rule, and experts foreseen by predictor."""
    rules = [name for name in report["hits"][0] if name not in ("batch_size", "share", "needed")]
    hits = [
        [f"{row['batch_size']}, {row['share']:.0%}", f"{row['needed']:.1f}", *(f"{row[rule]:.0%}" for rule in rules)]
        for row in report["hits"]
    ]
    foreseen = [
        [f"{row['batch_size']}, {row['predictor']}", f"{row['foreseen']:.0%}", f"{row['half']:.0%}"]
        for row in report["foreseen"]
    ]
    return [
        Table("Needed experts that are in fast memory", ["batch, held", "needed", *rules], hits),
        Table(
            "Experts of the next layer that are foreseen, with as many guesses as are needed and with half",
            ["batch, by", "as many", "half as many"],
            foreseen,
        ),
    ]


SIMULATED = {
    "busiest": ("experts on the busiest", "{:.1f}"),
    "mean": ("mean", "{:.1f}"),
    "experts": ("experts", "{:.1f}"),
    "bound": ("bound", "{:.3f}"),
    "late": ("late", "{:.1%}"),
    "loss": ("predicted loss", "{:.4f}"),
}
RELATIVE = {"bytes": "bytes", "seconds": "time", "joules": "energy"}


def simulation_table(report: dict[str, Any]) -> Table:
    """Ways of running a trace on described hardware; times and energies relative to the first of each batch size."""
    rows, first = report["rows"], {}
    for row in reversed(rows):
        first[row["batch_size"]] = row
    plain, relative = ([name for name in own if name in rows[0]] for own in (SIMULATED, RELATIVE))
    budget = "" if report["budget"] is None else f", budget {report['budget']:g}"
    return Table(
        f"Simulated: {report['model']} on {report['hardware']}{budget}; {', '.join(RELATIVE[name] for name in relative)} "
        "relative to each batch's first row",
        ["batch, rule", *(SIMULATED[name][0] for name in plain), *(RELATIVE[name] for name in relative)],
        [
            [
                f"{row['batch_size']}, {row['rule']}",
                *(SIMULATED[name][1].format(row[name]) for name in plain),
                *(f"{row[name] / first[row['batch_size']][name]:.2f}" for name in relative),
            ]
            for row in rows
        ],
    )


def bench_tables(report: dict[str, Any]) -> list[Table | str]:
    """Times of decode steps and whole calls with skipping on and off, the loss, and where the time of deciding goes."""
    if "skipped" in report:
        return [f"skipped: {report['skipped']}"]
    options, where, cases = report["options"], report["environment"], report["cases"]
    what = options["model"] or f"shape {options['shape']}, {options['layers']} layers, random weights"
    machine = f"{where['machine']}, {where['device']}, {where['threads']} thread(s), torch {where['torch']}"
    several = len({case["implementation"] for case in cases}) > 1
    head = [
        f"{case['dtype']}{' ' + case['implementation'] if several else ''}, batch {case['batch_size']}"
        for case in cases
    ]
    rows = {
        "decode step off, ms": [f"{case['off_ms']:.2f}" for case in cases],
        "on, ms": [f"{case['on_ms']:.2f}" for case in cases],
        "off / on": [f"{case['ratio']:.2f}" for case in cases],
        "its 95% interval": [f"{case['ratio_low']:.2f} to {case['ratio_high']:.2f}" for case in cases],
        "experts per layer off": [f"{case['experts_off']:.1f}" for case in cases],
        "on": [f"{case['experts_on']:.1f}" for case in cases],
        "bytes": [f"{case['bytes']:.0%}" for case in cases],
        "line a + b T: a, ms": [f"{case['line']['a_ms']:.2f}" for case in cases],
        "b, ms per expert": [f"{case['line']['b_ms']:.3f}" for case in cases],
        "of the line's saving": ["–" if case["realised"] is None else f"{case['realised']:.0%}" for case in cases],
    }
    if options["generate"]:
        rows |= {
            "generate off, tokens/s": [f"{case['generate']['tokens_per_s_off']:.0f}" for case in cases],
            "generate on, tokens/s": [f"{case['generate']['tokens_per_s_on']:.0f}" for case in cases],
            "generate on / off": [f"{case['generate']['ratio']:.2f}" for case in cases],
            "same tokens": [f"{case['generate']['same_tokens']:.0%}" for case in cases],
        }
    if options["held_out"]:
        rows |= {
            "held-out KL, nats": [f"{case['loss']['kl']:.4f}" for case in cases],
            "held-out ΔNLL, nats": [f"{case['loss']['nll']:+.4f}" for case in cases],
            "held-out tokens that differ": [f"{case['loss']['agreement']:.1%}" for case in cases],
            "held-out bytes": [f"{case['loss']['bytes']:.0%}" for case in cases],
        }
        machine += f"; loss on {options['held_out']}"
    rows |= {
        "deciding without skipping, ms": [f"{case['deciding_ms']:.2f}" for case in cases],
        "of a step": [f"{case['overhead']:.1%}" for case in cases],
        "µs per layer": [f"{case['microseconds_per_layer']['all']:.0f}" for case in cases],
    }
    parts = dict.fromkeys(part for case in cases for part in case["microseconds_per_layer"] if part != "all")
    rows |= {
        f"while skipping, µs: {part}": [
            f"{case['microseconds_per_layer'][part]:.0f}" if part in case["microseconds_per_layer"] else "–"
            for case in cases
        ]
        for part in parts
    }
    title = f"Decode step: {what}; {machine}"
    return [Table(title, ["", *head], [[label, *values] for label, values in rows.items()])]
