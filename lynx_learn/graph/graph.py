"""A selector's decision as one ONNX graph for all layers."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import LynxError
from ..moe.decision import Routing, used_experts
from ..selector.features import feature_parts
from ..selector.layer import LayerSelector, run_instead
from ..selector.prices import Price
from ..selector.scorers import Folded, Scorer
from ..selector.selector import LynxSelector
from ..selector.surrogates import weighted_sum
from .onnx_runtime import CONFIG_KEY, FORMAT_VERSION, OUTPUTS, VERSION_KEY

OPSET = 20
# Tensors of a layer's surrogates.
SURROGATES = ("down", "up", "constant", "owner")

# A file of protocol buffers ends there; some room is left for the graph itself.
LARGEST = 2**31 - 2**24


class Answer(NamedTuple):
    """What the graph answers, as `OnnxDecision`."""

    keep: Tensor
    costs: Tensor
    run_indices: Tensor
    run_weights: Tensor
    addition: Tensor | None = None


def decide(
    rule: LayerSelector,
    folded: Folded,
    routing: Routing,
    threshold: Tensor,
    surrogates: tuple[Tensor, ...] = (),
    price: Price | None = None,
) -> Answer:
    """Decode's decision; `rule` gives no more than whether first experts stay.

    `routing` and `threshold` are without their leading dimension: this is one batch. `surrogates` are the layer's
    tensors in the order of SURROGATES, or none.
    """
    costs = folded.costs(
        feature_parts(routing.logits, routing.indices, routing.weights), routing.indices, routing.hidden
    )
    anchor, keep = rule.keep(routing, rule.totals(routing, costs), threshold, price)
    used = used_experts(routing.indices, routing.active, keep.shape[-1])
    indices, weights, kept = run_instead(routing, anchor, keep, used)
    addition = None
    if surrogates:
        by_expert = torch.zeros_like(routing.logits).scatter_add(-1, routing.indices, routing.weights * ~kept)
        addition = weighted_sum(routing.hidden, by_expert, *surrogates)
    return Answer(keep, costs, indices, weights, addition)


def surrogates_of(own: LayerSelector) -> tuple[Tensor, ...]:
    """A layer's surrogates in the order of SURROGATES, float32 but for the last; none at rank 0."""
    parts = own.surrogates
    if not parts.rank:
        return ()
    return (*(getattr(parts, name).data.float() for name in SURROGATES[:-1]), parts.owner)


class Graph(nn.Module):
    """All layers' folded scorers and surrogates, stacked, and the threshold rule: what is exported.

    Inputs: `layer` () int64; `logits` (tokens, experts) before the activation, `indices` and `weights` (tokens, top_k)
    as the router chose them, `active` (tokens,), `threshold` () in nats, `prices` and `devices` (experts,) as in `Price`, and
    where scorer or surrogates look at it `hidden` (tokens, hidden). Outputs: `keep` (experts,), `costs` (tokens, top_k) in nats, `run_indices` and `run_weights` (tokens,
    top_k), in which an assignment that is left out points at the dearest expert with weight 0, and where there are
    surrogates `addition` (tokens, hidden), what they answer for what is left out: to be added to the experts' output.
    """

    def __init__(self, selector: LynxSelector) -> None:
        super().__init__()
        folded = [own.scorer.fold(own.sensitivity) for own in selector.layers]  # type: ignore[union-attr,operator]
        for name, tensors in zip(Folded._fields, zip(*folded, strict=True), strict=True):
            self.register_buffer(name, torch.stack(tensors))
        self.rank = selector.config.rank
        if self.rank:
            parts = zip(*(surrogates_of(own) for own in selector.layers), strict=True)  # type: ignore[arg-type]
            for name, tensors in zip(SURROGATES, parts, strict=True):
                self.register_buffer(name, torch.stack(tensors))
        # In a list, so that its parameters are not taken for the graph's.
        self.rule: list[LayerSelector] = [selector.layers[0]]  # type: ignore[list-item]

    @property
    def uses_hidden(self) -> bool:
        return self.rank > 0 or self.get_buffer("projection").shape[-1] > 0

    @property
    def outputs(self) -> tuple[str, ...]:
        return OUTPUTS if self.rank else OUTPUTS[:-1]

    def forward(
        self,
        layer: Tensor,
        logits: Tensor,
        indices: Tensor,
        weights: Tensor,
        active: Tensor,
        threshold: Tensor,
        prices: Tensor,
        devices: Tensor,
        hidden: Tensor | None = None,
    ) -> Answer:
        folded = Folded(*(self._of(name, layer) for name in Folded._fields))
        # Where there is no hidden state, it is not looked at.
        routing = Routing(logits if hidden is None else hidden, logits, indices, weights, active)
        surrogates = tuple(self._of(name, layer) for name in SURROGATES) if self.rank else ()
        return decide(self.rule[0], folded, routing, threshold, surrogates, Price(prices, devices))

    def _of(self, name: str, layer: Tensor) -> Tensor:
        """One layer's part of a buffer."""
        # In brackets the index would have to be a number, which not every torch can trace.
        return self.get_buffer(name).index_select(0, layer.reshape(1)).squeeze(0)


def to_bytes(selector: LynxSelector) -> bytes:
    """The content of an .onnx file, which holds everything: weights, and the configuration as metadata.

    Raises:
        LynxError: it would be larger than one file can be.
    """
    import onnx

    graph = Graph(selector).eval()
    size = sum(buffer.numel() * buffer.element_size() for buffer in graph.buffers())
    if size > LARGEST:
        raise LynxError(
            f"scorers and surrogates take {size / 2**30:.1f} GiB: an .onnx file holds 2 GiB; train with a smaller --surrogate-share"
        )
    batch = random_batch(selector, 0, 5, torch.Generator().manual_seed(0))
    experts = selector.config.num_experts
    example = {"layer": torch.tensor(0), **batch._asdict(), "threshold": torch.tensor(1.0)}
    example |= {"prices": torch.ones(experts), "devices": torch.zeros(experts, dtype=torch.int64)}
    names = ["layer", "logits", "indices", "weights", "active", "threshold", "prices", "devices"]
    names += ["hidden"] * graph.uses_hidden
    tokens = {0: torch.export.Dim("tokens", min=1)}
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            tuple(example[name] for name in names),
            dynamo=True,
            dynamic_shapes=tuple(tokens if name in Routing._fields else None for name in names),
            opset_version=OPSET,
            input_names=names,
            output_names=graph.outputs,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    values = {VERSION_KEY: FORMAT_VERSION, CONFIG_KEY: selector.config.to_json()}
    onnx.helper.set_model_props(proto, values)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that are not there and on its own internals."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def random_batch(selector: LynxSelector, layer: int, tokens: int, generator: torch.Generator) -> Routing:
    """A random decode batch, without leading dimension, of a router that takes the softmax.

    Hidden states are spread as the scorer has seen them; about one token in five is not active.
    """
    config, scorer = selector.config, cast(Scorer, selector.layers[layer].scorer)
    hidden = torch.randn(tokens, config.hidden_size, generator=generator) * scorer.hidden_spread + scorer.hidden_mean
    logits = 2 * torch.randn(tokens, config.num_experts, generator=generator)
    weights, indices = logits.softmax(-1).topk(config.top_k)
    active = torch.rand(tokens, generator=generator) < 0.8
    active[0] = True
    return Routing(hidden, logits, indices, weights, active)
