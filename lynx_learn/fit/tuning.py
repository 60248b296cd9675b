"""Tune a whole selector through the frozen model: scorers and surrogates learn from the KL that their decisions cause.

Layer by layer, a scorer learns the squared error of an expert's stand-in. What counts is what that error does to the
predictions, together with all other errors of the same step, and at a token where the model is sure it does less than
elsewhere. Here the selector decides as at decode, in every layer of a simulated decode at once, and the gradient of

    KL per token + threshold / tokens of the batch × experts kept

goes to scorers and surrogates. That is what a threshold stands for: dropping one more expert is worth `threshold` nats
over its batch. The decision is hard forwards and a sigmoid of the log-cost backwards (straight-through estimator,
Bengio et al., arXiv 1308.3432).
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

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


def tune(
    model: nn.Module, layers: list[MoeLayer], selector: LynxSelector, rows: Tensor, check: Tensor, options: TuneOptions
) -> dict[str, Any]:
    """Tune in place; returns what was measured on the held-out rows before and after.

    Args:
        rows: token sequences to learn from `(sequences, length)`.
        check: held-out ones, at least two.

    Raises:
        SelectorError: the loss is not finite.
    """
    frozen = [p for p in model.parameters() if p.requires_grad]
    _require_gradients(frozen, False)
    rng = random.Random(options.seed)
    sizes = sorted({min(size, len(rows)) for size in options.batch_sizes})
    simulations = {size: Simulation(model, layers, _positions(rows, size) // PROMPT_SHARE) for size in sizes}
    spans = {size: _thresholds(simulations[size], selector, _batch(rows, size, rng)) for size in sizes}
    before = _measure(simulations, selector, check, spans, options.seed)
    selector.float()  # measuring has put the surrogates into the model's precision
    optimiser = torch.optim.Adam(_parameters(selector, options.rate), betas=(0.9, 0.98))
    shape = get_cosine_schedule_with_warmup(optimiser, min(WARM_UP, options.steps // 5), options.steps)
    try:
        for _ in track(range(options.steps), "tune", options.steps):
            size = rng.choice(sizes)
            low, high = spans[size]
            threshold = math.exp(rng.uniform(math.log(low), math.log(high)))
            loss = _loss(model, layers, selector, _batch(rows, size, rng), threshold)
            if not torch.isfinite(loss):
                raise SelectorError(
                    "tuning gives a loss that is not finite: lower --tune_rate, or train with --tune_steps 0"
                )
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            shape.step()
    finally:
        selector.requires_grad_(False)
        _require_gradients(frozen, True)
    for layer, own in zip(layers, selector.layers, strict=True):
        own.surrogates.round_to(layer.dtype)  # type: ignore[union-attr,operator]
    after = _measure(simulations, selector, check, spans, options.seed)
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
