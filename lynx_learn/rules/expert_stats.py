"""What some published rules ask of the experts themselves: how large their outputs are, and how much alike."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError, TraceError
from ..moe.decision import Routing
from ..moe.families import MoeLayer
from ..moe.identity import differences, identify
from ..traces.format import Trace

# Tokens on which two experts that both are routed to are compared, as multiples of those on which all experts run.
PAIR_TOKENS = 32
# ExFold's constants (arXiv 2608.24938): what keeps a denominator from 0, the largest scalar, and the loss of a pair that no
# token was routed to.
DAMPING, LARGEST_SCALAR, UNSEEN = 1e-3, 4.0, 1e30
# Outputs of all experts, and their pairwise distances, that are held at a time.
CHUNK_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class ExpertStats:
    """Statistics of all experts of a model over calibration tokens.

    Attributes:
        norms: mean norm of each expert's output over the tokens routed to it `(layers, experts)`; over all tokens for
            an expert to which none was.
        squares: mean squared norm over the same tokens `(layers, experts)`.
        lengths: mean norm over all tokens `(layers, experts)`.
        distances: mean distance of two experts' outputs over all tokens `(layers, experts, experts)`.
        similarities: 1 - ‖E_i(X) - E_j(X)‖_F / the layer's largest such difference, X being all tokens
            `(layers, experts, experts)`; 1 for an expert with itself, 0 for the most unlike two (SERE, arXiv 2602.07616).
        scalars, losses: of each ordered pair of experts i, j `(layers, experts, experts)`, over tokens routed to both: the
            scalar with which E_j(x) stands in for E_i(x) best, and the share of E_i's energy that it leaves; tokens count
            by ‖E_i(x)‖ (ExFold, arXiv 2608.24938). Pairs that no token was routed to have 0 and UNSEEN. None: not measured.
        ratios: second largest weight by the largest of each token, ascending `(layers, tokens)`; `(layers, 0)` for a
            model that gives each token one expert.
        indices, weights: experts and weights of each token, as routed `(layers, tokens, top_k)`.
        hidden, logits: what entered each block `(layers, tokens, hidden)` and its router's logits `(layers, tokens, experts)`.
    """

    norms: Tensor
    squares: Tensor
    lengths: Tensor
    distances: Tensor
    similarities: Tensor
    ratios: Tensor
    indices: Tensor
    weights: Tensor
    hidden: Tensor
    logits: Tensor
    scalars: Tensor | None = None
    losses: Tensor | None = None

    def batches(self, layer: MoeLayer, size: int) -> Routing:
        """The tokens of one layer as decode batches of at most `size`, drawn from all of them, on its device."""
        parts = [getattr(self, name)[layer.index] for name in ("hidden", "logits", "indices", "weights")]
        count = len(parts[0])
        size = min(size, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: count // size * size]
        hidden, logits, indices, weights = (part[order].unflatten(0, (-1, size)).to(layer.device) for part in parts)
        active = torch.ones(weights.shape[:2], dtype=torch.bool, device=layer.device)
        return Routing(hidden.to(layer.dtype), logits, indices, weights, active)

    def check(self, layers: list[MoeLayer]) -> None:
        """Refuse a model of another shape.

        Raises:
            OptionError: its number of MoE layers or experts differs.
        """
        own, found = tuple(self.norms.shape), (len(layers), layers[0].num_experts)
        if own != found:
            raise OptionError(
                f"the expert statistics are of {own[0]} layers of {own[1]} experts, the model has {found[0]} of {found[1]}: "
                "give a trace of this model"
            )


@torch.no_grad()
def measure_experts(layers: list[MoeLayer], trace: Trace, tokens: int = 2048, pairs: bool = True) -> ExpertStats:
    """Run every expert on `tokens` tokens, spread evenly over the trace; for `pairs` the routed ones on PAIR_TOKENS times as many.

    Memory is bounded by one layer's sample of the trace and CHUNK_BYTES of outputs.

    Raises:
        OptionError: `tokens` is less than 1.
        TraceError: the trace is of another model, or an expert's output is not finite.
    """
    if tokens < 1:
        raise OptionError(f"{tokens} calibration tokens are not usable: expected 1 or more")
    if other := differences(trace.options.identity, identify(layers)):
        raise TraceError(
            f"{trace.folder} was collected from {trace.options.model}; this model differs in {' and '.join(other)}: give a "
            "trace of it, or collect one"
        )
    few, many = (_spread(count, trace.collected_tokens) for count in (tokens, PAIR_TOKENS * tokens))
    rows = []
    for layer in layers:
        hidden, logits, indices, weights = _sample(trace, layer.index, few)
        row = (*_measure_layer(layer, hidden, indices, weights), hidden, logits)
        if pairs:
            hidden, _, indices, _ = _sample(trace, layer.index, many)
            row = (*row, *_measure_pairs(layer, hidden, indices))
        rows.append(row)
    return ExpertStats(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def _spread(wanted: int, count: int) -> Tensor:
    """At most so many places among `count`, evenly."""
    wanted = min(wanted, count)
    return torch.arange(wanted) * count // wanted


def _sample(trace: Trace, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, logits, indices and weights of the chosen tokens of the trace."""
    names, parts = ("hidden", "logits", "indices", "weights"), []
    start = 0
    for shard in trace.layer_shards(layer):
        length = len(shard["hidden"])
        own = chosen[(chosen >= start) & (chosen < start + length)] - start
        parts.append([shard[name][own] for name in names])
        start += length
    hidden, logits, indices, weights = (torch.cat(part) for part in zip(*parts, strict=True))
    return hidden, logits, indices, weights


def _measure_pairs(layer: MoeLayer, hidden: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """One layer's `scalars` and `losses`, on the CPU."""
    experts, (count, top_k) = layer.num_experts, indices.shape
    # With u, v the outputs of i, j: sums of ‖u‖ times ⟨u, v⟩, ‖v‖² and ‖u‖².
    sums = torch.zeros(3, experts * experts, dtype=torch.float64)
    step = max(1, CHUNK_BYTES // (4 * top_k * layer.hidden_size))
    for start in range(0, count, step):
        own, x = indices[start : start + step], hidden[start : start + step].to(layer.device, layer.dtype)
        outputs = torch.zeros(*own.shape, layer.hidden_size, device=layer.device)
        for expert in range(experts):
            token, slot = (own == expert).nonzero(as_tuple=True)
            if len(token):
                outputs[token, slot] = layer.expert_output(expert, x[token]).float()
        products = (outputs @ outputs.transpose(-1, -2)).double().cpu()
        squared = products.diagonal(dim1=-2, dim2=-1)
        weight = squared.clamp_min(0.0).sqrt().unsqueeze(-1)
        pair = (own.unsqueeze(-1) * experts + own.unsqueeze(-2)).flatten()
        for total, part in zip(sums, (products, squared.unsqueeze(-2), squared.unsqueeze(-1)), strict=True):
            total.index_add_(0, pair, (weight * part.expand_as(products)).flatten())
    cross, vv, uu = sums.view(3, experts, experts)
    scalars = (cross / (vv + DAMPING)).clamp(-LARGEST_SCALAR, LARGEST_SCALAR)
    losses = (uu - 2 * scalars * cross + scalars.square() * vv) / uu.clamp_min(1e-30)
    seen = uu > 0
    scalars, losses = scalars.masked_fill(~seen, 0.0), losses.masked_fill(~seen, UNSEEN)
    return scalars.fill_diagonal_(1.0).float(), losses.fill_diagonal_(0.0).float()


def _measure_layer(layer: MoeLayer, hidden: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """One layer's rows of `ExpertStats`, on the CPU."""
    count, experts = len(hidden), layer.num_experts
    routed = torch.zeros(count, experts, dtype=torch.float64).scatter(1, indices, 1.0)
    routed[:, routed.sum(0) == 0] = 1.0
    norms, squares, anywhere = torch.zeros(3, experts, dtype=torch.float64)
    apart, squares_apart = torch.zeros(2, experts, experts, dtype=torch.float64)
    step = max(1, CHUNK_BYTES // (4 * experts * max(experts, layer.hidden_size)))
    for start in range(0, count, step):
        x = hidden[start : start + step].to(layer.device, layer.dtype)
        outputs = torch.stack([layer.expert_output(e, x).float() for e in range(experts)], dim=1)
        if not torch.isfinite(outputs).all():
            raise TraceError(
                f"{layer.name}: an expert's output is not finite on the trace's hidden states; the model overflows in "
                f"{layer.dtype}: load it in float32"
            )
        own, lengths = routed[start : start + step], outputs.norm(dim=-1).double().cpu()
        anywhere += lengths.sum(0)
        norms += (lengths * own).sum(0)
        squares += (lengths.square() * own).sum(0)
        distances = torch.cdist(outputs, outputs).double()
        apart += distances.sum(0).cpu()
        squares_apart += distances.square().sum(0).cpu()
    for matrix in (apart, squares_apart):
        matrix.fill_diagonal_(0.0)  # cdist leaves rounding there
    differences = squares_apart.sqrt()
    similarities = 1.0 - differences / differences.max().clamp_min(1e-20)
    largest = weights.float().topk(min(2, weights.shape[1]), dim=1).values
    ratios = (largest[:, 1:] / largest[:, :1]).flatten().sort().values
    seen = routed.sum(0)
    of_experts = (norms / seen, squares / seen, anywhere / count, apart / count, similarities)
    return *(part.float() for part in of_experts), ratios, indices, weights.float()
