"""What an evaluation has finished, on disk: a file per group of sequences, so that an interrupted run goes on there.

    options.json                 written first; what a run must match to go on
    groups/16-mixed/00000.json   per group: what every policy lost on each sequence, and what it loaded

Every file is written under a temporary name, flushed and renamed.
"""

import json
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..files import write_atomically

Rows = list[dict[str, Any]]


class Store:
    """The folder of an evaluation; one that holds finished groups of the same identity is gone on with.

    Raises:
        OptionError: it holds something else.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        mark = folder / "options.json"
        if mark.exists():
            try:
                stored = dict(json.loads(mark.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                stored = {}
            if other := [name for name in identity if name not in stored or stored[name] != identity[name]]:
                raise OptionError(
                    f"{folder} holds an evaluation with other {', '.join(other)} (see options.json): choose another --out or remove it"
                )
        elif folder.exists() and not folder.is_dir():
            raise OptionError(f"{folder} is a file: choose another --out")
        elif folder.is_dir() and any(file.name != ".options.json.part" for file in folder.iterdir()):
            raise OptionError(f"{folder} is not empty and holds no evaluation: choose another --out")
        else:
            self.put(mark.name, json.dumps(identity, indent=2) + "\n")

    def read(self, cell: str, index: int) -> Rows | None:
        """A finished group, or None; a damaged file counts as none."""
        try:
            rows: Rows = json.loads((self.folder / self._name(cell, index)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return rows

    def write(self, cell: str, index: int, rows: Rows) -> None:
        self.put(self._name(cell, index), json.dumps(rows))

    def put(self, name: str, text: str) -> None:
        path = self.folder / name
        try:
            write_atomically(path, text.encode())
        except OSError as error:
            raise OptionError(
                f"{path} cannot be written ({error.strerror or error}): mend that and run the same command again, it goes on from there"
            ) from error

    def _name(self, cell: str, index: int) -> str:
        return f"groups/{cell}/{index:05d}.json"
