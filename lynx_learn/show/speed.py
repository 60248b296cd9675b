"""Tables of times, of what was read, and of what is simulated to be."""

from typing import Any

from .tables import Table


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


def measured_table(report: dict[str, Any]) -> Table:
    """Energy of ways of choosing helpers, by batch size and rule, at equal measured loss."""
    levels = list(dict.fromkeys(row["level"] for row in report["measured"]))
    cells: dict[str, list[str]] = {}
    for row in report["measured"]:
        cells.setdefault(f"{row['batch_size']}, {row['rule']}", []).append(
            "not reached" if row["energy"] is None else f"{row['energy']:.2f}"
        )
    return Table(
        f"Energy relative to all experts, simulated, at equal measured loss: {report['model']} on {report['hardware']}",
        ["batch, rule", *(f"KL {level:g}" for level in levels)],
        [[name, *own] for name, own in cells.items()],
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
