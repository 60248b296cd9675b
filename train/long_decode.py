"""Does the loss of skipping grow along a long decode, what makes it grow, and what would it cost to stop it?

    python train/long_decode.py --config train/long_decode.yaml

Measures, in simulated decode of the text itself, the loss by part of the positions

- with skipping in the whole decode;
- with skipping in the last part alone, so that all keys and values before it are the untouched model's: what the last
  part loses more with skipping everywhere is what steps that skipped have left behind them;
- with all experts in every n-th step, or for the tokens that later ones attend to most (an oracle: it knows what comes).

Each is swept over thresholds and read off at the budget, so that bytes are those of one loss. Prints the tables as
Markdown and writes them to `OUT`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn import functional

from lynx_learn.decode.simulate import Run, stacked_logits
from lynx_learn.decode.tally import Stats
from lynx_learn.measure.equal_loss import interpolate
from lynx_learn.moe.decision import Decision, Policy, Routing
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.moe.loading import LoadedModel, environment, load_tokenizer, model_path
from lynx_learn.selector.selector import LynxSelector, ThresholdPolicy
from lynx_learn.show.tables import Table
from lynx_learn.traces.groups import decode_groups

# Thresholds, as multiples of the calibrated one.
SWEEP = (0.7, 1.0, 1.4, 2.0)
# Of the positions, those that are attended to most and keep all experts.
ATTENDED = 1 / 16


@dataclass(frozen=True)
class Options:
    """What the recipe file sets.

    Attributes:
        selector: selector folder with thresholds.
        model: the model it was trained for, a folder or name.
        corpus: text; documents of at least `length` tokens are used.
        out: Markdown file.
        length: positions of a sequence, of which the first `prompt` are prefill.
        stretch: how many times the positions that the model was trained on they are, for YaRN (arXiv 2309.00071).
        budget: a budget of the selector, nats.
        every: all experts in every n-th step, for each of these n.
        parts: of the decode positions.
    """

    selector: str
    model: str
    corpus: str
    budget: float
    length: int
    out: str = "runs/long-decode/long-decode.md"
    prompt: int = 32
    stretch: float = 1.0
    batch_size: int = 16
    groups: int = 1
    every: list[int] = field(default_factory=list)
    parts: int = 8


@dataclass
class KeepingSome:
    """A policy that leaves some positions untouched.

    Attributes:
        keeps: of each group's decode batches and rows, which keep all their experts `(batches, rows)`, bool.
    """

    inner: ThresholdPolicy
    keeps: Tensor
    name: str = "keeping some"
    setting: str = ""

    def bind(self, layers: list[MoeLayer]) -> None:
        self.inner.bind(layers)

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        """Kept tokens' costs are infinite; a batch of which all are kept is not touched."""
        scale = torch.where(self.keeps, torch.inf, 1.0).to(routing.hidden.device)
        return self.inner.decide(layer, routing, scale)

    def own_bytes(self, layer: MoeLayer, skipped: Tensor, batches: int) -> float:
        return self.inner.own_bytes(layer, skipped, batches)


@dataclass(frozen=True)
class Point:
    """One policy at one threshold: nats per token by part of the positions, and bytes relative to untouched."""

    kl: list[float]
    bytes: float

    @property
    def mean(self) -> float:
        return sum(self.kl) / len(self.kl)


def main(options: Options) -> None:
    """Measure, print and write."""
    loaded = load(options)
    layers = find_moe_layers(loaded.model)
    groups = decode_groups(
        options.corpus, loaded.tokenizer, "all", options.batch_size, options.length, options.groups, seed=1, fewest=1
    )
    measured = Measured(loaded.model, layers, [tokens for tokens, _ in groups], options.prompt, options.parts)
    selector = LynxSelector.from_pretrained(options.selector)
    steps = options.length - options.prompt
    threshold = selector.config.calibrated(options.budget, "kl")[options.batch_size]

    def swept(keeps: Sequence[Tensor] | None, multiples: Sequence[float] = SWEEP) -> list[Point]:
        return [
            measured.point(selector.at_threshold(threshold * multiple, kernel="torch"), keeps) for multiple in multiples
        ]

    def all_rows(kept: Tensor) -> list[Tensor]:
        return [kept[:, None].expand(-1, options.batch_size)] * len(groups)

    step = torch.arange(steps)
    part = steps - len(step.tensor_split(options.parts)[-1])
    everywhere = swept(None)
    (last,) = swept(all_rows(step < part), [1.0])
    lines = {"skipping everywhere": everywhere[SWEEP.index(1.0)], "skipping in the last part alone": last}
    variants = {"skipping everywhere": everywhere}
    for n in options.every:
        variants[f"all experts in every {n}th step"] = swept(all_rows(step % n == 0))
    attended = [most_attended(loaded.model, tokens, options.prompt, options.parts) for tokens in measured.groups]
    variants[f"all experts for the {ATTENDED:.0%} of tokens attended to most (oracle)"] = swept(attended)

    parts = [f"{positions[0] + options.prompt}–" for positions in step.tensor_split(options.parts)]
    first = Table("", ["", "mean", *parts], [["loss of the text, untouched", *shown(measured.untouched, 2)]])
    first.rows.extend([name, *shown(point.kl, 4)] for name, point in lines.items())
    second = Table(
        "",
        ["", "bytes", "last part / first"],
        [[name, *at_budget(points, options.budget)] for name, points in variants.items()],
    )
    page = "\n".join(
        [
            f"Nats per token by decode position, at the calibrated threshold for a budget of {options.budget:g} and a batch of "
            f"{options.batch_size}; {options.length:,} positions, {len(groups) * options.batch_size} documents of {options.corpus}; "
            f"{f'YaRN with factor {options.stretch:g}, not trained further; ' if options.stretch > 1 else ''}"
            f"{environment()['machine']}; simulated decode, one run.\n",
            first.markdown,
            f"\nRead off at a mean KL of {options.budget:g} over all positions:\n",
            second.markdown,
            "",
        ]
    )
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(page, encoding="utf-8")
    print(page)


def load(options: Options) -> LoadedModel:
    """The model with positions for `length` tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = model_path(options.model)
    config = AutoConfig.from_pretrained(path)
    trained = config.max_position_embeddings
    if options.stretch > 1:
        config.rope_parameters = {
            **config.rope_parameters,
            "rope_type": "yarn",
            "factor": options.stretch,
            "original_max_position_embeddings": trained,
        }
        config.max_position_embeddings = int(trained * options.stretch)
    model = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, use_safetensors=True, attn_implementation="sdpa"
    )
    tokenizer = load_tokenizer(options.model, model.get_input_embeddings().weight.shape[0])
    return LoadedModel(model.eval(), tokenizer, "")


class Measured:
    """Losses against the untouched model on the same groups, by part of the positions.

    Args:
        groups: `(sequences, positions)` each.
    """

    def __init__(self, model: nn.Module, layers: list[MoeLayer], groups: list[Tensor], prompt: int, parts: int) -> None:
        self.model, self.layers, self.groups, self.prompt, self.parts = model, layers, groups, prompt, parts
        self.references = [self._logits(tokens, None)[0] for tokens in groups]
        losses = [
            functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, prompt + 1 :], reduction="none").mean(0)
            for logits, tokens in zip(self.references, groups, strict=True)
        ]
        self.untouched = self._by_part(losses)

    @torch.no_grad()
    def _logits(self, tokens: Tensor, policy: Policy | None) -> tuple[Tensor, Stats]:
        ((logits, stats),) = stacked_logits(self.model, self.layers, [Run(tokens, policy)], self.prompt)
        return logits.float(), stats

    def _by_part(self, values: list[Tensor]) -> list[float]:
        mean = torch.stack(values).mean(0)
        return [float(part.mean()) for part in mean.tensor_split(self.parts)]

    @torch.no_grad()
    def point(self, policy: ThresholdPolicy, keeps: Sequence[Tensor] | None) -> Point:
        """One policy; `keeps` for each group as in `KeepingSome`, None: nothing is kept."""
        values, sizes = [], []
        for number, tokens in enumerate(self.groups):
            own: Policy = policy if keeps is None else KeepingSome(policy, keeps[number])
            own.bind(self.layers)
            logits, stats = self._logits(tokens, own)
            rows = [
                functional.kl_div(other.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none").sum(
                    -1
                )
                for other, full in zip(logits, self.references[number], strict=True)
            ]
            values.append(torch.stack(rows).mean(0))
            sizes.append(stats.bytes_ratio)
        return Point(self._by_part(values), sum(sizes) / len(sizes))


@torch.no_grad()
def most_attended(model: nn.Module, tokens: Tensor, prompt: int, parts: int) -> Tensor:
    """The decode positions whose keys later tokens give most of their attention, `(positions - prompt, sequences)`.

    So many in every part of the positions: late ones are attended to by few, which are near and so look at them more.
    """
    model.set_attn_implementation("eager")  # type: ignore[operator]
    kept = []
    for row in tokens:
        received = sum(a.sum((0, 1, 2)) for a in model(input_ids=row[None], output_attentions=True).attentions)
        pieces = received[prompt:].tensor_split(parts)
        kept.append(torch.cat([piece >= piece.quantile(1 - ATTENDED) for piece in pieces]))
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return torch.stack(kept, dim=1)


def at_budget(points: Sequence[Point], budget: float) -> list[str]:
    """Bytes, and the growth of the loss, where the mean is the budget."""
    found = interpolate([(p.mean, p.kl[-1] / p.kl[0], p.bytes) for p in points], budget)
    return ["not reached", "–"] if found is None else [f"{found[1]:.1%}", f"{found[0]:.2f}"]


def shown(values: list[float], digits: int) -> list[str]:
    return [f"{value:.{digits}f}" for value in (sum(values) / len(values), *values)]


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
