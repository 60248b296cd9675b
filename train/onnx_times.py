"""Time an exported selector with random parameters of a given size against PyTorch.

python train/onnx_times.py --experts 64 --tokens 16 --top_k 8 --hidden 1024 --out runs/onnx-times.json
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from jsonargparse import auto_cli

from lynx_learn import LynxSelector
from lynx_learn.graph.export import ExportOptions, export
from lynx_learn.selector.config import SelectorConfig
from lynx_learn.show.tables import export_lines, show


def measure(
    out: str,
    experts: int = 64,
    tokens: int = 16,
    top_k: int = 8,
    hidden: int = 1024,
    layers: int = 16,
    scorer: Literal["formula", "linear", "mlp"] = "mlp",
    seed: int = 0,
) -> None:
    """Export, compare and time; prints the figures and writes them as JSON.

    Args:
        out: JSON file.
        experts: of a layer.
        tokens: of the batch.
        top_k: experts of a token.
        hidden: width of the hidden state.
        layers: in one graph.
        scorer: kind of scorer.
        seed: of the parameters.
    """
    torch.manual_seed(seed)
    names = tuple(f"layers.{layer}" for layer in range(layers))
    config = SelectorConfig(
        "random parameters", f"seed {seed}", "none", "none", names, experts, top_k, hidden, 1, scorer, rank=0
    )
    selector = LynxSelector(config)
    for parameter in selector.parameters():
        parameter.normal_(std=0.1)
    with TemporaryDirectory() as folder:
        selector.save_pretrained(folder)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        found = export(ExportOptions(folder, time_tokens=tokens, report=out))
    show(*export_lines(found)[1:])


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
