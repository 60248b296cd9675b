"""Other ways to decide with the surrogates and scorers of one selector, read off at equal loss.

    python train/decision_kinds.py --config train/decision_kinds.yaml

- `learned`: the selector;
- `by entropy`: each token's costs count as often as what is known of the token before the step says that they should: the entropy
  of the prediction it was drawn from, its own surprise in it, and its position;
- `by its own entropy`: as well the entropy of the untouched model's prediction in this step, which nobody knows then: what could be had
  at most that way;
- `oracle`: true squared errors in place of predicted ones;
- `errors together`: the same, but errors of experts that one token loses are added as vectors before they are squared, so that what
  dropping an expert costs depends on what else is dropped. Experts are dropped and taken back one by one until none changes.

Factors are fitted on the trace's first eight tenths of sequences, and all is measured on the last one. Prints a Markdown table and
writes it to `OUT`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jsonargparse import auto_cli
from sklearn.linear_model import PoissonRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from lynx_learn.decode.simulate import METRICS, Losses, Run, Simulation, per_token, simulated_logits
from lynx_learn.decode.tally import Stats
from lynx_learn.files import write
from lynx_learn.fit.layer import CHECK, HELD_OUT
from lynx_learn.measure.equal_loss import Readings, Sweep, ratio
from lynx_learn.moe.decision import Decision, Policy, Routing, used_experts
from lynx_learn.moe.families import Layer, MoeLayer, find_moe_layers
from lynx_learn.moe.loading import LoadedModel, environment, load_base
from lynx_learn.rules.oracle import Oracle
from lynx_learn.selector.layer import run_instead
from lynx_learn.selector.selector import LynxSelector, ThresholdPolicy
from lynx_learn.show.progress import track
from lynx_learn.show.tables import Table
from lynx_learn.traces.format import Trace

LEVELS = (0.003, 0.01, 0.03)
# Thresholds, as multiples of the budget's.
FACTORS = tuple(2.0**power for power in (-3, -2, -1, -0.5, 0, 0.5, 1, 2, 3))
# Rounds over a layer's experts in which they are dropped or taken back.
ROUNDS = 4
KNOWN = 3


@dataclass(frozen=True)
class Options:
    """What the recipe file sets.

    Attributes:
        trace: trace folder, of which the token sequences are taken.
        selector: selector folder.
        out: Markdown file.
        budget: one that the selector is calibrated for, in nats of KL per token: what is skipped at it says how often costs
            should count, and thresholds lie around its own.
        batch_size: sequences that decode together.
        length: tokens of a sequence, into which those of the trace are cut; a quarter stands for the prompt.
        learned_from, measured_on: batches of each, at most.
    """

    trace: str
    selector: str
    out: str
    budget: float = 0.01
    batch_size: int = 16
    length: int = 128
    learned_from: int = 30
    measured_on: int = 30


class Predicted(ThresholdPolicy):
    """Adds up what a selector predicts that each token loses."""

    def bind(self, layers: list[MoeLayer]) -> None:  # type: ignore[override]
        super().bind(layers)
        self.total: Tensor | float = 0.0

    def decide(self, layer: Layer, routing: Routing, scale: Tensor | None = None) -> Decision:
        ready = self.ready[layer.index]
        costs = ready.costs(routing)
        decision = ready.rewrite(routing, scale, costs=costs)
        dropped = decision.weights == 0
        self.total = self.total + (costs * dropped).sum(-1)
        return ready.selector.answer(routing, decision)


class Scaled(ThresholdPolicy):
    """A selector with factors on each token's costs `(steps, sequences)`."""

    def __init__(self, selector: LynxSelector, threshold: float, factors: Tensor) -> None:
        super().__init__(selector, {1: threshold}, "", kernel="torch")
        self.factors = factors

    def decide(self, layer: Layer, routing: Routing, scale: Tensor | None = None) -> Decision:
        return super().decide(layer, routing, self.factors)


class Together(Oracle):
    """An oracle whose errors of one token are added before they are squared."""

    def decide(self, layer: Layer, routing: Routing, scale: Tensor | None = None) -> Decision:
        assert isinstance(layer, MoeLayer)
        ready = self.ready[layer.index]
        own, thresholds = ready.selector, ready.threshold(routing.active)
        each, squares = self.errors(layer, routing)
        anchor, keep = own.keep(routing, own.totals(routing, squares * own.sensitivity), thresholds)
        steps, sequences = routing.active.shape
        left_out = torch.zeros(steps * sequences, routing.hidden.shape[-1])
        for expert, (token, errors) in enumerate(each):
            left_out.index_add_(0, token, errors * ~keep[token // sequences, expert, None])
        for _ in range(ROUNDS):
            before = keep.clone()
            for expert, (token, errors) in enumerate(each):
                step = token // sequences
                others = left_out[token] - errors * ~keep[step, expert, None]
                rise = (
                    torch.zeros(steps).index_add_(0, step, (errors * (errors + 2 * others)).sum(-1)) * own.sensitivity
                )
                keep[:, expert] = (anchor[:, 0] == expert) | ~(rise < thresholds)
                left_out[token] = others + errors * ~keep[step, expert, None]
            if torch.equal(before, keep):
                break
        used = used_experts(routing.indices, routing.active, layer.num_experts)
        indices, weights, kept = run_instead(routing, anchor, keep, used)
        return own.answer(routing, Decision(indices, weights, answered=~kept, loads=(used, used & keep)))

    def errors(self, layer: MoeLayer, routing: Routing) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Of each expert its tokens, counted over steps and sequences, and what its surrogate gets wrong there, by weight
        `(tokens, hidden)`; and the squares of that by assignment `(steps, sequences, top_k)`."""
        hidden, indices = routing.hidden.flatten(0, 1), routing.indices.flatten(0, 1)
        weights = routing.weights.flatten(0, 1).float()
        surrogates = self.ready[layer.index].selector.surrogates
        each, squares = [], torch.zeros_like(weights)
        for expert in range(layer.num_experts):
            token, slot = (indices == expert).nonzero(as_tuple=True)
            errors = torch.zeros(0, hidden.shape[-1])
            if len(token):
                x = hidden[token]
                errors = layer.expert_output(expert, x).float() - surrogates.output(expert, x)
                errors = errors * weights[token, slot, None]
                squares[token, slot] = errors.square().sum(-1)
            each.append((token, errors))
        return each, squares.view(routing.weights.shape)


class Known(NamedTuple):
    """What is known of each token of a batch, and what its prediction was."""

    features: Tensor
    """(steps, sequences, KNOWN + 1): entropy before, surprise, logarithm of the position; and its own entropy."""
    log: Tensor
    """(sequences, steps, vocabulary), of the untouched model."""


def known(loaded: LoadedModel, layers: list[MoeLayer], tokens: Tensor, prompt: int) -> Known:
    logits, _ = simulated_logits(loaded.model, layers, tokens, None, prompt - 1)
    log = functional.log_softmax(logits.float(), -1)
    entropy = -(log.exp() * log).sum(-1)
    surprise = -log[:, :-1].gather(-1, tokens[:, prompt:].unsqueeze(-1)).squeeze(-1)
    place = torch.arange(prompt, tokens.shape[1]).log().expand_as(surprise)
    columns = (entropy[:, :-1], surprise, place, entropy[:, 1:])
    return Known(torch.stack([column.T for column in columns], -1), log[:, 1:])


def fitted(
    loaded: LoadedModel, layers: list[MoeLayer], policy: Predicted, batches: list[Tensor], prompt: int
) -> tuple[list, float]:  # type: ignore[type-arg]
    """How often a token's costs should count, by what is known, and with its own entropy; and the threshold they were seen at."""
    features, predicted, lost = [], [], []
    for tokens in track(batches, "factors", len(batches), unit="batches"):
        policy.bind(layers)
        given = known(loaded, layers, tokens, prompt)
        logits, _ = simulated_logits(loaded.model, layers, tokens, policy, prompt)
        kl = functional.kl_div(functional.log_softmax(logits.float(), -1), given.log, log_target=True, reduction="none")
        lost.append(kl.sum(-1).T.flatten())
        features.append(given.features.flatten(0, 1))
        assert isinstance(policy.total, Tensor)
        predicted.append(policy.total.flatten())
    x, costs, rises = (torch.cat(part).double().numpy() for part in (features, predicted, lost))
    seen = costs > 0
    models = []
    for columns in (KNOWN, KNOWN + 1):
        model = make_pipeline(StandardScaler(), PoissonRegressor(alpha=1e-4, max_iter=1000))
        ratios = np.maximum(rises[seen], 0) / costs[seen]
        model.fit(x[seen, :columns], ratios, poissonregressor__sample_weight=costs[seen] / costs[seen].mean())
        models.append(model)
    return models, float(policy.ready[layers[0].index].thresholds[batches[0].shape[0]])


@torch.no_grad()
def main(options: Options) -> None:
    """Fit the factors, measure every way at every threshold, print and write."""
    trace = Trace.open(options.trace)
    selector = LynxSelector.from_pretrained(options.selector)
    loaded = load_base(None, selector.config.base_model, selector.config.base_revision, "cpu", "auto", tokenizer=False)
    layers = find_moe_layers(loaded.model)
    tokens, sequence = (trace.index()[name].view(-1, options.length) for name in ("tokens", "sequence"))
    tenth, prompt = sequence[:, 0] % 10, options.length // 4
    # Whole batches, since thresholds go by their size.
    learn, measured = (
        tokens[chosen].split(options.batch_size)[: min(most, int(chosen.sum()) // options.batch_size)]
        for chosen, most in ((tenth < CHECK, options.learned_from), (tenth == HELD_OUT, options.measured_on))
    )
    policy = Predicted(selector, selector.config.calibrated(options.budget), "", kernel="torch")
    models, center = fitted(loaded, layers, policy, list(learn), prompt)
    simulation = Simulation(loaded.model, layers, prompt)
    found: dict[tuple[str, float], list[tuple[Losses, Stats]]] = {}
    for batch in track(measured, "decisions", len(measured), unit="batches"):
        for name, factor, way in ways(selector, models, known(loaded, layers, batch, prompt), center):
            way.bind(layers)
            found.setdefault((name, factor), []).extend(simulation.losses([Run(batch, way)]))
    page = "\n".join(
        [
            f"{options.trace}, sequences that neither surrogates nor scorers nor factors were fitted on; "
            f"{len(measured)} batches of {options.batch_size}; {options.selector}; {environment()['machine']}; one run.\n",
            table(found).markdown,
            "",
        ]
    )
    write(Path(options.out), page.encode())
    print(page)


def ways(selector: LynxSelector, models: list, given: Known, center: float) -> Iterator[tuple[str, float, Policy]]:  # type: ignore[type-arg]
    """Every way to decide for one batch, at every threshold."""
    flat = given.features.flatten(0, 1).double().numpy()
    scales = [
        torch.from_numpy(model.predict(flat[:, :columns])).float().view(given.features.shape[:2])
        for model, columns in zip(models, (KNOWN, KNOWN + 1), strict=True)
    ]
    for factor in FACTORS:
        threshold = factor * center
        yield "learned", factor, selector.at_threshold(threshold, kernel="torch")
        yield "by entropy", factor, Scaled(selector, threshold, scales[0])
        yield "by its own entropy", factor, Scaled(selector, threshold, scales[1])
        yield "oracle", factor, Oracle(selector, threshold)
        yield "errors together", factor, Together(selector, threshold)


def table(found: dict[tuple[str, float], list[tuple[Losses, Stats]]]) -> Table:
    """Experts at equal loss, and relative to the way that each one changes, with the interval."""
    sweeps = []
    for name in dict.fromkeys(name for name, _ in found):
        rows = []
        for factor in FACTORS:
            losses, stats = (list(column) for column in zip(*found[name, factor], strict=True))
            sums = torch.stack([own.sums[:, METRICS.index("kl")].sum() for own in losses])
            kl = per_token(sums, torch.stack([own.tokens.sum() for own in losses]))
            experts = torch.tensor([sum(s.experts_after) / len(s.experts_after) for s in stats])
            rows.append((kl, experts, torch.tensor([s.bytes_ratio for s in stats])))
        kl, experts, size = (torch.stack(column).double() for column in zip(*rows, strict=True))
        sweeps.append(Sweep(name, {"kl": kl}, experts, size))
    readings = Readings(sweeps, torch.ones(sweeps[0].bytes.shape[1]), 0)
    lines = []
    for sweep in sweeps:
        name = sweep.method
        line = [name]
        against = "oracle" if name == "errors together" else "learned"
        for level in LEVELS:
            (reading,) = readings(name, "kl", level)
            if reading is None:
                line.append("not reached")
                continue
            mine, other = (readings(which, "kl", level, resamples=True) for which in (name, against))
            share = ratio(mine, other, 0)
            spread = "" if share is None or share["low"] is None else f" ({share['low']:.3f}–{share['high']:.3f})"
            line.append(
                f"{reading[0]:.1f}" + ("" if share is None or name == against else f", {share['ratio']:.3f}{spread}")
            )
        lines.append(line)
    return Table("", ["experts per layer, and to learned or oracle", *(f"KL {level:g}" for level in LEVELS)], lines)


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
