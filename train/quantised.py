"""Quantised experts and skipped ones, side by side and together: loss against the model as it is stored, and bytes.

    python train/quantised.py --config train/quantised.yaml

**Simulated**: experts' weights are rounded to what a format can hold and computed with in the model's own type, so the loss
is that of weight-only quantisation, and no time is measured. The selector is that of the model before rounding; whether one
that is trained on the rounded model does better is measured for one format, with two selectors from the same text. Writes
`OUT/quantised.json` and `OUT/quantised.md`, and prints the tables.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from lynx_learn.decode.served import TextOptions
from lynx_learn.decode.simulate import Comparison, Losses, Run, Simulation
from lynx_learn.decode.tally import Stats
from lynx_learn.files import write, write_json
from lynx_learn.fit.train import TrainOptions, train
from lynx_learn.measure.bound import margin
from lynx_learn.measure.equal_loss import interpolate
from lynx_learn.moe.decision import Policy
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.moe.loading import LoadedModel, environment, load_base
from lynx_learn.rules.grids import curves
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.show.progress import track
from lynx_learn.show.tables import Table
from lynx_learn.traces.collect import CollectOptions, collect

# Weights that share a scale of 16 bits in the integer formats.
GROUP = 64
# Values of a 4-bit float with two exponent bits, and the weights that share a power of two (OCP Microscaling Formats 1.0).
E2M1, BLOCK = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), 32
STORED = "as stored"
# Losses that selectors are compared at.
LEVELS = (0.0075, 0.01, 0.03)


@dataclass(frozen=True)
class Options:
    """What the recipe file sets.

    Attributes:
        selector: selector folder with thresholds.
        out: folder for the table.
        text: options of `lynx-learn evaluate` that say what is measured on: corpus, length, prompt, mode, ….
        budgets: nats of KL per token, of the selector's.
        split: part of the corpus.
        batch_size, groups: decode batches of so many sequences, and their number.
        retrain: format of which a selector is trained and compared at equal loss; None: of none.
        collect, train: options of these commands for both selectors of that comparison.
    """

    selector: str
    out: str
    text: dict[str, Any] = field(default_factory=dict)
    budgets: list[float] = field(default_factory=lambda: [0.01])
    split: str = "test"
    batch_size: int = 16
    groups: int = 12
    retrain: str | None = None
    collect: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


def integers(weights: Tensor, bits: int) -> Tensor:
    """Weights `(…, inputs)` rounded to signed integers of `bits`; a group's largest one has the largest integer."""
    most = 2 ** (bits - 1) - 1
    groups = weights.unflatten(-1, (-1, math.gcd(GROUP, weights.shape[-1])))
    scale = (groups.abs().amax(-1, keepdim=True) / most).half().float().clamp_min(1e-7)
    return ((groups / scale).round().clamp(-most, most) * scale).flatten(-2)


def float8(weights: Tensor) -> Tensor:
    """Weights `(…, outputs, inputs)` in float8 (e4m3); each output has a scale of its own."""
    kind = torch.float8_e4m3fn
    scale = weights.abs().amax(-1, keepdim=True).clamp_min(1e-12) / torch.finfo(kind).max
    return (weights / scale).to(kind).float() * scale


def mxfp4(weights: Tensor) -> Tensor:
    """Weights `(…, inputs)` in 4-bit floats; a block's power of two puts its largest weight between 4 and 8, cut at 6."""
    blocks = weights.unflatten(-1, (-1, math.gcd(BLOCK, weights.shape[-1])))
    power = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30).log2().floor() - 2
    values = torch.tensor(E2M1)
    scaled = blocks / power.exp2()
    nearest = torch.bucketize(scaled.abs(), (values[1:] + values[:-1]) / 2)
    return (values[nearest] * scaled.sign() * power.exp2()).flatten(-2)


# Rounding, and bits of a weight with its share of the scale, where groups are whole; of float8 without the scales, one for each
# output: half a per cent of the bytes where experts are some 200 wide.
FORMATS = {
    "int8": (lambda weights: integers(weights, 8), 8 + 16 / GROUP),
    "fp8": (float8, 8.0),
    "int4": (lambda weights: integers(weights, 4), 4 + 16 / GROUP),
    "mxfp4": (mxfp4, 4 + 8 / BLOCK),
}


@contextmanager
def rounded(layers: list[MoeLayer], name: str) -> Iterator[None]:
    """Experts' matrices in another format while open; afterwards as they were."""
    if name == STORED:
        yield
        return
    # Views whose last dimension is the inputs'.
    matrices = [
        p.data.transpose(1, 2) if getattr(layer.experts, "is_transposed", False) else p.data
        for layer in layers
        for p in layer.experts.parameters()
        if p.ndim == 3
    ]
    kept = [matrix.clone() for matrix in matrices]
    try:
        for matrix in matrices:
            matrix.copy_(FORMATS[name][0](matrix.float()))
        yield
    finally:
        for matrix, own in zip(matrices, kept, strict=True):
            matrix.copy_(own)


def main(options: Options) -> None:
    """Measure every format, with and without skipping, group by group."""
    selector = LynxSelector.from_pretrained(options.selector)
    text = TextOptions(**options.text)
    loaded = load_base(text.model, selector.config.base_model, selector.config.base_revision, text.device, text.dtype)
    layers = find_moe_layers(loaded.model)
    policies = {budget: selector.policy(budget) for budget in options.budgets}
    for policy in policies.values():  # here, since a selector is for the model before rounding
        policy.bind(layers)
    served = text.served(options.split)  # type: ignore[arg-type]
    units = served.units(loaded, [(options.batch_size, options.groups)])
    groups = served.groups(loaded, units, options.batch_size, options.groups, 2)
    simulation = Simulation(loaded.model, layers, text.prompt, served.ends(loaded))
    found: dict[tuple[str, float | None], list[tuple[Losses, Stats]]] = {}
    for tokens, _ in track(groups, "quantised", len(groups), unit="groups"):
        simulation.untouched(tokens)  # kept, so that what follows is held against the model as it is stored
        for name in (STORED, *FORMATS):
            with rounded(layers, name):
                cases: list[float | None] = [None, *options.budgets]
                for budget in cases:
                    if (name, budget) != (STORED, None):
                        run = Run(tokens, None if budget is None else policies[budget])
                        found.setdefault((name, budget), []).extend(simulation.losses([run]))
    sources = [names for _, names in groups]
    points = [point(name, budget, runs, sources) for (name, budget), runs in found.items()]
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    written = {"options": vars(options), "environment": environment(), "points": points}
    if options.retrain:
        written["retrained"] = compare_retrained(options, options.retrain, loaded, layers, simulation, groups)
    write_json(out / "quantised.json", written)
    table = quantised_table(written)
    write(out / "quantised.md", table.encode())
    print(table)


def compare_retrained(
    options: Options,
    name: str,
    loaded: LoadedModel,
    layers: list[MoeLayer],
    simulation: Simulation,
    groups: list[tuple[Tensor, list[str]]],
) -> list[dict[str, Any]]:
    """On the rounded model, a selector of the model before rounding and one of its own: bytes where both lose as much, against
    the model as it is stored."""
    model = options.text.get("model") or LynxSelector.from_pretrained(options.selector).config.base_model
    policies: dict[str, list[Policy]] = {}
    for kind in (STORED, name):
        folder = Path(options.out) / kind.replace(" ", "-")
        with rounded(layers, kind):
            trace = collect(CollectOptions(out=str(folder / "trace"), model=model, **options.collect), loaded)
            selector = folder / "selector"
            if not (selector / "config.json").exists():
                train(TrainOptions(trace=str(trace.folder), out=str(selector), **options.train), loaded, trace)
            (policies[kind],) = curves(
                "learned", layers, options.batch_size, None, LynxSelector.from_pretrained(selector)
            )
            for policy in policies[kind]:
                policy.bind(layers)  # here, since the other model's selector is refused
    found: dict[str, list[list[tuple[Losses, Stats]]]] = {kind: [[] for _ in own] for kind, own in policies.items()}
    for tokens, _ in track(groups, "retrained", len(groups), unit="groups"):
        simulation.untouched(tokens)
        with rounded(layers, name):
            for kind, own in policies.items():
                for runs, policy in zip(found[kind], own, strict=True):
                    runs.extend(simulation.losses([Run(tokens, policy)]))
    sources = [names for _, names in groups]
    rows = []
    for kind, measured in found.items():
        points = [point(name, None, runs, sources) for runs in measured]
        curve = [(p["kl"], p["experts"], p["bytes"]) for p in points]
        rows.append({"selector_of": kind, "points": points, "at": [interpolate(curve, level) for level in LEVELS]})
    return rows


def point(
    name: str, budget: float | None, runs: list[tuple[Losses, Stats]], sources: list[list[str]]
) -> dict[str, Any]:
    """Loss per token with the margin over groups, and bytes relative to the untouched model in 16 bits."""
    losses, stats = zip(*runs, strict=True)
    sums, tokens, part_sums, part_tokens = map(torch.stack, zip(*losses, strict=True))
    measured = Comparison(name, str(budget), sums, tokens, part_sums, part_tokens, list(stats), sources)
    mean, kl = measured.mean_stats(), measured.group_means("kl")
    kept = mean["experts"] / mean["experts_before"]
    bits = 16.0 if name == STORED else FORMATS[name][1]
    return {
        "format": name,
        "budget": budget,
        "kl": float(kl.mean()),
        "kl_margin": margin(kl),
        "nll": measured.mean("nll"),
        "experts": mean["experts"],
        # What a decision reads, its scorers and surrogates, stays in the model's type.
        "bytes": kept * bits / 16 + mean["bytes"] - kept,
        "tokens": measured.tokens,
    }


def quantised_table(written: dict[str, Any]) -> str:
    """Markdown: a row for each format and budget."""
    rows = [
        [
            p["format"],
            "none" if p["budget"] is None else f"{p['budget']:g}",
            f"{p['kl']:.4f} ± {p['kl_margin']:.4f}",
            f"{p['nll']:+z.4f}",
            f"{p['experts']:.1f}",
            f"{p['bytes']:.0%}",
        ]
        for p in written["points"]
    ]
    options, tokens = written["options"], min(p["tokens"] for p in written["points"])
    head = ["experts", "budget of skipping", "KL, nats", "ΔNLL, nats", "experts per layer", "bytes"]
    return "\n".join(
        [
            f"`{options['selector']}`, batch {options['batch_size']}, {tokens:,} decode tokens of {options['text'].get('corpus', 'the built-in text')} "
            f"({options['split']}); rounding simulated; losses against the model as it is stored, bytes against it in 16 bits, "
            f"untouched; {written['environment']['machine']}, one run.\n",
            Table("", head, rows).markdown,
            "",
            *retrained_table(written),
        ]
    )


def retrained_table(written: dict[str, Any]) -> list[str]:
    if "retrained" not in written:
        return []
    rows = [
        [
            "the model as stored" if found["selector_of"] == STORED else "the rounded model",
            *("not reached" if at is None else f"{at[1]:.1%} / {at[0]:.1f}" for at in found["at"]),
        ]
        for found in written["retrained"]
    ]
    options = written["options"]
    return [
        f"Selectors from {options['collect'].get('tokens', 100_000):,} tokens each, on the model rounded to {options['retrain']}: bytes / experts "
        "per layer where the loss against the model as stored, rounding included, is\n",
        Table("", ["selector of", *(f"KL {level:g}" for level in LEVELS)], rows).markdown,
        "",
    ]


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
