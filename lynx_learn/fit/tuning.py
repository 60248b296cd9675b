"""Tune a whole selector through the frozen model: scorers and surrogates learn from the KL that their decisions cause.

Layer by layer, a scorer learns the squared error of an expert's stand-in. What counts is what that error does to the
predictions, together with all other errors of the same step, and at a token where the model is sure it does less than
elsewhere. Here the selector decides as at decode, in every layer of a simulated decode at once, and the gradient of

    KL per token + threshold / tokens of the batch × experts kept

goes to scorers and surrogates. That is what a threshold stands for: dropping one more expert is worth `threshold` nats
over its batch. The decision is hard forwards and a sigmoid of the log-cost backwards (straight-through estimator,
Bengio et al., arXiv 1308.3432).

A step goes along the mean gradient of some decode batches. Which these are does not depend on the number of processes, of
which each takes some: they give what one process gives, but for the order in which gradients are summed. A single decode
batch is not divided, because its sequences decide together.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from ..decode.simulate import Simulation, simulated_logits
from ..errors import SelectorError
from ..moe.decision import Decision, Routing
from ..moe.families import MoeLayer
from ..selector.layer import LayerSelector
from ..selector.selector import LynxSelector
from ..show.progress import track
from .trainer import ALONE, L, Team, fit_module

# Thresholds are drawn between those at which the untuned selector loses so many nats per token.
LOSSES = (0.002, 0.04)
# Tokens of a step, as sequences × positions: small batches run longer.
STEP_TOKENS = 2048
FEWEST_POSITIONS = 64
# Share of a sequence that stands for the prompt and is not scored.
PROMPT_SHARE = 4
# Width of the sigmoid in units of log-cost.
SOFTNESS = 0.5
# Steps of a rising rate, at most a fifth of all.
WARM_UP = 20
# Scorers move this much faster than surrogates.
SCORER_RATE = 2.0
# Held-out batches that the figures before and after are measured on.
CHECK_GROUPS = 4


@dataclass(frozen=True)
class TuneOptions:
    """How a selector is tuned."""

    steps: int
    rate: float
    batch_sizes: tuple[int, ...]
    seed: int
    batches: int = 1
    """Decode batches of a step, a multiple of the processes."""


class StraightThrough:
    """A selector at one threshold per token of the batch whose decisions carry a gradient; counts the experts kept."""

    name, setting = "tuned", ""

    def __init__(self, selector: LynxSelector, threshold: float) -> None:
        self.selector, self.threshold = selector, threshold
        self.kept: list[Tensor] = []

    def bind(self, layers: list[MoeLayer]) -> None:
        pass

    def own_bytes(self, layer: MoeLayer, skipped: Tensor, batches: int) -> float:
        return 0.0

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        own: LayerSelector = self.selector.layers[layer.index]  # type: ignore[assignment]
        total = own.totals(routing, own.costs(routing))
        _, hard = own.keep(routing, total, total.new_full(total.shape[:1], self.threshold))
        distance = total.clamp_min(1e-30).log() - math.log(self.threshold)
        soft = (distance / SOFTNESS).sigmoid()
        keep = hard + soft - soft.detach()
        self.kept.append((keep * (total > 0)).sum(-1).mean())
        share = keep.gather(-1, routing.indices.flatten(-2).long()).view_as(routing.weights)
        # Dropped experts run too, with weight 0: what they would have said is the gradient of keeping them.
        if not own.surrogates.rank:
            return Decision(routing.indices, routing.weights * share)
        by_expert = torch.zeros_like(routing.logits, dtype=share.dtype)
        by_expert = by_expert.scatter_add(-1, routing.indices.long(), routing.weights * (1 - share))
        return Decision(routing.indices, routing.weights * share, own.surrogates(routing.hidden, by_expert))


class Batch(NamedTuple):
    """What is learned from at once: a decode batch `(sequences, positions)` at one threshold."""

    tokens: Tensor
    threshold: float


class Batches:
    """The decode batches of all steps, as every process draws them, and of these one process's.

    Args:
        rows: token sequences `(sequences, length)`.
        spans: thresholds to draw between, by batch size.
    """

    def __init__(
        self, rows: Tensor, spans: dict[int, tuple[float, float]], options: TuneOptions, rng: random.Random, team: Team
    ) -> None:
        self.rows, self.spans, self.options, self.rng, self.team = rows, spans, options, rng, team

    def __len__(self) -> int:
        return self.options.steps * self.options.batches // self.team.size

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.options.steps):
            yield from [self._draw() for _ in range(self.options.batches)][self.team.rank :: self.team.size]

    def _draw(self) -> Batch:
        size = self.rng.choice(list(self.spans))
        low, high = self.spans[size]
        threshold = math.exp(self.rng.uniform(math.log(low), math.log(high)))
        return Batch(_batch(self.rows, size, self.rng), threshold)


class Tuning(L.LightningModule):
    """What Lightning trains: the selector, which is all that is a part of this module; the frozen model is not."""

    def __init__(
        self, model: nn.Module, layers: list[MoeLayer], selector: LynxSelector, options: TuneOptions, shown: bool
    ) -> None:
        super().__init__()
        self.selector, self.frozen, self.options = selector, (model, layers), options
        self.groups = _parameters(selector, options.rate)
        steps = range(options.steps)
        self.progress = (step for step in (track(steps, "tune", options.steps) if shown else steps))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch  # it is where the model is

    def on_train_start(self) -> None:
        next(self.progress)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = _loss(*self.frozen, self.selector, *batch)
        if not torch.isfinite(loss):
            raise SelectorError(
                "tuning gives a loss that is not finite: lower --tune_rate, or train with --tune_steps 0"
            )
        return loss

    def optimizer_step(self, *given: Any, **more: Any) -> None:
        super().optimizer_step(*given, **more)
        next(self.progress, None)

    def configure_optimizers(self) -> Any:
        optimiser = torch.optim.Adam(self.groups, betas=(0.9, 0.98))
        steps = self.options.steps
        shape = get_cosine_schedule_with_warmup(optimiser, min(WARM_UP, steps // 5), steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": shape, "interval": "step"}}


def tune(
    model: nn.Module,
    layers: list[MoeLayer],
    selector: LynxSelector,
    rows: Tensor,
    check: Tensor,
    options: TuneOptions,
    team: Team = ALONE,
) -> dict[str, Any]:
    """Tune in place; returns what the first process has measured on the held-out rows before and after.

    Args:
        rows: token sequences to learn from `(sequences, length)`.
        check: held-out ones, at least two.
        team: the processes that tune together; all have the same model, selector and rows.

    Raises:
        SelectorError: the loss is not finite.
        OptionError: another process of the team has ended.
    """
    frozen = [p for p in model.parameters() if p.requires_grad]
    _require_gradients(frozen, False)
    rng = random.Random(options.seed)
    sizes = sorted({min(size, len(rows)) for size in options.batch_sizes})
    simulations = {size: Simulation(model, layers, _positions(rows, size) // PROMPT_SHARE) for size in sizes}
    samples = {size: _batch(rows, size, rng) for size in sizes}

    def measured() -> tuple[dict[int, tuple[float, float]], list[dict[str, float]]]:
        spans = {size: _thresholds(simulations[size], selector, samples[size]) for size in sizes}
        return spans, _measure(simulations, selector, check, spans, options.seed)

    spans, before = team.from_leader(measured)
    selector.float()  # measuring has put the surrogates into the model's precision
    for layer, own in zip(layers, selector.layers, strict=True):
        own.to(layer.device)
    training = Tuning(model, layers, selector, options, team.leads)
    batches = Batches(rows, spans, options, rng, team)
    each = options.batches // team.size
    try:
        fit_module(training, batches, team, max_epochs=1, accumulate_grad_batches=each, logger=False)
    finally:
        training.progress.close()
        selector.requires_grad_(False)
        _require_gradients(frozen, True)
    for layer, own in zip(layers, selector.layers, strict=True):
        own.surrogates.round_to(layer.dtype)  # type: ignore[union-attr,operator]
    after = _measure(simulations, selector, check, spans, options.seed) if team.leads else []
    return {"steps": options.steps, "batch_sizes": sizes, "before": before, "after": after}


def _parameters(selector: LynxSelector, rate: float) -> list[dict[str, Any]]:
    surrogates: list[nn.Parameter] = []
    scorers: list[nn.Parameter] = []
    for own in selector.layers:
        surrogates += own.surrogates.parameters() if own.surrogates.rank else []  # type: ignore[union-attr]
        scorers += own.scorer.parameters()  # type: ignore[union-attr]
    _require_gradients([*surrogates, *scorers], True)
    parts = [{"params": surrogates, "lr": rate}, {"params": scorers, "lr": SCORER_RATE * rate}]
    return [part for part in parts if part["params"]]


def _require_gradients(parameters: list[nn.Parameter], required: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(required)


def _batch(rows: Tensor, size: int, rng: random.Random) -> Tensor:
    """Random sequences, cut at a random place so that a step has about STEP_TOKENS tokens."""
    positions = _positions(rows, size)
    start = rng.randrange(rows.shape[1] - positions + 1)
    chosen = torch.tensor(rng.sample(range(len(rows)), size), device=rows.device)
    return rows[chosen, start : start + positions]


def _positions(rows: Tensor, size: int) -> int:
    return min(rows.shape[1], max(FEWEST_POSITIONS, STEP_TOKENS // size))


def _loss(model: nn.Module, layers: list[MoeLayer], selector: LynxSelector, tokens: Tensor, threshold: float) -> Tensor:
    """The objective, relative to the threshold, so that large and small ones count alike."""
    size, positions = tokens.shape
    prompt = positions // PROMPT_SHARE
    policy = StraightThrough(selector, threshold)
    with torch.no_grad():
        wanted, _ = simulated_logits(model, layers, tokens, None, prompt)
        wanted = functional.log_softmax(wanted.float(), -1)
    given, _ = simulated_logits(model, layers, tokens, policy, prompt)
    given = functional.log_softmax(given.float(), -1)
    kl = functional.kl_div(given, wanted, log_target=True, reduction="sum") / (size * (positions - prompt))
    kept = torch.stack([value.to(kl.device) for value in policy.kept]).sum()
    return kl / threshold + kept / size


def _thresholds(simulation: Simulation, selector: LynxSelector, tokens: Tensor) -> tuple[float, float]:
    """Thresholds between which the selector loses about LOSSES on these tokens, by bisection."""

    @cache  # both ends begin alike
    def kl(log_threshold: float) -> float:
        policy = selector.at_threshold(math.exp(log_threshold))
        return simulation.compare([(tokens, [""] * len(tokens))], [policy])[0].mean("kl")

    ends = []
    for loss in LOSSES:
        low, high = math.log(1e-6), math.log(10.0)
        for _ in range(6):
            middle = (low + high) / 2
            low, high = (middle, high) if kl(middle) < loss else (low, middle)
        ends.append(math.exp((low + high) / 2))
    return ends[0], max(ends[1], 1.01 * ends[0])


def _measure(
    simulations: dict[int, Simulation],
    selector: LynxSelector,
    check: Tensor,
    spans: dict[int, tuple[float, float]],
    seed: int,
) -> list[dict[str, float]]:
    """KL and experts on held-out batches at the ends and the middle of each batch size's thresholds."""
    found = []
    for size, (low, high) in spans.items():
        groups = list(_held_out(check, size, random.Random(seed)))
        taus = [low, math.sqrt(low * high), high]
        results = simulations[size].compare(groups, [selector.at_threshold(tau) for tau in taus])
        for tau, result in zip(taus, results, strict=True):
            experts = result.mean_stats()["experts"]
            found.append({"batch_size": size, "threshold": tau, "kl": result.mean("kl"), "experts": experts})
    return found


def _held_out(check: Tensor, size: int, rng: random.Random) -> Iterator[tuple[Tensor, list[str]]]:
    size = min(size, len(check))
    for _ in range(CHECK_GROUPS):
        yield _batch(check, size, rng), [""] * size
