"""Figures from the reports of `evaluate` and `bench`."""

from pathlib import Path
from typing import Any

# Colours of Okabe and Ito, which people who confuse red and green can tell apart; methods that share one differ in marker.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73"),
    *("#0072B2", "#D55E00", "#CC79A7"),
)
GREY, INK = "#8C8C8C", "#444444"
# Heading -> method -> label, colour, marker.
LEGEND = {
    "with surrogates": {
        "learned": ("learned", RED, "o"),
        "learned_lda": ("learned, with LDA", RED, "^"),
        "formula": ("formula, not learned", ORANGE, "o"),
        "oracle": ("oracle: the true cost", BLACK, ""),
        "one_expert": ("one expert per layer", ORANGE, "x"),
    },
    "keep M experts": {
        "gate_sq": ("gate²", BLUE, "s"),
        "gate_max": ("gate maximum", BLUE, "^"),
        "gate_sum": ("gate sum", BLUE, "D"),
        "xshare": ("XShare", SKY, "s"),
        "lynx": ("Lynx", SKY, "^"),
        "vote": ("vote", SKY, "D"),
        "popularity": ("popularity", GREY, "s"),
        "random": ("random", GREY, "x"),
    },
    "other rules": {
        "k1k2": ("k1/k2", SKY, "x"),
        "lda": ("LDA", SKY, "v"),
        "layered": ("gate² × norm² × layer", GREEN, "o"),
        "contribution": ("contribution", GREEN, "s"),
        "ace": ("ACE", GREEN, "x"),
        "modes": ("MoDES", SKY, "o"),
        "alloc": ("Alloc-MoE", GREEN, "v"),
        "oea": ("OEA", GREEN, "^"),
        "naee": ("NAEE", GREEN, "D"),
        "sere": ("SERE", PURPLE, "s"),
        "exfold": ("ExFold", PURPLE, "D"),
        "siftmoe": ("SiftMoE", PURPLE, "^"),
        "top_k": ("smaller top-k", GREY, "^"),
    },
}
SINGLE = "batches of one source"
STYLES = {method: style for methods in LEGEND.values() for method, style in methods.items()}
# The losses that are shown reach beyond the levels by this factor.
ROOM = 2.0
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "lynx-learn",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def frontier(report: dict[str, Any], folder: Path) -> None:
    """Write `frontier.svg` and `frontier.png`: KL against bytes loaded, a panel per batch size, a line per method.

    Of a method's settings those are joined that no other of its settings beats in both bytes and KL. Where batches of
    one source were measured too, the learned method and the best rule on them are dashed. An arrow shows the learned
    method's saving over the best rule at the middle level.
    """
    import matplotlib as mpl

    with mpl.rc_context(SETTINGS):
        figure = _draw(report)
        figure.savefig(folder / "frontier.svg", metadata={"Date": None})
        figure.savefig(folder / "frontier.png", dpi=160)


def front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that none beats in both bytes and KL, by rising bytes."""
    found: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["bytes"], p["kl"])):
        if not found or point["kl"] < found[-1]["kl"]:
            found.append(point)
    return found


def _draw(report: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    sizes = sorted({point["batch_size"] for point in report["points"]})
    columns = min(2, len(sizes))
    rows = -(-len(sizes) // columns)
    figure = Figure(figsize=(4.6 * columns + 2.3, max(3.5 * rows + 0.5, 6.0)), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, size in zip(panels, sizes, strict=False):
        _draw_panel(panel, report, size)
    for panel in panels[len(sizes) :]:
        panel.remove()
    if len(sizes) % columns:
        panels[len(sizes) - columns].tick_params(labelbottom=True)
    panels[0].text(0.03, 0.04, "↙ better", transform=panels[0].transAxes, color=INK)
    figure.supxlabel("weights read per decode step, relative to the untouched model")
    figure.supylabel("KL to the untouched model, nats per token")
    _draw_legend(figure, report)
    return figure


def _draw_panel(panel: Any, report: dict[str, Any], size: int) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    levels = sorted(set(report["options"]["levels"]))
    points = [point for point in report["points"] if point["batch_size"] == size and point["kl"] > 0]
    kinds = {point["batches"] for point in points}
    best = {row["best_rule"] for row in report["ratios"] if row["batch_size"] == size and row["metric"] == "kl"}
    for method in reversed(STYLES):
        for batches in sorted(kinds, reverse=True):
            own = [p for p in points if p["method"] == method and p["batches"] == batches]
            beside = batches == "single" and "mixed" in kinds
            if own and (not beside or method in {"learned", *best}):
                _draw_line(panel, front(own), method, beside)
    for row in report["ratios"]:
        middle = row["level"] == levels[len(levels) // 2] and row["metric"] == "kl" and row["batches"] == "mixed"
        if row["batch_size"] == size and middle and row["bytes_to_best_rule"]:
            _draw_saving(panel, report, row)
    title = f"batch of {size}, one source" if kinds == {"single"} else f"batch of {size}"
    panel.set_title(title, loc="left", fontweight="bold", fontsize=13)
    panel.set_yscale("log")
    panel.set_ylim(levels[0] / ROOM, levels[-1] * ROOM)
    panel.set_yticks(levels)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    panel.set_axisbelow(True)


def _draw_line(panel: Any, points: list[dict[str, Any]], method: str, beside: bool) -> None:
    """One method's line; `beside` the one that matters more, it is dashed and pale."""
    look = _look(method)
    if beside:
        look |= {"linestyle": "--", "alpha": 0.6, "marker": None}
    x, y, margins = ([point[key] for point in points] for key in ("bytes", "kl", "kl_margin"))
    # The oracle may lie on the learned line, and is thin enough to be drawn over it.
    order = 4 if method == "oracle" else 3 if method in LEGEND["with surrogates"] else 2
    panel.errorbar(x, y, margins, fmt="none", ecolor=look["color"], alpha=0.25, zorder=order)
    panel.plot(x, y, zorder=order, **look)


def _draw_saving(panel: Any, report: dict[str, Any], row: dict[str, Any]) -> None:
    """An arrow between the learned method and the best rule at one level, with the bytes saved."""
    same = ("batch_size", "batches", "metric", "level")
    here = {m["method"]: m["bytes"] for m in report["matched"] if all(m[key] == row[key] for key in same)}
    ends = here["learned"], here[row["best_rule"]]
    arrow = {"arrowstyle": "<->", "color": INK, "shrinkA": 0, "shrinkB": 0}
    panel.annotate("", (ends[0], row["level"]), (ends[1], row["level"]), arrowprops=arrow, zorder=5)
    panel.annotate(
        f"{row['bytes_to_best_rule']['ratio'] - 1:+.0%}".replace("-", "−"),
        (max(ends), row["level"]),
        (5, -4),  # lines fall to the right, so there is most room below the right end
        textcoords="offset points",
        ha="right",
        va="top",
        fontweight="bold",
        fontsize=11,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0},
        zorder=6,
    )


def _look(method: str) -> dict[str, Any]:
    _, colour, marker = STYLES[method]
    learned = method == "learned"
    return {
        "color": colour,
        "marker": marker or None,
        "markersize": 7 if learned else 5,
        "markerfacecolor": colour if learned else "white",
        "linewidth": 3.6 if learned else 1.4,
        "linestyle": "--" if method == "oracle" else "-",
    }


def _draw_legend(figure: Any, report: dict[str, Any]) -> None:
    """One entry per method that was measured, under headings."""
    from matplotlib.lines import Line2D

    measured = {point["method"] for point in report["points"]}
    entries = []
    for heading, methods in LEGEND.items():
        own = [
            Line2D([], [], label=style[0], **_look(method)) for method, style in methods.items() if method in measured
        ]
        entries += [_heading(heading), *own] if own else []
    if {point["batches"] for point in report["points"]} == {"mixed", "single"}:
        entries += [
            _heading(SINGLE),
            Line2D([], [], color=INK, linestyle="--", alpha=0.6, label="learned, best rule"),
        ]
    legend = figure.legend(handles=entries, loc="outside right center", frameon=False)
    for text in legend.get_texts():
        if text.get_text() in (*LEGEND, SINGLE):
            text.set_fontweight("bold")


def _heading(text: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="", label=text)


def step_times(report: dict[str, Any], folder: Path) -> None:
    """Write `bench.svg` and `bench.png`: time of a decode step against distinct experts, a panel per case.

    The line is what steps take that load so many experts and decide nothing; an arrow goes from the untouched step to
    the one that skips.
    """
    import matplotlib as mpl

    with mpl.rc_context(SETTINGS):
        figure = _draw_steps(report)
        figure.savefig(folder / "bench.svg", metadata={"Date": None})
        figure.savefig(folder / "bench.png", dpi=160)


def _draw_steps(report: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    cases = report["cases"]
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(1.5 + 4.2 * columns, 0.8 + 3.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, case in zip(panels, cases, strict=False):
        line = case["line"]
        experts = [point[0] for point in line["points"]] + [case["experts_off"]]
        ends = [0.0, max(experts)]
        panel.plot(ends, [line["a_ms"] + line["b_ms"] * x for x in ends], color=GREY, linewidth=1.4)
        panel.plot(
            *zip(*line["points"], strict=True), "o", color=GREY, markerfacecolor="white", label="nothing decided"
        )
        off, on = (case["experts_off"], case["off_ms"]), (case["experts_on"], case["on_ms"])
        panel.plot(*off, "s", color=BLUE, markersize=8, label="untouched")
        panel.plot(*on, "o", color=RED, markersize=9, label="skipping")
        panel.annotate("", on, off, arrowprops={"arrowstyle": "->", "color": INK, "shrinkA": 6, "shrinkB": 6})
        ratio = f"off / on: {case['ratio']:.2f}"
        panel.text(0.97, 0.05, ratio, transform=panel.transAxes, ha="right", fontweight="bold", color=INK)
        title = f"batch of {case['batch_size']}, {case['dtype']}, {case['implementation']}"
        panel.set_title(title, loc="left", fontweight="bold", fontsize=11)
        panel.set_xlim(left=0)
        panel.set_ylim(0, 1.1 * max(case["off_ms"], case["on_ms"], *(point[1] for point in line["points"])))
        panel.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        panel.set_axisbelow(True)
    for panel in panels[len(cases) :]:
        panel.remove()
    panels[0].legend(frameon=False, loc="upper left")
    figure.supxlabel("distinct experts that a layer loads")
    figure.supylabel("decode step, ms")
    return figure
