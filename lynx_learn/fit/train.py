"""`lynx-learn train`: from a trace and the model's expert weights to a selector, layer by layer."""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import __version__
from ..checkpoint.blocks import Layers, LoadedLayers, open_layers
from ..errors import OptionError, TraceError, Unfinished
from ..files import check_empty, digest
from ..moe.families import MoeLayer, find_moe_layers
from ..moe.identity import Identity, differences, identify, part_of
from ..moe.loading import LoadedModel, load_base, versions
from ..parts import Share, deciding, give_back, in_workers
from ..selector.config import RUN, SelectorConfig
from ..selector.layer import LayerSelector
from ..selector.saving import is_made_by, run_record, write_card
from ..selector.selector import LynxSelector
from ..selector.surrogates import rank_for
from ..show.progress import track
from ..traces.format import Trace
from .fitted import FOLDER, FittedLayers
from .layer import HELD_OUT, fit_layer
from .scorer import ScorerOptions
from .sensitivity import measure_sensitivities, scale_to_nats
from .trainer import Team, TeamOptions, joined
from .tuning import TuneOptions, tune


@dataclass(frozen=True)
class TrainOptions(TeamOptions):
    """Fit a selector from a trace: surrogates, scorers, sensitivities, then tuning of all of them."""

    trace: str
    """trace folder that collect wrote"""
    out: str
    """folder for the selector, new or empty; a run that was broken off goes on there"""
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
    """decode batch sizes to tune for; a decode batch has about 2,048 tokens"""
    tune_batches: int = 1
    """decode batches whose gradients a step of tuning averages; processes that tune together share them"""
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
        if self.tune_steps and self.scorer == "formula" and not self.surrogate_share:
            raise OptionError(
                f"--tune_steps {self.tune_steps} is not usable with --scorer formula and --surrogate_share 0, which leave nothing "
                "to tune: expected 0"
            )
        if not self.tune_batch_sizes or min(self.tune_batch_sizes) < 1:
            raise OptionError("--tune_batch_sizes is not usable: expected one number or more, each at least 1")
        self.share  # noqa: B018  # refuses what cannot be used
        self.check_team()
        if self.tune_batches < 1 or self.tune_batches % self.team_size:
            expected = f"a multiple of the {self.team_size} processes" if self.team_size > 1 else "1 or more"
            raise OptionError(f"--tune_batches {self.tune_batches} is not usable: expected {expected}")
        if self.team_size > 1 and not self.tune_steps:
            raise OptionError(
                f"--devices {self.devices} and --num_nodes {self.num_nodes} are for tuning: leave them out with --tune_steps 0"
            )


@in_workers
def train(options: TrainOptions, loaded: LoadedModel | None = None, trace: Trace | None = None) -> LynxSelector:
    """Fit a selector and write its directory; thresholds come from `calibrate`.

    A layer is read from the checkpoint, fitted and written before the next one, so that it takes the memory of one, and a
    run that was broken off goes on with the next one. Sensitivities and tuning need the whole model, and are made by the
    process that finds all layers fitted; or by all processes together, where `devices` and `num_nodes` say so.

    Args:
        loaded, trace: the model and the trace that the options name, where they are loaded and opened already.

    Raises:
        Unfinished: this process's layers are fitted, and those of others are not all there; or it has tuned together with
            others, of which the first writes the selector.
    """
    out, share = Path(options.out), options.share
    record = run_record("train", deciding(options))
    if (share.world_size > 1 or share.merge) and is_made_by(out, record):
        return LynxSelector.from_pretrained(out)
    check_empty(out)
    trace = trace or Trace.open(options.trace, verify=False)
    with joined(options) as team:
        return _train(options, loaded, trace, record, team)


def _train(options: TrainOptions, loaded: LoadedModel | None, trace: Trace, record: str, team: Team) -> LynxSelector:
    """What is left to do when all processes that tune together have come."""
    out, share = Path(options.out), options.share
    place = (options.model, trace.options.model, trace.options.revision, team.device(options.device), options.dtype)
    layers: Layers = LoadedLayers(loaded) if loaded else open_layers(*place)
    if layers.names != trace.options.layers:
        raise TraceError(
            f"{trace.folder} was collected from {trace.options.model}, whose MoE layers are others: give that one with --model"
        )
    if options.tune_steps and not layers.trainable:
        raise OptionError(
            f"{trace.options.model} runs in transformers' FP8 kernels here, through which no gradient goes: train with "
            "--tune_steps 0, or on a checkpoint with its weights dequantized"
        )
    numbers = trace.options.expert_bytes / getattr(torch, trace.options.dtype).itemsize
    rank = rank_for(options.surrogate_share, numbers, trace.options.hidden_size)
    config = _config(options, trace, trace.options.identity, rank)
    begins = not (out / FOLDER).exists()
    fitted = FittedLayers(out, _identity(options, trace, layers.dtype), share.by)
    try:
        _fit_layers(fitted, config, layers, trace, options, share)
    except BaseException as error:
        # Of another trace nothing here could be used, and where no layer is fitted there is nothing.
        useless = isinstance(error, TraceError) or not any(map(fitted.read, range(len(layers.names))))
        if begins and share.world_size == 1 and useless:
            shutil.rmtree(fitted.folder, ignore_errors=True)
            with suppress(OSError):
                out.rmdir()
        raise
    team.wait()
    missing = [index for index in range(len(layers.names)) if fitted.read(index) is None]
    if share.world_size > 1 and is_made_by(out, record):  # by another process meanwhile
        return LynxSelector.from_pretrained(out)
    share.check_all_there(missing, len(layers.names), "layers", fitted.folder)
    with share.alone(fitted.folder) if team.leads else nullcontext():
        # By its name, so that what auto means is said once.
        loaded = loaded or load_base(*place[:-1], str(layers.dtype).removeprefix("torch."), tokenizer=False)
        found = find_moe_layers(loaded.model)
        identity = identify(found, loaded.model)
        _check_identity(trace, trace.options.identity, identity)
        selector = LynxSelector(_config(options, trace, identity, rank))
        figures, losses = _put_together(fitted, selector)
        metrics = _through_the_model(loaded, found, selector, trace, options, team)
        for row, value in zip(figures, metrics.pop("sensitivities"), strict=True):
            row["sensitivity"] = value
        metrics = {"train": {"trace": trace_summary(trace), "layers": figures, **metrics}}
        selector.float()  # measuring has put the surrogates into the model's precision
        write_card(out, selector, metrics, {RUN: record, **losses})
        shutil.rmtree(fitted.folder, ignore_errors=True)
    return selector


def _fit_layers(
    fitted: FittedLayers, config: SelectorConfig, layers: Layers, trace: Trace, options: TrainOptions, share: Share
) -> None:
    """Fit this process's layers that are not fitted yet; no more than one is held."""
    wanted = [index for index in share.own(len(layers.names)) if fitted.read(index) is None]
    trace.verify(wanted)
    tenth = trace.index()["sequence"] % 10
    scorer = ScorerOptions(options.scorer, options.epochs, options.batch, options.rate, options.seed)
    for index in track(wanted, "train", len(wanted), unit="layers"):
        own = LayerSelector(config)
        with layers.layer(index) as layer:
            _check_identity(trace, part_of(trace.options.identity, index), identify([layer]))
            fitted.begin()
            # There, where there is room: a folder for temporary files may be memory.
            with tempfile.TemporaryDirectory(dir=fitted.folder) as scratch:
                logs = Path(scratch)
                figures = fit_layer(layer, own, trace, tenth, scorer, options.reference, logs)
                losses = {f"logs/{file.relative_to(logs)}": file.read_text() for file in sorted(logs.rglob("*.csv"))}
        fitted.write(index, own, figures, losses)
        give_back(collect=True)  # the layer's tokens, too, which its scorer's trainer holds


def _check_identity(trace: Trace, stored: Identity, found: Identity) -> None:
    """Refuse another model than the trace's.

    Raises:
        TraceError: with what differs.
    """
    if other := differences(stored, found):
        raise TraceError(
            f"{trace.folder} was collected from {trace.options.model} (revision {trace.options.revision}); this model differs "
            f"in {' and '.join(other)}: give that one with --model, or collect again"
        )


def _put_together(fitted: FittedLayers, selector: LynxSelector) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Take all layers' weights into the selector; their figures, and their logs by file name."""
    figures: list[dict[str, Any]] = []
    losses: dict[str, str] = {}
    for index, own in enumerate(selector.layers):
        found = fitted.read(index, own)
        assert found is not None
        figures.append(found[0])
        losses |= found[1]
    return figures, losses


def _through_the_model(
    loaded: LoadedModel, layers: list[MoeLayer], selector: LynxSelector, trace: Trace, options: TrainOptions, team: Team
) -> dict[str, Any]:
    """What needs the whole model: sensitivities, tuning, and the scale of predicted costs; in place, with their figures.

    Raises:
        Unfinished: all but tuning is the first process's.
    """
    groups = list(trace_groups(trace, options.sensitivity_groups, loaded.input_device))
    prompt = groups[0][0].shape[1] // 8
    found: dict[str, Any] = {}
    found["sensitivities"] = team.from_leader(
        lambda: measure_sensitivities(loaded.model, layers, selector, groups, prompt=prompt)
    )
    for own, value in zip(selector.layers, found["sensitivities"], strict=True):
        own.sensitivity.fill_(value)  # type: ignore[operator]
    if options.tune_steps:
        rows = trace.index()["tokens"].view(-1, trace.options.length)
        tenth = trace.index()["sequence"].view(-1, trace.options.length)[:, 0] % 10
        learn, check = (rows[part].to(loaded.input_device) for part in (tenth != HELD_OUT, tenth == HELD_OUT))
        sizes = tuple(options.tune_batch_sizes)
        tuning = TuneOptions(options.tune_steps, options.tune_rate, sizes, options.seed, options.tune_batches)
        found["tuning"] = tune(loaded.model, layers, selector, learn, check, tuning, team)
    if not team.leads:
        raise Unfinished(f"rank {team.rank} of {team.size} has tuned: rank 0 measures the selector and writes it")
    found["nats"] = scale_to_nats(loaded.model, layers, selector, groups, prompt=prompt)
    return found


def _identity(options: TrainOptions, trace: Trace, dtype: torch.dtype) -> dict[str, Any]:
    """What two runs must have in common for their layers to belong together."""
    decided = {name: value for name, value in deciding(options).items() if name not in ("out", "device", "model")}
    return {
        **decided,
        "trace_sha256": digest(json.dumps(trace.sha256, sort_keys=True).encode()),
        "computed_in": str(dtype),
        "version": __version__,
        "versions": versions(),
    }


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
