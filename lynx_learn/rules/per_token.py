"""Rules that leave assignments out token by token."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import OptionError
from ..moe.decision import Decision, Routing
from ..moe.families import MoeLayer
from .expert_stats import ExpertStats
from .rule import (
    Rule,
    check_count,
    check_factors,
    leave_out,
    leave_out_of_token,
    ranks,
    restore_sum,
)

# Halvings of the interval in which a layer's tau lies.
BISECTIONS = 30


@dataclass
class TopK(Rule):
    """Each token keeps its first `count` experts, whatever the batch.

    As the model itself would with a smaller top-k: where its weights have a fixed sum, those that remain are scaled to
    it. Not `scaled`, they stay as they are, and what is left out is simply missing.
    """

    count: int
    scaled: bool = True
    name = "top_k"

    @property
    def setting(self) -> str:
        return f"k={self.count}" + ("" if self.scaled else " unscaled")

    def bind(self, layers: list[MoeLayer]) -> None:
        check_count(self.name, self.count, layers)

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        decision = leave_out_of_token(routing, ranks(routing.weights) < self.count)
        return restore_sum(layer, routing, decision) if self.scaled else decision


@dataclass
class NAEE(Rule):
    """Dynamic skipping for top-2 models (arXiv 2402.14800): drop a token's second expert if g2 < beta × g1.

    beta is a quantile of g2 / g1 in the layer, the median in the paper. The first expert's weight is scaled to the sum
    of both where the model's weights have a fixed sum.
    """

    quantile: float
    stats: ExpertStats = field(repr=False)
    name = "naee"

    @property
    def setting(self) -> str:
        return f"quantile={self.quantile:g}"

    def bind(self, layers: list[MoeLayer]) -> None:
        """Read each layer's beta.

        Raises:
            OptionError: the model does not give each token two experts, or the statistics are of another one.
        """
        for layer in layers:
            if layer.top_k != 2:
                raise OptionError(
                    f"naee skips the second of two experts, layer {layer.name} gives each token {layer.top_k}: leave it out for this model"
                )
        self.stats.check(layers)
        betas = torch.quantile(self.stats.ratios, self.quantile, dim=1)
        self.betas = {layer.index: betas[layer.index].to(layer.device) for layer in layers}

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        weights = routing.weights.float()
        enough = weights >= self.betas[layer.index] * weights.amax(-1, keepdim=True)  # the first is: beta is 1 at most
        return restore_sum(layer, routing, leave_out_of_token(routing, enough))


@dataclass
class Contribution(Rule):
    """Each token keeps the experts that bring 1 - tau of its sum of weight × the expert's mean output norm.

    The fewest, largest first. The others are dropped, and the remaining weights stay as they are. `tau` is one for all
    layers; or each layer has its own, with which its tokens keep `kept` experts on average (over the tokens of the
    statistics), found by bisection.
    """

    stats: ExpertStats = field(repr=False)
    tau: float | None = None
    kept: float | None = None
    name = "contribution"

    @property
    def setting(self) -> str:
        return f"tau={self.tau:g}" if self.kept is None else f"kept={self.kept:.3g}"

    def bind(self, layers: list[MoeLayer]) -> None:
        self.stats.check(layers)
        self.norms = {layer.index: self.stats.norms[layer.index].to(layer.device) for layer in layers}
        self.taus = {layer.index: self._tau(layer.index) for layer in layers}

    def _tau(self, layer: int) -> float:
        if self.kept is None:
            assert self.tau is not None
            return self.tau
        norms = self.stats.norms[layer]
        ordered = (self.stats.weights[layer] * norms[self.stats.indices[layer]]).sort(dim=-1, descending=True).values
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            fewer = float(_needed(ordered, middle).sum(-1).float().mean()) <= self.kept
            low, high = (low, middle) if fewer else (middle, high)
        return high

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        parts = routing.weights.float() * self.norms[layer.index][routing.indices.long()]
        ordered, order = parts.sort(dim=-1, descending=True, stable=True)
        needed = _needed(ordered, self.taus[layer.index])
        return leave_out_of_token(routing, needed.gather(-1, order.argsort(-1)))


def _needed(ordered: Tensor, tau: float) -> Tensor:
    """Which of each token's contributions `(..., top_k)`, largest first, it needs to have 1 - tau of their sum."""
    before = ordered.cumsum(-1) - ordered
    needed = before < (1.0 - tau) * ordered.sum(-1, keepdim=True)
    return needed | (torch.arange(ordered.shape[-1], device=ordered.device) == 0)  # also of a token without any weight


@dataclass
class ACE(Rule):
    """Assignments by what an expert makes of its input (ACE, arXiv 2609.05228), read from a summary of the paper.

    An assignment counts weight × the expert's gain, which needs no calibration text, see `expert_gains`. A token's first
    expert stays; of the others those are left out that lie below a quantile of the layer, here over the tokens of the
    statistics. The remaining weights are scaled to their sum where the model's rule normalises.

    Attributes:
        share: of the assignments behind a token's first that are left out.
        gains: `(layers, experts)`.
    """

    share: float
    gains: Tensor = field(repr=False)
    stats: ExpertStats = field(repr=False)
    name = "ace"

    @property
    def setting(self) -> str:
        return f"share={self.share:g}"

    def bind(self, layers: list[MoeLayer]) -> None:
        self.stats.check(layers)
        check_factors(self.name, self.gains, layers)
        self.bound: dict[int, tuple[Tensor, float]] = {}
        for layer in layers:
            gains = self.gains[layer.index]
            weights, indices = self.stats.weights[layer.index], self.stats.indices[layer.index]
            behind = ranks(weights) > 0
            scores = (weights / weights.sum(-1, keepdim=True) * gains[indices])[behind]
            self.bound[layer.index] = gains.to(layer.device), float(scores.quantile(self.share))

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        gains, least = self.bound[layer.index]
        weights = routing.weights.float()
        scores = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20) * gains[routing.indices.long()]
        kept = (scores >= least) | (ranks(routing.weights) == 0)
        return restore_sum(layer, routing, leave_out_of_token(routing, kept))


@torch.no_grad()
def expert_gains(layers: list[MoeLayer]) -> Tensor:
    """How much each expert makes of its input, from weights alone `(layers, experts)`: the larger of two gains.

    One is the product of its matrices' spectral norms; the other its output's norm for its row of the router, less the
    mean of all rows, a prototype of what is routed to it. The summary does not say how they are made comparable, nor how
    long the prototype is: each is divided by its mean over the layer, and the length is the root of the width, as behind
    a norm.

    Raises:
        OptionError: a layer's router has no row as wide as the experts' input for each expert.
    """
    found = []
    for layer in layers:
        shape = (layer.num_experts, layer.hidden_size)
        rows = next((p for p in layer.router.parameters() if tuple(p.shape) == shape), None)
        if rows is None:
            raise OptionError(
                f"ace runs experts on rows of their router, layer {layer.name} has none of width {layer.hidden_size}: leave it out for this model"
            )
        spectral = torch.stack([spectral_norms(p) for p in layer.experts.parameters() if p.ndim == 3]).prod(0)
        apart = rows.float() - rows.float().mean(0)
        apart = (apart / apart.norm(dim=1, keepdim=True).clamp_min(1e-20) * layer.hidden_size**0.5).to(layer.dtype)
        outputs = [layer.expert_output(e, apart[e : e + 1].to(layer.device)) for e in range(layer.num_experts)]
        prototype = torch.cat(outputs).float().norm(dim=1)
        found.append(torch.maximum(spectral / spectral.mean(), prototype / prototype.mean()).cpu())
    return torch.stack(found)


def spectral_norms(matrices: Tensor, rounds: int = 30) -> Tensor:
    """Largest singular value of each matrix `(experts, rows, columns)`, by power iteration."""
    found = []
    for matrix in matrices:
        own = matrix.float()
        vector = torch.ones(own.shape[1], device=own.device) + 0.1 * torch.arange(own.shape[1], device=own.device).sin()
        for _ in range(rounds):
            vector = own.T @ (own @ vector)
            vector = vector / vector.norm().clamp_min(1e-20)
        found.append((own @ vector).norm())
    return torch.stack(found)


@dataclass
class MoDES(Rule):
    """Weights times their layer's importance against one threshold (MoDES, arXiv 2511.15690), for text alone.

    An assignment whose weight × importance is below `threshold` is left out; a token's first expert stays, and remaining
    weights are scaled to their sum where the model's rule normalises. A layer's importance is the KL of a model without its
    routed experts; here as it follows from the layer's sensitivity, see `without_layers`. The paper's thresholds differ by
    kind of token, image or text.

    Attributes:
        importance: of each layer `(layers,)`.
    """

    threshold: float
    importance: Tensor = field(repr=False)
    name = "modes"

    @property
    def setting(self) -> str:
        return f"tau={self.threshold:.3g}"

    def bind(self, layers: list[MoeLayer]) -> None:
        check_factors(self.name, self.importance.unsqueeze(-1).expand(-1, layers[0].num_experts), layers)
        self.least = (self.threshold / self.importance).tolist()

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        kept = (routing.weights >= self.least[layer.index]) | (ranks(routing.weights) == 0)
        return restore_sum(layer, routing, leave_out_of_token(routing, kept))


@dataclass
class Alloc(Rule):
    """A budget of activations by layer, then by token (Alloc-MoE, arXiv 2604.08133), read from a summary of the paper.

    A layer with budget K keeps the K × n assignments of largest weight of a batch of n tokens, whichever tokens they are
    of; remaining weights are scaled to each token's sum where the model's rule normalises. Budgets are those that lose
    least in all, found by dynamic programming (`allocate`) from what each layer loses with each number of experts per token:
    the paper measures that by perplexity, one layer at a time; here it is the mean weight² × squared output norm of what
    is left out, over the tokens of the statistics, × the layer's sensitivity.

    Attributes:
        budgets: experts per token of each layer, in their order.
    """

    budgets: tuple[int, ...]
    name = "alloc"

    @property
    def setting(self) -> str:
        return f"K={sum(self.budgets) / len(self.budgets):.3g}"

    def bind(self, layers: list[MoeLayer]) -> None:
        if len(self.budgets) != len(layers):
            raise OptionError(f"alloc has budgets for {len(self.budgets)} layers, the model has {len(layers)}")
        for layer in layers:
            check_count(self.name, self.budgets[layer.index], [layer])

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        weights = routing.weights.float().masked_fill(~routing.active.unsqueeze(-1), -1.0)  # behind all others
        count = routing.active.sum(-1, keepdim=True) * self.budgets[layer.index]
        kept = (ranks(weights.flatten(-2)) < count).view_as(weights)
        kept = kept | ~routing.active.unsqueeze(-1)
        best = routing.indices.flatten(-2).gather(-1, weights.flatten(-2).argmax(-1, keepdim=True)).unsqueeze(-1)
        return restore_sum(layer, routing, leave_out(routing, kept, best))


def without_layers(stats: ExpertStats, sensitivities: Tensor) -> Tensor:
    """What each layer loses, in nats, if it is left out `(layers,)`."""
    return _energy(stats).sum(-1).mean(1) * sensitivities


def _energy(stats: ExpertStats) -> Tensor:
    """weight² × mean squared output norm of each assignment of the statistics `(layers, tokens, top_k)`."""
    of_all = stats.squares.unsqueeze(1).expand(-1, stats.weights.shape[1], -1)
    return stats.weights.square() * of_all.gather(-1, stats.indices)


def layer_losses(stats: ExpertStats, sensitivities: Tensor) -> Tensor:
    """What each layer loses, in nats, if each token keeps its first 1, 2, …, top_k experts `(layers, top_k)`."""
    energy = _energy(stats)
    order = stats.weights.argsort(dim=-1, descending=True, stable=True)
    of_rank = energy.gather(-1, order).mean(1)
    return (of_rank.sum(-1, keepdim=True) - of_rank.cumsum(-1)) * sensitivities.unsqueeze(-1)


def allocate(losses: Tensor) -> dict[int, tuple[int, ...]]:
    """Numbers of experts per token by layer that lose least together, for every total, by dynamic programming.

    Args:
        losses: of each layer with 1, 2, … experts `(layers, top_k)`.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for row in losses.tolist():
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for total, (lost, chosen) in best.items():
            for count, loss in enumerate(row, start=1):
                known = longer.get(total + count)
                if known is None or lost + loss < known[0]:
                    longer[total + count] = lost + loss, (*chosen, count)
        best = longer
    return {total: chosen for total, (_, chosen) in best.items()}
