"""How many tokens a layer needs, and whether scorers should learn from cross-fitted costs.

    python train/cross_fit.py --config train/cross_fit.yaml

Surrogates err less on the tokens that they were fitted on than on others, and a scorer learns from those errors. Cross-fitted,
the surrogates of one half of the sequences give the costs of the other half. The scorer of each kind of cost is tested on
sequences that neither saw, against what the surrogates of all tokens leave there. Prints a Markdown table and writes it to `OUT`.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor

from lynx_learn.checkpoint.blocks import open_layers
from lynx_learn.fit.layer import CHECK, HALF, HELD_OUT
from lynx_learn.fit.low_rank import Rows, fit_surrogate
from lynx_learn.fit.scorer import Assignments, ScorerOptions, new_scorer, predicted_costs, quality, train_scorer
from lynx_learn.fit.train import TrainOptions
from lynx_learn.moe.families import MoeLayer
from lynx_learn.moe.loading import environment
from lynx_learn.selector.features import LOG_WEIGHT, assignment_features
from lynx_learn.selector.surrogates import rank_for
from lynx_learn.show.tables import Table
from lynx_learn.traces.format import Trace

HEAD = [
    "tokens",
    "of an expert, by input dimension",
    "costs",
    "mean cost to that on unseen tokens",
    "deviance",
    "correlation of ranks",
    "cost foreseen to true, rarest quarter of experts",
]


@dataclass(frozen=True)
class Options:
    """What the recipe file sets.

    Attributes:
        trace: trace folder.
        out: Markdown file.
        tokens: sizes of the trace, each its first tokens; the test is the same for all.
        layer: which MoE layer.
        epochs: passes over the tokens when a scorer is trained.
    """

    trace: str
    out: str
    tokens: list[int]
    layer: int = 2
    epochs: int = TrainOptions.epochs


def main(options: Options) -> None:
    """Fit each size in both ways, print and write."""
    trace = Trace.open(options.trace)
    own = trace.options
    stored = open_layers(None, own.model, own.revision, torch.device("cpu"), own.dtype)
    rank = rank_for(
        TrainOptions.surrogate_share, own.expert_bytes / getattr(torch, own.dtype).itemsize, own.hidden_size
    )
    rows = []
    with stored.layer(options.layer) as layer:
        shards = list(trace.layer_shards(options.layer))
        data = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
        tenth = trace.index()["sequence"] % 10
        for size in options.tokens:
            rows += measure(layer, data, tenth, size, rank, options)
    page = "\n".join(
        [
            f"{options.trace}, layer {options.layer}, rank {rank}; {environment()['machine']}; one run.\n",
            Table("", HEAD, rows).markdown,
            "",
        ]
    )
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(page, encoding="utf-8")
    print(page)


def measure(
    layer: MoeLayer, data: dict[str, Tensor], tenth: Tensor, size: int, rank: int, options: Options
) -> list[list[str]]:
    """Two rows: a scorer that learned from costs as they are, and one from cross-fitted ones."""
    indices = data["indices"].long()
    learn, test = (tenth < HELD_OUT) & (torch.arange(len(tenth)) < size), tenth == HELD_OUT
    plain, crossed = costs(layer, data, tenth, learn, test, rank)
    features = assignment_features(data["logits"], data["indices"], data["weights"])

    def rows_of(part: Tensor, values: Tensor) -> Assignments:
        return Assignments(features[part], indices[part], values[part], data["hidden"][part])

    tested = rows_of(test, plain)
    counts = torch.bincount(indices[learn].flatten(), minlength=layer.num_experts)
    rare = torch.isin(tested.experts, counts.argsort()[: layer.num_experts // 4])
    per_input = size * indices.shape[1] / layer.num_experts / layer.hidden_size
    fitted = learn & (tenth < CHECK)
    found = []
    for name, values in (("as they are", plain), ("cross-fitted", crossed)):
        fit = rows_of(learn, values)
        squared = (fit.costs / (2 * fit.features[..., LOG_WEIGHT]).exp()).flatten()
        sums = torch.zeros(layer.num_experts).index_add(0, fit.experts.flatten(), squared)
        torch.manual_seed(0)
        scorer = new_scorer("mlp", fit, sums / counts.clamp_min(1))
        with tempfile.TemporaryDirectory() as logs:
            kind = ScorerOptions("mlp", options.epochs, TrainOptions.batch, TrainOptions.rate, 0)
            train_scorer(scorer, fit, tested, kind, Path(logs), "scorer")
        predicted = predicted_costs(scorer, tested)
        figures = quality(predicted, tested.costs)
        biased = predicted[rare].sum() / predicted.sum() * tested.costs.sum() / tested.costs[rare].sum()
        ratio = values[fitted].mean() / plain[test].mean()
        found.append(
            [
                f"{size:,}",
                f"{per_input:.1f}",
                name,
                f"{float(ratio):.2f}",
                f"{figures['deviance']:.3f}",
                f"{figures['rank_correlation']:.3f}",
                f"{float(biased):.2f}",
            ]
        )
    return found


@torch.no_grad()
def costs(
    layer: MoeLayer, data: dict[str, Tensor], tenth: Tensor, learn: Tensor, test: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Costs `(tokens, top_k)` by the surrogates of all tokens, and cross-fitted where they were fitted."""
    plain = torch.zeros(data["indices"].shape)
    crossed = plain.clone()
    for expert in range(layer.num_experts):
        token, slot = ((data["indices"] == expert) & (learn | test).unsqueeze(-1)).nonzero(as_tuple=True)
        x = data["hidden"][token].to(layer.device, layer.dtype)
        y = layer.expert_output(expert, x).float()
        x, weights, part, fits = x.float(), data["weights"][token, slot].float().square(), tenth[token], learn[token]

        def by(chosen: Tensor) -> Tensor:
            """Costs by the surrogate of these tokens."""
            rows, check = (Rows(x[own], y[own], weights[own]) for own in (chosen & fits, (part == CHECK) & fits))  # noqa: B023
            fit = fit_surrogate(rows, check, rank)
            return weights * (y - fit.output(x, rank)).square().sum(-1)  # noqa: B023

        whole, first, second = by(part < CHECK), by(part < HALF), by((part >= HALF) & (part < CHECK))
        plain[token, slot] = whole
        crossed[token, slot] = torch.where(part < HALF, second, torch.where(part < CHECK, first, whole))
    return plain, crossed


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
