"""`lynx-learn train`: from a trace and the model's expert weights to a selector, layer by layer."""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import OptionError, TraceError
from ..files import check_empty
from ..moe.decision import Routing
from ..moe.families import MoeLayer, find_moe_layers
from ..moe.identity import Identity, differences, identify
from ..moe.loading import LoadedModel, load_base
from ..rules.oracle import true_costs
from ..selector.config import RUN, SelectorConfig
from ..selector.features import LOG_WEIGHT, assignment_features
from ..selector.layer import LayerSelector
from ..selector.saving import run_record, write_card
from ..selector.selector import LynxSelector
from ..selector.surrogates import MOST_RANKS, Fit, Moments, Surrogates, fit_surrogate, rank_for
from ..show.progress import track
from ..traces.format import Trace
from .scorer import Assignments, ScorerOptions, boosted_reference, new_scorer, predicted_costs, quality, train_scorer
from .sensitivity import measure_sensitivities, scale_to_nats
from .tuning import TuneOptions, tune

# Of every ten sequences of a trace one checks the ridge penalty and one is held out for the reported figures.
CHECK, HELD_OUT = 8, 9
# Sums for this many bytes of experts are held at a time; a layer with more is read several times.
MOMENT_BYTES = 2**29
# Tokens a scorer learns from; more are thinned out, so that memory does not grow with the trace.
MOST_TOKENS = 100_000


@dataclass(frozen=True)
class TrainOptions:
    """Fit a selector from a trace: surrogates, scorers, sensitivities, then tuning of all of them."""

    trace: str
    """trace folder that collect wrote"""
    out: str
    """folder for the selector; must be new or empty"""
    model: str | None = None
    """folder or Hub id of the model that the trace is of; by default the one that the trace names"""
    scorer: Literal["mlp", "linear", "formula"] = "mlp"
    """kind of scorer: mlp, linear, or formula (gate² × the expert's mean residual, nothing learned)"""
    surrogate_share: float = 0.08
    """size of the surrogates, as a share of the experts' bytes; 0 for none"""
    keep_top1: bool = False
    """always keep every token's first expert"""
    epochs: int = 10
    """passes over the trace when scorers are trained"""
    batch: int = 512
    """tokens of a training batch of the scorers"""
    rate: float = 1e-2
    """learning rate of the scorers"""
    reference: bool = True
    """also fit scikit-learn's gradient boosting on the same features, for comparison"""
    tune_steps: int = 100
    """steps of tuning scorers and surrogates through the frozen model; 0 for none"""
    tune_rate: float = 1e-3
    """learning rate of the surrogates while tuning; the scorers' is twice that"""
    tune_batch_sizes: list[int] = field(default_factory=lambda: [8, 16, 32])
    """decode batch sizes to tune for; a step has about 2,048 tokens"""
    sensitivity_groups: int = 4
    """batches of 16 sequences that the sensitivities are measured on"""
    device: str = "auto"
    """where the model runs: cpu, cuda, cuda:1, …; auto takes a GPU where there is one"""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: what the checkpoint holds, but float32 on a CPU without native bfloat16"""
    seed: int = 0
    """seed of the scorers' initial weights and of the order of the assignments"""

    def __post_init__(self) -> None:
        if not 0 <= self.surrogate_share < 1:
            raise OptionError(f"--surrogate_share {self.surrogate_share:g} is not usable: expected 0 or more, below 1")
        for name in ("epochs", "batch", "sensitivity_groups"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)} is not usable: expected 1 or more")
        for name in ("rate", "tune_rate"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise OptionError(f"--{name} {value:g} is not usable: expected a number above 0")
        if self.tune_steps < 0:
            raise OptionError(f"--tune_steps {self.tune_steps} is not usable: expected 0 or more")
        if not self.tune_batch_sizes or min(self.tune_batch_sizes) < 1:
            raise OptionError("--tune_batch_sizes is not usable: expected one number or more, each at least 1")


def train(options: TrainOptions, loaded: LoadedModel | None = None, trace: Trace | None = None) -> LynxSelector:
    """Fit a selector and write its directory; thresholds come from `calibrate`.

    Args:
        loaded, trace: the model and the trace that the options name, where they are loaded and opened already.
    """
    out = Path(options.out)
    check_empty(out)
    trace = trace or Trace.open(options.trace)
    loaded = loaded or load_base(
        options.model, trace.options.model, trace.options.revision, options.device, options.dtype, tokenizer=False
    )
    layers = find_moe_layers(loaded.model)
    identity = identify(layers, loaded.model)
    if other := differences(trace.options.identity, identity):
        raise TraceError(
            f"{trace.folder} was collected from {trace.options.model} (revision {trace.options.revision}); this model differs "
            f"in {' and '.join(other)}: give that one with --model, or collect again"
        )
    first = layers[0]
    rank = rank_for(options.surrogate_share, first.expert_bytes / first.dtype.itemsize, first.hidden_size)
    selector = LynxSelector(_config(options, trace, identity, rank))
    tenth = trace.index()["sequence"] % 10
    figures = []
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch)
        for layer in track(layers, "train", len(layers), unit="layers"):
            own: LayerSelector = selector.layers[layer.index]  # type: ignore[assignment]
            figures.append(fit_layer(layer, own, trace, tenth, options, logs))
        losses = {f"logs/{file.relative_to(logs)}": file.read_text() for file in sorted(logs.rglob("*.csv"))}
    groups = list(trace_groups(trace, options.sensitivity_groups, loaded.input_device))
    sensitivities = measure_sensitivities(loaded.model, layers, selector, groups, prompt=groups[0][0].shape[1] // 8)
    for row, value in zip(figures, sensitivities, strict=True):
        row["sensitivity"] = value
    metrics: dict[str, Any] = {"train": {"trace": trace_summary(trace), "layers": figures}}
    if options.tune_steps:
        rows = trace.index()["tokens"].view(-1, trace.options.length)
        own_tenth = tenth.view(-1, trace.options.length)[:, 0]
        learn, check = (rows[part].to(loaded.input_device) for part in (own_tenth != HELD_OUT, own_tenth == HELD_OUT))
        tuning = TuneOptions(options.tune_steps, options.tune_rate, tuple(options.tune_batch_sizes), options.seed)
        metrics["train"]["tuning"] = tune(loaded.model, layers, selector, learn, check, tuning)
    metrics["train"]["nats"] = scale_to_nats(loaded.model, layers, selector, groups, prompt=groups[0][0].shape[1] // 8)
    selector.float()  # measuring has put the surrogates into the model's precision
    write_card(out, selector, metrics, {RUN: run_record("train", asdict(options)), **losses})
    return selector


def _config(options: TrainOptions, trace: Trace, identity: Identity, rank: int) -> SelectorConfig:
    t = trace.options
    return SelectorConfig(
        base_model=t.model,
        base_revision=t.revision,
        model_type=t.model_type,
        identity=identity,
        layers=t.layers,
        num_experts=t.num_experts,
        top_k=t.top_k,
        hidden_size=t.hidden_size,
        expert_bytes=t.expert_bytes,
        scorer=options.scorer,
        rank=rank,
        keep_top1=options.keep_top1,
    )


def fit_layer(
    layer: MoeLayer, own: LayerSelector, trace: Trace, tenth: Tensor, options: TrainOptions, logs: Path
) -> dict[str, Any]:
    """Fit one layer's surrogates and scorer in place; returns its figures on held-out sequences.

    `tenth` is the sequence number modulo 10 of every token of the trace.
    """
    torch.manual_seed(options.seed * 1009 + layer.index)
    if own.surrogates.rank:
        _fit_surrogates(layer, own.surrogates, trace, tenth)
    fit, held_out, energy = _assignments(layer, own.surrogates, trace, tenth)
    squared = (fit.costs / (2 * fit.features[..., LOG_WEIGHT]).exp()).flatten()
    sums = torch.zeros(layer.num_experts).index_add(0, fit.experts.flatten(), squared)
    counts = torch.bincount(fit.experts.flatten(), minlength=layer.num_experts)
    seen = sums / counts.clamp_min(1)
    residuals = torch.where(counts > 0, seen, seen.sum() / (counts > 0).sum())
    scorer = new_scorer(options.scorer, fit, residuals)
    training = ScorerOptions(options.scorer, options.epochs, options.batch, options.rate, options.seed)
    train_scorer(scorer, fit, held_out, training, logs, f"layer-{layer.index:02d}")
    own.scorer.load_state_dict(scorer.state_dict())
    floor = new_scorer("formula", fit, residuals)
    ranks = own.surrogates.ranks
    figures: dict[str, Any] = {
        "name": layer.name,
        "ranks": [int(ranks.min()), int(ranks.max())],
        "assignments": fit.costs.numel(),
        "unexplained": float(held_out.costs.sum() / energy),
        "formula": quality(predicted_costs(floor, held_out), held_out.costs),
        options.scorer: quality(predicted_costs(own.scorer, held_out), held_out.costs),
    }
    if options.reference:
        figures["gradient_boosting"] = boosted_reference(fit, held_out, options.seed)
    return figures


def _fit_surrogates(layer: MoeLayer, surrogates: Surrogates, trace: Trace, tenth: Tensor) -> None:
    hidden, rank = layer.hidden_size, surrogates.rank
    fits: list[Fit] = []
    at_a_time = max(1, MOMENT_BYTES // (2 * 2 * hidden * hidden * 8))
    for first in range(0, layer.num_experts, at_a_time):
        block = range(first, min(first + at_a_time, layer.num_experts))
        moments = {e: (Moments.empty(hidden), Moments.empty(hidden)) for e in block}
        for part, x, y, weights, expert, _ in _outputs(layer, trace, tenth, block):
            for which, own in enumerate((part < CHECK, part == CHECK)):
                if own.any():
                    moments[expert][which].add(x[own], y[own], weights[own].square())
        for fit, check in moments.values():
            fits.append(fit_surrogate(fit, check, rank, min(MOST_RANKS * rank, hidden)))
    surrogates.put(fits)
    surrogates.round_to(layer.dtype)


def _outputs(
    layer: MoeLayer, trace: Trace, tenth: Tensor, block: range
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor]]:
    """For each shard and expert of `block`: tenth, input, output, weight of its assignments, the expert, their rows.

    Rows number the assignments of the shard, token by token.
    """
    start = 0
    for shard in trace.layer_shards(layer.index):
        tokens, top_k = shard["indices"].shape
        own = tenth[start : start + tokens]
        for expert in block:
            rows = (shard["indices"].flatten() == expert).nonzero().squeeze(1)
            if len(rows):
                token = rows // top_k
                x = shard["hidden"][token].to(layer.device, layer.dtype)
                y = layer.expert_output(expert, x)
                yield own[token], x, y, shard["weights"].flatten()[rows], expert, rows
        start += tokens


def _assignments(
    layer: MoeLayer, surrogates: Surrogates, trace: Trace, tenth: Tensor
) -> tuple[Assignments, Assignments, Tensor]:
    """Features and true costs for fitting and held out, and the held-out energy without any surrogate."""
    parts: dict[bool, list[tuple[Tensor, ...]]] = {True: [], False: []}
    energy = torch.zeros(())
    keep = min(1.0, MOST_TOKENS / trace.collected_tokens)
    thinning = torch.Generator().manual_seed(layer.index)
    start = 0
    for shard in trace.layer_shards(layer.index):
        tokens = shard["indices"].shape[0]
        own = tenth[start : start + tokens]
        costs, squares = (part[0] for part in true_costs(layer, surrogates, shard_routing(shard)))
        features = assignment_features(shard["logits"], shard["indices"], shard["weights"])
        energy += squares[own == HELD_OUT].sum()
        chosen = torch.rand(tokens, generator=thinning) < keep
        for held_out in (True, False):
            mine = chosen & ((own == HELD_OUT) == held_out)
            parts[held_out].append((features[mine], shard["indices"][mine], costs[mine], shard["hidden"][mine]))
        start += tokens
    joined = [
        Assignments(*(torch.cat(column) for column in zip(*parts[held_out], strict=True))) for held_out in (False, True)
    ]
    if not len(joined[1].costs):
        raise TraceError(
            f"{trace.folder} has too few sequences to hold some out: collect at least 10 of them (--tokens {10 * trace.options.length} or more)"
        )
    if not all(torch.isfinite(rows.costs).all() for rows in joined):
        raise TraceError(
            f"{layer.name}: an expert's output is not finite on the trace's hidden states; the model overflows in {layer.dtype}: train in --dtype float32"
        )
    return joined[0], joined[1], energy


def shard_routing(shard: dict[str, Tensor]) -> Routing:
    """A shard of a trace as one batch in which all tokens are active."""
    active = torch.ones(len(shard["hidden"]), dtype=torch.bool)
    parts = (shard["hidden"], shard["logits"], shard["indices"], shard["weights"], active)
    return Routing(*(part.unsqueeze(0) for part in parts))


def trace_groups(
    trace: Trace, groups: int, device: torch.device, size: int = 16, positions: int = 128
) -> Iterator[tuple[Tensor, list[str]]]:
    """Token rows of the trace itself, as groups that decode together; fewer where the trace is short."""
    index = trace.index()
    rows = index["tokens"].view(-1, trace.options.length)[:, :positions]
    names = [trace.sources[s] for s in index["source"].view(-1, trace.options.length)[:, 0].tolist()]
    size = min(size, len(rows))
    for start in range(0, min(groups * size, len(rows) - size + 1), size):
        yield rows[start : start + size].to(device), names[start : start + size]


def trace_summary(trace: Trace) -> dict[str, Any]:
    o = trace.options
    return {
        "model": o.model,
        "corpus": o.corpus,
        "split": o.split,
        "mode": o.mode,
        "tokens": trace.collected_tokens,
        "sources": trace.sources,
    }
