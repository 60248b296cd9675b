"""The model card of a selector, written from measured figures alone: a template, and the tables that it takes."""

from pathlib import Path
from typing import Any

from ..errors import printable
from .floor import floor_lines
from .quality import calibration_table, coverage_table, evaluation_table, guarantees_table, training_table
from .tables import Table

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def render(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Markdown of the card.

    Args:
        config: what `config.json` of the selector holds.
        metrics: what its `metrics.json` holds.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    made = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    made.filters |= {"form": format, "percents": percents}
    tags = ["mixture-of-experts", "inference"]
    data = ModelCardData(library_name="lynx-learn", base_model=config["base_model"], tags=tags)
    config, metrics = in_text(config), in_text(metrics)  # the front matter has a writer that knows what to quote
    calibration, figures = config["calibration"], metrics.get("calibrate") or {}
    coverage, test, train = (metrics.get(name) for name in ("coverage", "evaluate", "train"))
    shifted = [row for row in coverage["rows"] if row["shift"]] if coverage else []
    text = made.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=data.to_yaml(),
        config=config,
        budgets=[budgets(metric, how, calibration[metric]) for metric, how in figures.items()],
        coverage=coverage,
        coverage_table=coverage_table(coverage).markdown if coverage else None,
        guarantees_table=guarantees_table(coverage).markdown if coverage else None,
        worst=max(shifted, key=lambda row: (row["test_over"], row["test_share"] or 0.0), default=None),
        test=test,
        test_table=test_table(test).markdown if test else None,
        not_certified=not_certified(test["sources"], calibration) if test else [],
        train=train,
        training_table=training_table(train["layers"]).markdown if train else None,
        tuning_table=tuning_table(train["tuning"]).markdown if train and train.get("tuning") else None,
        nats_tables=[made.markdown for made in nats_tables(train.get("nats"))] if train else [],
        promises=[promise(metric, how, figures.get(metric, {})) for metric, how in calibration.items()],
    )
    return text.rstrip() + "\n"


def in_text(value: Any) -> Any:
    """JSON whose texts and names can stand in the middle of a line, and between backticks."""
    if isinstance(value, dict):
        return {in_text(key): in_text(part) for key, part in value.items()}
    if isinstance(value, list):
        return [in_text(part) for part in value]
    return printable(value).replace("`", "'") if isinstance(value, str) else value


def percents(interval: list[float]) -> str:
    return f"{100 * interval[0]:.1f}–{interval[1]:.1%}"


def budgets(metric: str, how: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """What was certified of one metric; with each budget the batch size and source that lost most."""
    highest = []
    for budget, cells in how["cells"].items():
        found = [(v, name, size) for size, cell in cells.items() for name, v in cell.get("by_source", {}).items()]
        if found:
            highest.append({"budget": budget, **dict(zip(("loss", "source", "size"), max(found), strict=True))})
    return {
        "metric": metric,
        "limits": limits,
        "bound": how["bound"],
        "table": calibration_table(metric, how).markdown,
        "highest": highest,
        "floor": " ".join(floor_lines(how)),
    }


def promise(metric: str, limits: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """What a calibration guarantees; `earlier` are those of a procedure that measured no quarters of the decode."""
    cells = [cell for row in how.get("cells", {}).values() for cell in row.values() if cell["threshold"] > 0]
    return {"metric": metric, "limits": limits, "earlier": any("by_part" not in cell for cell in cells)}


def not_certified(sources: list[str], calibration: dict[str, Any]) -> list[str]:
    """Sources of the test text that the certificate says nothing of; none where a calibration did not note its own."""
    known = {name for how in calibration.values() for name in how.get("sources", {})}
    return [name for name in sources if name not in known] if known else []


def test_table(report: dict[str, Any]) -> Table:
    """The untouched model and the calibrated budgets."""
    own = [p for p in report["points"] if p["method"] == "untouched" or p["setting"].startswith("budget")]
    return evaluation_table({**report, "points": own})


def nats_tables(nats: dict[str, Any] | None) -> list[Table]:
    """Predicted against measured loss, by threshold and by layer."""
    if not nats or not nats["curve"]:
        return []

    def pair(row: dict[str, Any]) -> list[str]:
        return [f"{row['predicted']:.4f}", f"{row['measured']:.4f}"]

    return [
        Table("", ["threshold", "predicted", "measured"], [[f"{p['threshold']:.2g}", *pair(p)] for p in nats["curve"]]),
        Table("", ["layer", "predicted", "measured"], [[p["name"], *pair(p)] for p in nats["layers"]]),
    ]


def tuning_table(tuning: dict[str, Any]) -> Table:
    """Loss and experts before and after tuning, at the thresholds that were tuned at."""
    rows = [
        [
            str(old["batch_size"]),
            f"{old['threshold']:.2g}",
            *(f"{old[key]:{shape}} → {new[key]:{shape}}" for key, shape in (("kl", ".4f"), ("experts", ".1f"))),
        ]
        for old, new in zip(tuning["before"], tuning["after"], strict=True)
    ]
    return Table("", ["batch", "threshold", "KL, nats per token", "distinct experts per layer"], rows)
