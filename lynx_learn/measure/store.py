"""What an evaluation has finished, on disk: a file per group of sequences, so that an interrupted run goes on there.

    options.json                 written first; what a run must match to go on
    groups/16-mixed/00000.json   per group: what every policy lost on each sequence, and what it loaded

Every file is written under a temporary name, flushed and renamed.
"""

import json
from pathlib import Path
from typing import Any

from ..files import RunFolder

Rows = list[dict[str, Any]]


class Store(RunFolder):
    """The folder of an evaluation; one that holds finished groups of the same identity is gone on with.

    Raises:
        OptionError: it holds something else, or cannot be written to.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        super().__init__(folder, identity, "an evaluation")

    def read(self, cell: str, index: int) -> Rows | None:
        """A finished group, or None; a damaged file counts as none."""
        try:
            rows: Rows = json.loads((self.folder / self._name(cell, index)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return rows

    def write(self, cell: str, index: int, rows: Rows) -> None:
        self.put(self._name(cell, index), json.dumps(rows).encode())

    def _name(self, cell: str, index: int) -> str:
        return f"groups/{cell}/{index:05d}.json"
