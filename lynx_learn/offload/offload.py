"""Run a model whose experts lie on disk: `with offload_experts("my/model", fast_memory=2 * 2**30) as offloaded: …`.

An assignment of weight 0 is none, so what skipping leaves out is not read. `memory` says what is read when.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.experts import expert_parts
from ..checkpoint.stored import Checkpoint
from ..decode.runtime import unwrapped
from ..errors import ModelError, OptionError
from ..moe.experts import run_expert, runs_alone
from ..moe.families import Layer, MoeLayer, find_moe_layers
from ..moe.hooks import foreign, left_out_of_copies
from ..moe.loading import LoadedModel
from ..selector.prices import RESIDENT, Price, Uniform
from .loading import load_without_experts
from .memory import FastMemory, Foreseen, OffloadStats
from .predict import PREDICTORS, Predictors, read_predictors
from .slots import Eviction, Slots

NAME = "lynx_offload"
SlowMemory = Literal["disk", "host"]


class Resident(Uniform):
    """Prices of fast memory as it is: an expert that it holds is free."""

    source = "residency"

    def __init__(self, offloading: "Offloading") -> None:
        self.offloading = offloading

    def bind(self, layers: Sequence[Layer]) -> None:
        if self.offloading.predictors:
            raise OptionError(
                "prices 'residency' do not go with prefetch: what is read ahead depends on the disk's pace, so no "
                "calibration holds; leave out prefetch, or use prices 'uniform'"
            )

    def of(self, layer: Any) -> Price:
        held = self.offloading.slots.held(layer.index)
        return Price(torch.from_numpy((~held).astype(np.float32)).to(layer.device))

    def describe(self) -> dict[str, Any]:
        slots = self.offloading.slots
        return {"source": self.source, "share": slots.count / (slots.shape[0] * slots.shape[1])}


class Offloading:
    """A model whose experts are read from its checkpoint; a context manager, or `attach()` and `detach()`.

    Several threads may call the model; its experts run one call at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        fast_memory: float,
        eviction: Eviction | None = None,
        readers: int = 4,
        loaded: LoadedModel | None = None,
        predictors: Predictors | None = None,
        slow_memory: SlowMemory | None = None,
    ) -> None:
        self.model, self.loaded, self.predictors = unwrapped(model), loaded, predictors or {}
        self.layers = find_moe_layers(self.model)
        host = _check(self.layers, slow_memory) == "host"
        parts = expert_parts(self.model, self.layers, checkpoint)
        self.memory = FastMemory(self.layers, parts, fast_memory, eviction, readers, host)
        self.checkpoint, self.lock = checkpoint, threading.Lock()
        self.stack: ExitStack | None = None

    @property
    def slots(self) -> Slots:
        return self.memory.slots

    @property
    def slot_bytes(self) -> int:
        """Bytes of fast memory that one expert takes."""
        return self.memory.slot_bytes

    @property
    def stats(self) -> OffloadStats:
        return self.memory.stats

    def reset(self) -> None:
        """Count anew."""
        self.memory.reset()

    def attach(self) -> "Offloading":
        """Let experts run from fast memory. What the model has of them itself is set aside until `detach`.

        Raises:
            ModelError: the model is offloaded already, or its files cannot be opened.
        """
        own = [layer.experts for layer in self.layers]
        if any(experts in RESIDENT for experts in own):
            raise ModelError("this model's experts are offloaded already: detach that first")
        with ExitStack() as stack:
            stack.enter_context(self.memory.opened(self.checkpoint))
            prices = Resident(self)
            for experts in own:
                RESIDENT[experts] = prices
                stack.callback(RESIDENT.pop, experts)
            stack.enter_context(left_out_of_copies(self.model, self.layers))
            stack.enter_context(_instead(self))
            self.stack = stack.pop_all()
        return self

    def detach(self) -> None:
        """The model is as it was; does nothing when it is.

        Raises:
            ModelError: something else was attached since, and still is.
        """
        if self.stack is not None:
            if any(not isinstance(vars(layer.experts)["config"], _Config) for layer in self.layers):
                raise ModelError("skipping was attached to this model after offloading: detach that first")
            self.stack.close()
            self.stack = None

    def __enter__(self) -> "Offloading":
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def run(self, index: int, experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """A layer's experts; arguments as those of an experts module. Sums are those of `grouped_mm`, bit for bit."""
        count, top_k = self.layers[index].num_experts, indices.shape[-1]
        expert, order = indices.masked_fill(weights == 0, count).flatten().sort()
        ends = torch.bincount(expert, minlength=count + 1)[:count].cumsum(0).tolist()
        rows = {
            e: order[start:end] for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start
        }
        if not rows:
            return torch.zeros_like(hidden)
        flat = weights.flatten()
        by_slot = hidden.new_zeros(
            indices.numel(), hidden.shape[-1], dtype=torch.promote_types(hidden.dtype, flat.dtype)
        )
        predictor = self.predictors.get(index + 1)

        def foresee() -> Foreseen:
            assert predictor is not None
            scores = predictor.scores(hidden.float(), indices).sum(0)
            likely = scores.topk(min(len(rows), len(scores)))
            return index + 1, likely.indices[likely.values > 0].tolist()

        with self.lock:
            ordered = self.memory.in_order(index, list(rows), None if predictor is None else foresee)
            for e, slot in ordered:
                own = rows[e]
                weights_of = self.memory.weights(index, e, slot)
                output = run_expert(experts, weights_of, hidden.index_select(0, own // top_k))
                by_slot.index_copy_(0, own, output * flat.index_select(0, own).unsqueeze(-1))
        return by_slot.unflatten(0, (-1, top_k)).sum(1).to(hidden.dtype)


class _Config:
    """A model's configuration as its experts see it; its own stays as it is."""

    def __init__(self, config: Any) -> None:
        self._config, self._experts_implementation = config, NAME

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


@contextmanager
def _instead(offloading: Offloading) -> Iterator[None]:
    """While open, experts have no weights of their own, and run from slots."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, _run_offloaded)
    before = []
    try:
        for layer in offloading.layers:
            experts = layer.experts
            own = dict(experts._parameters)
            before.append((experts, experts.config, own))
            for name, value in own.items():
                if value is not None:
                    experts._parameters[name] = nn.Parameter(
                        torch.empty(value.shape, dtype=value.dtype, device="meta"), requires_grad=False
                    )
            vars(experts)["config"] = foreign(_Config(experts.config), experts.config)
            vars(experts)["_lynx_offload"] = foreign(_Place(offloading, layer.index))
        yield
    finally:
        for experts, config, own in before:
            experts._parameters.update(own)
            vars(experts)["config"] = config
            vars(experts).pop("_lynx_offload", None)


class _Place:
    """Where an experts module finds its store."""

    def __init__(self, offloading: Offloading, index: int) -> None:
        self.offloading, self.index = offloading, index


def _run_offloaded(experts: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        raise ModelError("a model whose experts are offloaded cannot be compiled: detach first, or do not compile")
    place: _Place = vars(experts)["_lynx_offload"]
    with torch.no_grad():
        return place.offloading.run(place.index, experts, hidden, indices, weights)


def _check(layers: list[MoeLayer], slow_memory: SlowMemory | None) -> SlowMemory:
    """Where experts lie that fast memory does not hold."""
    devices = sorted({str(layer.device) for layer in layers})
    on_gpu = layers[0].device.type == "cuda"
    if len(devices) > 1 or not (on_gpu or layers[0].device.type == "cpu"):
        raise ModelError(f"experts can be offloaded on a CPU or one GPU: the model is on {', '.join(devices)}")
    if on_gpu and slow_memory == "disk":
        raise ModelError(
            f"a GPU's fast memory is filled from the host's, not from disk: the model is on {devices[0]}; leave out slow_memory"
        )
    for layer in layers:
        if not runs_alone(layer.experts):
            raise ModelError(f"layer {layer.name} has experts that run in code of their own: they cannot be offloaded")
    return slow_memory or ("host" if on_gpu else "disk")


def offload_experts(
    model: str | nn.Module,
    fast_memory: float,
    store: str | None = None,
    eviction: Eviction | None = None,
    readers: int = 4,
    dtype: str = "auto",
    prefetch: str | None = None,
    predictors: str | None = None,
    device: str = "cpu",
    slow_memory: SlowMemory | None = None,
) -> Offloading:
    """Run a model whose experts do not fit in memory, by reading them from its checkpoint when they are needed.

    On a GPU they are read from a copy in the host's memory, which is made when it is attached, and `fast_memory` is the GPU's.

    Without skipping, what it computes is what the model computes by `grouped_mm`, transformers' default, bit for bit. The
    checkpoint is only read.

    Args:
        model: folder, Hub id or `reference-moe`, of which no expert is loaded; or a model that is loaded already, which
            keeps its own experts for when it is detached.
        fast_memory: bytes for experts in memory; a float up to 1 is a share of all experts.
        store: the checkpoint of a model that is loaded; by default where it says it came from.
        eviction: which expert makes room, by default `slots.LeastRecent`.
        readers: threads that read.
        dtype: of a model that is not loaded yet, as in `load_model`.
        prefetch: how the next layer's experts are foreseen and read ahead: `popularity`, `correlation` or `learned`.
        predictors: folder with what prefetch knows, as `lynx-learn replay --predictors` writes it.
        device: of a model that is not loaded yet, as in `load_model`.
        slow_memory: where experts lie that fast memory does not hold: `disk`, the checkpoint, by default on a CPU; or `host`, a
            copy of all of them in the host's memory, by default and only so on a GPU.

    Raises:
        ModelError: the model or its checkpoint cannot be used so, with the reason.
        OptionError: fast memory does not hold one token's experts of a layer, or there is nothing to foresee this model by.
    """
    if prefetch is not None and prefetch not in PREDICTORS:
        raise OptionError(f"prefetch {prefetch!r} is unknown: expected one of {', '.join(PREDICTORS)}")
    if (prefetch is None) != (predictors is None):
        raise OptionError(
            "prefetch and predictors go together: a way to foresee, and the folder that `lynx-learn replay --predictors` writes"
        )
    if slow_memory not in (None, *get_args(SlowMemory)):
        raise OptionError(f"slow_memory {slow_memory!r} is unknown: expected {' or '.join(get_args(SlowMemory))}")
    if readers < 1:
        raise OptionError(f"readers {readers} is not usable: expected 1 or more")
    if isinstance(model, str):
        loaded, checkpoint = load_without_experts(model, device, dtype, tokenizer=False)
        own = (fast_memory, eviction, readers, loaded)
        offloading = Offloading(loaded.model, checkpoint, *own, slow_memory=slow_memory)
    else:
        place = store or getattr(unwrapped(model), "name_or_path", "")
        if not place:
            raise ModelError("the model does not say where its checkpoint is: give store=, its folder or Hub id")
        checkpoint = Checkpoint.open(str(place))
        offloading = Offloading(model, checkpoint, fast_memory, eviction, readers, slow_memory=slow_memory)
    if prefetch is not None and predictors is not None:
        offloading.predictors = read_predictors(predictors, prefetch, offloading.layers)
    return offloading
