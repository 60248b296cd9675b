"""Layers of a training that are fitted, each in a file of its own, so that a run goes on after a kill.

    .train.part/options.json           what two runs must have in common for their layers to belong together
    .train.part/00000.safetensors      one layer's scorer and surrogates; in its metadata figures, logs and checksum

The folder stands inside that of the selector and goes away when the selector is written.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..files import PART, RunFolder, digest

FOLDER = f".train{PART}"


class FittedLayers(RunFolder):
    """The fitted layers of the selector in `out`.

    Raises:
        OptionError: it holds those of another training, or cannot be written to.
    """

    def __init__(self, out: Path, identity: dict[str, Any], by: str = "") -> None:
        super().__init__(out / FOLDER, identity, "a training", by)

    def write(self, layer: int, fitted: nn.Module, figures: dict[str, Any], logs: dict[str, str]) -> None:
        tensors = {name: value.contiguous().cpu() for name, value in fitted.state_dict().items()}
        said = {"figures": json.dumps(figures), "logs": json.dumps(logs), "sha256": digest(save(tensors))}
        self.put(self._name(layer), save(tensors, said))

    def read(self, layer: int, into: nn.Module | None = None) -> tuple[dict[str, Any], dict[str, str]] | None:
        """Figures and logs of a fitted layer, or None; a damaged file counts as none.

        Args:
            into: what takes its weights.
        """
        try:
            with safe_open(self.folder / self._name(layer), "pt") as file:
                said = file.metadata()
                figures, logs = json.loads(said["figures"]), json.loads(said["logs"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if digest(save(tensors)) != said["sha256"]:
                return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        if into is not None:
            into.load_state_dict(tensors)
        return figures, logs

    @staticmethod
    def _name(layer: int) -> str:
        return f"{layer:05d}.safetensors"
