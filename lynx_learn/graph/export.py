"""`lynx-learn export`: a selector's decision as one ONNX graph for all layers, checked before it is written.

The graph answers what decode does with a batch of one layer, but for the surrogates: those are a product with the hidden
state that belongs to the serving engine's own kernels, and what is left out adds nothing without them.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import LynxError, OptionError
from ..files import check_target, write, write_json
from ..selector.selector import LynxSelector
from .check import check
from .graph import to_bytes
from .onnx_runtime import OnnxSelector, Provider, runtime_with
from .times import time_layers

FILE = "selector.onnx"


@dataclass(frozen=True)
class ExportOptions:
    """Write a selector as an ONNX graph for serving engines, checked against PyTorch."""

    selector: str
    """folder or Hub id"""
    out: str | None = None
    """file to write; by default selector.onnx in the selector's folder"""
    format: Literal["onnx"] = "onnx"
    """what is written; only onnx"""
    provider: Provider = "cpu"
    """where onnxruntime runs the graph to check it: cpu or cuda"""
    time_tokens: int = 0
    """size of the batch at which the graph is timed against PyTorch, on one CPU thread; 0 for none"""
    report: str | None = None
    """JSON file for what was found"""

    def __post_init__(self) -> None:
        if self.time_tokens < 0:
            raise OptionError(f"--time_tokens {self.time_tokens} is not usable: expected 0 or more")


def export(options: ExportOptions) -> dict[str, Any]:
    """Export a selector; the file is written once the graph has been found to decide as PyTorch does on every layer.

    Raises:
        LynxError: the extra `onnx` is not installed, the provider is not usable, or the graph decides otherwise.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise LynxError(f"{error.name} is not installed: pip install 'lynx-learn[onnx]'") from None
    runtime_with(options.provider)
    selector = LynxSelector.from_pretrained(options.selector)
    if options.out is None and not Path(options.selector).is_dir():
        raise OptionError(f"--out is missing: {options.selector} is no folder here to put {FILE} into")
    target = Path(options.out or Path(options.selector) / FILE)
    for path in (target, *([Path(options.report)] if options.report else [])):
        check_target(path)
    data = to_bytes(selector)
    runner = OnnxSelector(data, options.provider)
    found: dict[str, Any] = {
        "file": str(target),
        "bytes": len(data),
        "provider": runner.provider,
        "versions": _versions(),
        "parity": asdict(check(selector, runner)),
    }
    write(target, data)
    if options.time_tokens:
        found["times"] = time_layers(selector, OnnxSelector(target), options.time_tokens)
    if options.report:
        write_json(Path(options.report), found)
    return found


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
