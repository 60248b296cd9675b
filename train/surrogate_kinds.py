"""What other kinds of surrogates would leave of a skipped expert's output, layer by layer, at the same number of weights.

    python train/surrogate_kinds.py --config train/surrogate_kinds.yaml

All are fitted on the same tokens of a trace, and measured on others. Before tuning:

- `by gain`: what `lynx-learn train` fits; directions go to the experts where they explain most;
- `one rank`: every expert has the same rank;
- `shared input`: a layer's experts answer from one projection of the hidden state. It is read once, so each answer has twice
  the rank for its bytes;
- `skipping, by gain` and `skipping, second round`: on the hidden states that skipping at a budget produces, those surrogates and
  others that are fitted on such states.

Figures are shares of the energy Σ g² ‖E_e(x)‖² that is left, g being the gate's weight. Prints a Markdown table and writes it to `OUT`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor

from lynx_learn.decode.simulate import simulated_logits
from lynx_learn.files import write
from lynx_learn.fit.layer import CHECK, HELD_OUT
from lynx_learn.fit.low_rank import PENALTIES, Rows, fit_surrogate
from lynx_learn.moe.decision import Decision, Policy, Routing
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.moe.loading import environment, load_base
from lynx_learn.selector.selector import LynxSelector
from lynx_learn.selector.surrogates import MOST_RANKS, choose_ranks
from lynx_learn.show.progress import track
from lynx_learn.show.tables import Table
from lynx_learn.traces.format import Trace

# Tenths of the sequences to fit on, to choose a penalty by, and to measure on.
SPANS = ((0, CHECK), (CHECK, HELD_OUT), (HELD_OUT, 10))
NAMES = ("by gain", "one rank", "shared input", "skipping, by gain", "skipping, second round")
# Steps of the search for a shared projection at each penalty, which begins where that of the one before ended, and how often it
# looks at the objective.
STEPS, LOOKS = 15, 25


@dataclass(frozen=True)
class Options:
    """What the recipe file sets.

    Attributes:
        trace: trace folder, of which the token sequences are taken.
        selector: selector folder, whose rank the surrogates have, and whose decisions make the second round's hidden states.
        out: Markdown file.
        budget: nats of KL per token that skipping loses.
        batch_size, batches: sequences that decode together, and how many batches at most.
    """

    trace: str
    selector: str
    out: str
    budget: float = 0.01
    batch_size: int = 16
    batches: int = 36


class Recorded:
    """A policy whose layers' inputs are kept; None: of the untouched model."""

    name = setting = "recorded"

    def __init__(self, policy: Policy | None) -> None:
        self.policy = policy
        self.seen: dict[int, Routing] = {}

    def bind(self, layers: list[MoeLayer]) -> None:
        if self.policy:
            self.policy.bind(layers)

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        self.seen[layer.index] = routing
        return self.policy.decide(layer, routing) if self.policy else Decision(routing.indices, routing.weights)

    def own_bytes(self, layer: MoeLayer, skipped: Tensor, batches: int) -> float:
        return 0.0


@dataclass
class Seen:
    """What a layer is given: `hidden` (tokens, hidden), `indices` and `weights` (tokens, top_k), `tenth` (tokens,)."""

    hidden: Tensor
    indices: Tensor
    weights: Tensor
    tenth: Tensor

    def rows(self, layer: MoeLayer, expert: int, low: int, high: int) -> Rows:
        """Of one expert, the sequences whose number ends in `low` to `high` - 1."""
        own = (self.tenth >= low) & (self.tenth < high)
        token, slot = ((self.indices == expert) & own.unsqueeze(-1)).nonzero(as_tuple=True)
        x = self.hidden[token]
        y = layer.expert_output(expert, x.to(layer.dtype)) if len(x) else x
        return Rows(x.float(), y.float(), self.weights[token, slot].float().square())


@torch.no_grad()
def main(options: Options) -> None:
    """Measure every layer, print and write."""
    trace = Trace.open(options.trace)
    selector = LynxSelector.from_pretrained(options.selector)
    rank = selector.config.rank
    loaded = load_base(None, selector.config.base_model, selector.config.base_revision, "cpu", "auto", tokenizer=False)
    layers = find_moe_layers(loaded.model)
    index, length = trace.index(), trace.options.length
    tokens, tenth = (index[name].view(-1, length) for name in ("tokens", "sequence"))
    count = min(options.batches, len(tokens) // options.batch_size)
    places = [slice(n * options.batch_size, (n + 1) * options.batch_size) for n in range(count)]
    seen = []
    for policy in (None, selector.policy(options.budget)):
        found = []
        for place in track(places, "hidden states", len(places), unit="batches"):
            recorded = Recorded(policy)
            recorded.bind(layers)
            simulated_logits(loaded.model, layers, tokens[place], recorded, length // 4)
            found.append((recorded.seen, tenth[place, 0] % 10))
        seen.append(found)
    rows, total = [], torch.zeros(1 + len(NAMES), 2, dtype=torch.float64)
    for layer in track(layers, "layers", len(layers), unit="layers"):
        untouched, skipping = (joined(found, layer.index) for found in seen)
        left = measure(layer, untouched, skipping, rank)
        rows.append([str(layer.index), *shares(left)])
        total += left
    rows.append(["all", *shares(total)])
    page = "\n".join(
        [
            f"Share of the energy that is left, on held-out tokens; {options.trace}, {count * options.batch_size} "
            f"sequences, rank {rank}, skipping at a budget of {options.budget:g} at batch {options.batch_size}; "
            f"{environment()['machine']}; one run.\n",
            Table("", ["layer", *NAMES], rows).markdown,
            "",
        ]
    )
    write(Path(options.out), page.encode())
    print(page)


def joined(found: list[tuple[dict[int, Routing], Tensor]], layer: int) -> Seen:
    """All batches' tokens of one layer; a routing is `(steps, sequences, …)`."""
    parts: list[tuple[Tensor, ...]] = []
    for routings, tenth in found:
        routing = routings[layer]
        each = tenth.expand(routing.hidden.shape[:2])
        parts.append(tuple(part.flatten(0, 1) for part in (routing.hidden, routing.indices, routing.weights, each)))
    return Seen(*(torch.cat(column) for column in zip(*parts, strict=True)))


def shares(left: Tensor) -> list[str]:
    return [f"{float(part / whole):.3f}" for part, whole in left[1:]]


def measure(layer: MoeLayer, untouched: Seen, skipping: Seen, rank: int) -> Tensor:
    """What nothing and each of NAMES leaves of the held-out energy, and that energy `(1 + kinds, 2)`."""
    experts = range(layer.num_experts)
    (learn, check, held_out), (again, again_check, again_held_out) = (
        [[seen.rows(layer, expert, *span) for expert in experts] for span in SPANS] for seen in (untouched, skipping)
    )
    most = min(MOST_RANKS * rank, layer.hidden_size)
    fits, second = (
        [fit_surrogate(*rows, rank, most) for rows in zip(*pair, strict=True)]
        for pair in ((learn, check), (again, again_check))
    )
    ranks, second_ranks = (
        choose_ranks([fit.gains for fit in each], rank * layer.num_experts) for each in (fits, second)
    )
    shared = shared_input(learn, check, min(2 * rank, layer.hidden_size))

    def energy(rows: list[Rows], answers: list[Tensor]) -> float:
        parts = zip(rows, answers, strict=True)
        return sum(float(own.weights @ (own.y - answer).square().sum(-1)) for own, answer in parts)

    whole, whole_again = (energy(rows, [own.y * 0 for own in rows]) for rows in (held_out, again_held_out))
    left = [
        (whole, whole),
        (energy(held_out, [fits[e].output(held_out[e].x, ranks[e]) for e in experts]), whole),
        (energy(held_out, [fits[e].output(held_out[e].x, rank) for e in experts]), whole),
        (energy(held_out, [own.x @ shared[e][0] + shared[e][1] for e, own in enumerate(held_out)]), whole),
        (energy(again_held_out, [fits[e].output(again_held_out[e].x, ranks[e]) for e in experts]), whole_again),
        (
            energy(again_held_out, [second[e].output(again_held_out[e].x, second_ranks[e]) for e in experts]),
            whole_again,
        ),
    ]
    return torch.tensor(left, dtype=torch.float64)


def shared_input(learn: list[Rows], check: list[Rows], width: int) -> list[tuple[Tensor, Tensor]]:
    """Maps `(hidden, hidden)` and constants `(hidden,)` of experts that answer from one projection to `width` numbers.

    The projection explains most of the weighted squares over all experts, each of which answers from it by ridge regression
    (variable projection after Golub and Pereyra, 1973, by L-BFGS); the penalty is chosen on `check`.
    """
    hidden = learn[0].x.shape[1]
    centres, moments = [], torch.zeros(2, len(learn), hidden, hidden, dtype=torch.float64)
    for expert, own in enumerate(learn):
        weights = own.weights.double()
        share = weights / weights.sum().clamp_min(1e-30)
        x, y = own.x.double(), own.y.double()
        centre_x, centre_y = share @ x, share @ y
        centres.append((centre_x, centre_y))
        scaled = (x - centre_x) * weights.unsqueeze(-1)
        moments[0, expert], moments[1, expert] = scaled.T @ (x - centre_x), scaled.T @ (y - centre_y)
    pooled = moments[0].sum(0)
    values, vectors = torch.linalg.eigh(pooled)
    whiten = vectors * values.clamp_min(1e-9 * float(values[-1])).rsqrt() @ vectors.T
    grams, crosses = whiten @ moments[0] @ whiten, whiten @ moments[1]
    best: tuple[float, list[tuple[Tensor, Tensor]]] = (torch.inf, [])
    start = torch.linalg.eigh((crosses @ crosses.mT).sum(0)).eigenvectors[:, -width:]
    for penalty in PENALTIES:
        projection = start.clone(memory_format=torch.contiguous_format).requires_grad_()

        def answers(p: Tensor, penalty: float = penalty) -> tuple[Tensor, Tensor]:
            """What each expert makes of the projected state `(experts, width, hidden)`, and what is explained."""
            inner, outer = p.T @ grams @ p, p.T @ crosses
            ridge = penalty * inner.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            maps = torch.linalg.solve(inner + (ridge + 1e-12) * torch.eye(p.shape[1], dtype=p.dtype), outer)
            return maps, (maps * outer).sum()

        search = torch.optim.LBFGS([projection], max_iter=STEPS, max_eval=LOOKS, line_search_fn="strong_wolfe")

        def step(p: Tensor = projection) -> Tensor:
            with torch.enable_grad():
                loss = -answers(torch.linalg.qr(p).Q)[1]
                p.grad = torch.autograd.grad(loss, p)[0].contiguous()
            return loss

        search.step(step)
        basis = start = torch.linalg.qr(projection.detach()).Q
        whole = (whiten @ basis @ answers(basis)[0]).float()
        found = [(m, (y - x @ m.double()).float()) for m, (x, y) in zip(whole, centres, strict=True)]
        error = sum(
            float(own.weights @ (own.x @ m + c - own.y).square().sum(-1))
            for own, (m, c) in zip(check, found, strict=True)
        )
        if error < best[0]:
            best = error, found
    return best[1]


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
