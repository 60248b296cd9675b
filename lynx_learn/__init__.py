"""Learn which experts a batch can skip, and skip them at decode within a quality budget."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "BenchOptions",
    "CalibrateOptions",
    "CollectOptions",
    "CorpusError",
    "CoverageOptions",
    "EvaluateOptions",
    "ExportOptions",
    "ImportRoutesOptions",
    "InspectOptions",
    "LynxError",
    "LynxSelector",
    "ModelError",
    "OffloadBenchOptions",
    "Offloading",
    "OnnxSelector",
    "OptionError",
    "ReplayOptions",
    "SelectorError",
    "SimulateOptions",
    "Skipping",
    "Trace",
    "TraceError",
    "TrainOptions",
    "Unfinished",
    "bench",
    "bench_offload",
    "calibrate",
    "collect",
    "coverage",
    "evaluate",
    "export",
    "find_moe_layers",
    "import_routes",
    "inspect_model",
    "load_model",
    "offload_experts",
    "reference_moe",
    "replay",
    "simulate",
    "skip_experts",
    "train",
]

if TYPE_CHECKING:
    from .decode.bench import BenchOptions, bench
    from .decode.runtime import Skipping, skip_experts
    from .errors import CorpusError, LynxError, ModelError, OptionError, SelectorError, TraceError, Unfinished
    from .fit.train import TrainOptions, train
    from .graph.export import ExportOptions, export
    from .graph.onnx_runtime import OnnxSelector
    from .hardware.simulate import SimulateOptions, simulate
    from .inspection import InspectOptions, inspect_model
    from .integrations.vllm.routes import ImportRoutesOptions, import_routes
    from .measure.calibrate import CalibrateOptions, calibrate
    from .measure.coverage import CoverageOptions, coverage
    from .measure.evaluate import EvaluateOptions, evaluate
    from .moe.families import find_moe_layers
    from .moe.loading import load_model, reference_moe
    from .offload.offload import Offloading, offload_experts
    from .offload.replay import ReplayOptions, replay
    from .offload.timing.bench import OffloadBenchOptions, bench_offload
    from .selector.selector import LynxSelector
    from .traces.collect import CollectOptions, collect
    from .traces.format import Trace

_HOMES = {
    "BenchOptions": "decode.bench",
    "CalibrateOptions": "measure.calibrate",
    "CollectOptions": "traces.collect",
    "CorpusError": "errors",
    "CoverageOptions": "measure.coverage",
    "EvaluateOptions": "measure.evaluate",
    "ExportOptions": "graph.export",
    "ImportRoutesOptions": "integrations.vllm.routes",
    "InspectOptions": "inspection",
    "LynxError": "errors",
    "LynxSelector": "selector.selector",
    "ModelError": "errors",
    "OffloadBenchOptions": "offload.timing.bench",
    "Offloading": "offload.offload",
    "OnnxSelector": "graph.onnx_runtime",
    "OptionError": "errors",
    "ReplayOptions": "offload.replay",
    "SelectorError": "errors",
    "SimulateOptions": "hardware.simulate",
    "Skipping": "decode.runtime",
    "Trace": "traces.format",
    "TraceError": "errors",
    "TrainOptions": "fit.train",
    "Unfinished": "errors",
    "bench": "decode.bench",
    "bench_offload": "offload.timing.bench",
    "calibrate": "measure.calibrate",
    "collect": "traces.collect",
    "coverage": "measure.coverage",
    "evaluate": "measure.evaluate",
    "export": "graph.export",
    "find_moe_layers": "moe.families",
    "import_routes": "integrations.vllm.routes",
    "inspect_model": "inspection",
    "load_model": "moe.loading",
    "offload_experts": "offload.offload",
    "reference_moe": "moe.loading",
    "reference_moe_50m": "moe.loading",
    "replay": "offload.replay",
    "simulate": "hardware.simulate",
    "skip_experts": "decode.runtime",
    "train": "fit.train",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import lynx_learn` stays light."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
