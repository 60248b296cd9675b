"""`lynx-learn simulate`: a trace's routing on hardware that a file describes. Nothing is measured; figures are relative."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import OptionError
from ..files import check_target, write_json
from ..moe.families import find_moe_layers
from ..moe.loading import load_model
from ..offload.replay import halves
from ..rules.expert_stats import measure_experts
from ..selector.selector import LynxSelector
from ..traces.format import Trace
from . import chiplets, devices, helpers
from .described import Chiplets, Devices, Helpers, read_hardware
from .measured import Scene, at_losses
from .traffic import Selection, Source, Traffic


@dataclass(frozen=True)
class SimulateOptions:
    """Replay a trace on described hardware: devices, chiplets or wireless helpers."""

    hardware: str
    """YAML file that describes it, as those in data/hardware"""
    trace: str
    """trace directory, as collect or, without a selector, import-routes writes it"""
    selector: str | None = None
    """calibrated selector of the trace's model; without one nothing is left out"""
    budget: float = 0.01
    """budget that the selector is calibrated for"""
    model: str | None = None
    """the trace's model, whose experts are compared with each other: for helpers only"""
    levels: list[float] = field(default_factory=list)
    """measured losses (KL, nats per token) at which ways of choosing helpers are compared too; it takes minutes"""
    batch_sizes: list[int] = field(default_factory=lambda: [4, 16, 64])
    """sequences that decode together"""
    steps: int = 100
    """decode steps replayed for each batch size, at most"""
    seed: int = 0
    """seed of the fading of wireless channels"""
    report: str | None = None
    """JSON file for what was found"""

    def __post_init__(self) -> None:
        for name, values in (("batch_sizes", self.batch_sizes), ("steps", [self.steps])):
            if not values or min(values) <= 0:
                raise OptionError(f"--{name} {values} is not usable: expected numbers above 0")
        if any(not level > 0 for level in self.levels):
            raise OptionError(f"--levels {self.levels} is not usable: expected nats above 0")


@torch.no_grad()
def simulate(options: SimulateOptions) -> dict[str, Any]:
    """What was found: `kind` of the hardware, `rows` by batch size and rule, and `measured` by batch size, rule and level.

    Popularity is of the first half of the sequences, the figures of the others.

    Raises:
        OptionError: the hardware file or an option cannot be used.
        SelectorError: the selector is of another model, or calibrated with other prices.
        TraceError: the trace is damaged, too short, or of another model.
    """
    if options.report:
        check_target(Path(options.report))
    hardware = read_hardware(Path(options.hardware))
    trace = Trace.open(options.trace, routes=options.selector is None)
    selection = None
    if options.selector:
        selector = LynxSelector.from_pretrained(options.selector)
        selector.compare(trace.options.identity)
        selection = Selection.at(selector, options.budget)
    source = Source.read(trace, *halves(trace), selection.selector if selection else None)
    weights = trace.options.expert_bytes // getattr(torch, trace.options.dtype).itemsize
    hidden = trace.options.hidden_size
    scene = None
    if isinstance(hardware, Helpers):
        if options.model is None or selection is None:
            raise OptionError("--hardware of helpers needs --selector, and --model to compare its experts: give both")
        model = load_model(options.model, "cpu").model
        layers = find_moe_layers(model)
        stats = measure_experts(layers, trace, pairs=False)
        scene = Scene(hardware, source, model, layers, selection.selector, stats)
    elif options.levels:
        raise OptionError("--levels is for hardware of helpers: leave it out")

    def found(traffic: Traffic) -> Any:
        if isinstance(hardware, Devices):
            return devices.rules(hardware, source, traffic, selection, weights)
        if isinstance(hardware, Chiplets):
            return chiplets.rules(hardware, source, traffic, selection, weights, hidden)
        assert scene is not None
        assert selection is not None
        return helpers.rules(hardware, traffic, selection, scene.stats, hidden, options.seed)

    rows = [
        {"batch_size": size, **row}
        for size in options.batch_sizes
        for row in found(source.traffic(size, options.steps))
    ]
    measured = [
        {"batch_size": size, **row}
        for size in options.batch_sizes
        if scene is not None and options.levels
        for row in at_losses(scene, size, options.steps, options.levels, options.seed)
    ]
    result = {
        "simulated": True,
        "kind": type(hardware).__name__.lower(),
        "hardware": str(options.hardware),
        "model": trace.options.model,
        "budget": options.budget if selection else None,
        "rows": rows,
        "measured": measured,
    }
    if options.report:
        write_json(Path(options.report), result)
    return result
