"""What stands beside a selector in its directory: figures, card, and records of what ran."""

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import SelectorError
from ..files import compact_json
from ..show.card import render
from .config import CARD, CONFIG, METRICS, RUN
from .selector import LynxSelector


def read_metrics(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The figures measured so far for the selector in `folder`; empty where there are none.

    Raises:
        SelectorError: `folder` is none on this machine, or its figures cannot be read.
    """
    if not Path(folder).is_dir():
        raise SelectorError(
            f"{folder} is no folder here: figures and thresholds are written into a selector's folder; make one with "
            "`lynx-learn train`, or download it first"
        )
    path = Path(folder) / METRICS
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise SelectorError(f"{path} is damaged ({error}): restore it, or train the selector again") from None


def write_card(folder: Path, selector: LynxSelector, metrics: dict[str, Any], files: dict[str, str]) -> None:
    """Save the selector with `metrics.json`, the card made from it, and further `files` (name -> text).

    Raises:
        SelectorError: the folder cannot be written to.
    """
    text = compact_json(metrics) + "\n"
    try:
        selector.save_pretrained(folder, {METRICS: text, CARD: render(asdict(selector.config), metrics), **files})
    except (OSError, SafetensorError) as error:  # the latter when the disk is full while the weights are written
        raise SelectorError(
            f"{folder} cannot be written ({error}): make room there or choose another place, then run the command again"
        ) from error


def run_record(command: str, options: dict[str, Any]) -> str:
    """YAML with the exact options and the versions of what ran."""
    import yaml

    packages = ("torch", "transformers", "lightning", "scikit-learn", "safetensors", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    record = {command: options, "versions": {"python": platform.python_version(), **versions}}
    return yaml.safe_dump(record, sort_keys=False)


def is_made_by(folder: Path, record: str, name: str = RUN) -> bool:
    """Whether there is a selector in `folder` and the file `name` says `record` of it, see `run_record`."""
    try:
        return (folder / CONFIG).is_file() and (folder / name).read_text(encoding="utf-8") == record
    except (OSError, ValueError):
        return False
