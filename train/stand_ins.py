"""What is left of a skipped expert's output when something else answers in its place, layer by layer.

    python train/stand_ins.py --config train/stand_ins.yaml

Stand-ins of an expert's output E_e(x) are fitted on the tokens of a trace that were routed to it, and measured on others:

- `scalar`: a number times the output of one other expert (as ExFold, arXiv 2608.24938), which is the best of all others, as if
  that one were always kept: more than any rule can count on;
- `surrogate`: the low-rank map of the hidden state that `lynx-learn train` fits, before tuning, of the rank that the selector has;
- `both`: the surrogate, and a scalar for what it leaves;
- `either`: the scalar or the surrogate, for each expert the one that leaves less of the tokens that they were fitted on;
- `either, oracle`: for each held-out token the one that leaves less of it, which nobody knows beforehand.

Figures are shares of the energy Σ g² ‖E_e(x)‖² that is left, g being the gate's weight. Prints a Markdown table and writes it to `OUT`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse import auto_cli
from torch import Tensor

from lynx_learn.fit.layer import CHECK, HELD_OUT
from lynx_learn.fit.low_rank import Rows, fit_surrogate
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.moe.loading import environment, load_base
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.show.tables import Table
from lynx_learn.traces.format import Trace

NAMES = ("scalar", "surrogate", "both", "either", "either, oracle")


@dataclass(frozen=True)
class Options:
    """What the recipe file sets.

    Attributes:
        trace: trace folder.
        selector: selector folder, whose rank the surrogates have.
        out: Markdown file.
        tokens: of the trace, spread over it.
        compared: assignments of an expert, at most, on which all other experts run.
    """

    trace: str
    selector: str
    out: str
    tokens: int = 40_000
    compared: int = 1024


class Assigned(NamedTuple):
    """Tokens that were routed to one expert."""

    x: Tensor
    """(tokens, hidden)."""
    weights: Tensor
    """(tokens,), squared."""
    tenth: Tensor
    """(tokens,), the number of the sequence modulo 10."""

    def of(self, chosen: Tensor) -> "Assigned":
        return Assigned(*(part[chosen] for part in self))


def main(options: Options) -> None:
    """Measure every layer, print and write."""
    trace = Trace.open(options.trace)
    config = LynxSelector.from_pretrained(options.selector).config
    loaded = load_base(None, config.base_model, config.base_revision, "auto", "auto", tokenizer=False)
    rows = []
    total = torch.zeros(1 + len(NAMES), dtype=torch.float64)
    for layer in find_moe_layers(loaded.model):
        found = measure(layer, trace, config.rank, options)
        rows.append([str(layer.index), *shares(found)])
        total += found
    rows.append(["all", *shares(total)])
    page = "\n".join(
        [
            f"Share of the energy that is left, on held-out tokens; {options.trace}, {options.tokens:,} tokens, rank {config.rank}; "
            f"{environment()['machine']}; one run.\n",
            Table("", ["layer", *NAMES], rows).markdown,
            "",
        ]
    )
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(page, encoding="utf-8")
    print(page)


def shares(energies: Tensor) -> list[str]:
    return [f"{float(left / energies[0]):.3f}" for left in energies[1:]]


@torch.no_grad()
def measure(layer: MoeLayer, trace: Trace, rank: int, options: Options) -> Tensor:
    """The held-out energy of all experts, and what each of NAMES leaves of it."""
    found = torch.zeros(1 + len(NAMES), dtype=torch.float64)
    for expert, own in assigned(trace, layer, options.tokens):
        parts = (own.tenth < CHECK, own.tenth == CHECK, own.tenth == HELD_OUT)
        learn, check, held_out = (own.of(part) for part in parts)
        if not len(learn.x) or not len(held_out.x):
            continue
        # All other experts run on few of them: the scalar has one parameter, and needs no more.
        some, tested = (part.of(spread(len(part.x), options.compared)) for part in (learn, held_out))

        def run(x: Tensor, number: int = expert) -> Tensor:
            return layer.expert_output(number, x.to(layer.device, layer.dtype)).float()

        def surrogate_rows(part: Assigned, run: Callable[[Tensor], Tensor] = run) -> Rows:
            return Rows(part.x.float(), run(part.x), part.weights)

        fit = fit_surrogate(surrogate_rows(learn), surrogate_rows(check), rank)
        y, y_tested = run(some.x), run(tested.x)
        r, r_tested = (value - fit.output(part.x, rank) for value, part in ((y, some), (y_tested, tested)))
        best = {"scalar": (torch.inf, y_tested), "both": (torch.inf, r_tested)}
        for other in range(layer.num_experts):
            if other == expert:
                continue
            z, z_tested = run(some.x, other), run(tested.x, other)
            for name, target, target_tested in (("scalar", y, y_tested), ("both", r, r_tested)):
                times = inner(target, z, some.weights) / inner(z, z, some.weights).clamp_min(1e-30)
                left = float(energy(target - times * z, some.weights))
                if left < best[name][0]:
                    best[name] = (left, target_tested - times * z_tested)
        scalar = best["scalar"]
        either = scalar[1] if scalar[0] < float(energy(r, some.weights)) else r_tested
        nearer = scalar[1].square().sum(-1) < r_tested.square().sum(-1)
        oracle = torch.where(nearer.unsqueeze(-1), scalar[1], r_tested)
        left_over = (y_tested, scalar[1], r_tested, best["both"][1], either, oracle)
        # As many as there are, not as many as were compared.
        scale = float(held_out.weights.sum() / tested.weights.sum().clamp_min(1e-30))
        found += scale * torch.stack([energy(part, tested.weights) for part in left_over]).double().cpu()
    return found


def assigned(trace: Trace, layer: MoeLayer, tokens: int) -> Iterator[tuple[int, Assigned]]:
    """Each expert, and what was routed to it, of `tokens` tokens spread over the trace."""
    chosen = torch.zeros(trace.collected_tokens, dtype=torch.bool)
    chosen[spread(trace.collected_tokens, tokens)] = True
    tenth = trace.index()["sequence"] % 10
    parts, start = [], 0
    for shard in trace.layer_shards(layer.index, ("hidden", "indices", "weights")):
        place = slice(start, start + len(shard["hidden"]))
        start = place.stop
        own = chosen[place]
        parts.append((*(shard[name][own] for name in ("hidden", "indices", "weights")), tenth[place][own]))
    hidden, indices, weights, tenth = (torch.cat(column) for column in zip(*parts, strict=True))
    for expert in range(layer.num_experts):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        yield expert, Assigned(hidden[token], weights[token, slot].float().square(), tenth[token])


def spread(count: int, most: int) -> Tensor:
    """At most so many places among `count`, evenly."""
    kept = min(count, most)
    return torch.arange(kept) * count // max(kept, 1)


def inner(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    return ((a * b).sum(-1) * weights).sum()


def energy(values: Tensor, weights: Tensor) -> Tensor:
    return inner(values, values, weights)


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
