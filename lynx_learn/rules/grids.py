"""Every method that is measured, with the settings that it is swept over."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import OptionError
from ..moe.decision import Policy
from ..moe.families import MoeLayer
from ..selector.selector import LynxSelector, ThresholdPolicy
from .corrections import K1K2, LDA
from .expert_stats import ExpertStats
from .keep_sets import GateMax, GateNorm, GateSquared, KeepSet, Layered, Lynx, Popularity, Random, Vote, XShare
from .oracle import Oracle
from .per_token import ACE, NAEE, Alloc, Contribution, MoDES, TopK, allocate, expert_gains, layer_losses, without_layers
from .substitutes import OEA, SERE, ExFold, SiftMoE

Curves = list[list[Policy]]

# Numbers of experts to keep, as shares of what a batch loads on average, gentle first; some batches load more.
KEPT = (1.06, 1.0, 0.96, 0.92, 0.87, 0.82, 0.76, 0.7, 0.64, 0.57, 0.5, 0.42, 0.33, 0.25)
# Lynx: bins per nat of logit, and how many.
LYNX = ((2.0, 5), (4.0, 5))
# Quantiles of g2 / g1 below which NAEE drops the second expert.
NAEE_QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
# Shares of a token's contributions that are left out.
CONTRIBUTION_TAUS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8)
# Experts that a token keeps on average, as shares of its top-k, where layers share a budget or have a tau of their own.
KEPT_PER_TOKEN = (0.98, 0.96, 0.93, 0.9, 0.87, 0.83, 0.79, 0.74, 0.69, 0.63, 0.56, 0.48, 0.4, 0.3)
# Shares of the assignments behind a token's first that ACE leaves out.
ACE_SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Thresholds of MoDES, as multiples of a token's mean weight × the layers' mean importance.
MODES_FACTORS = tuple(2.0 ** (i / 2) for i in range(-8, 6))
# SERE's rho, as quantiles of the similarity of an expert's nearest neighbour; 0 comes after them.
SERE_QUANTILES = (0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25, 0.15, 0.05)
# SiftMoE's thresholds, as multiples of a token's mean weight.
SIFT_FACTORS = tuple(2.0 ** (i / 4) for i in range(-8, 6))
# Thresholds of the learned method, as multiples of so many nats for a batch of one; they grow with its size's root.
TAU = 0.01
TAU_FACTORS = tuple(2.0**i for i in range(-9, 5))


@dataclass(frozen=True)
class Setup:
    """What the settings of a method depend on."""

    method: str
    layers: list[MoeLayer]
    size: int
    given_stats: ExpertStats | None
    given_selector: LynxSelector | None
    seed: int

    @property
    def stats(self) -> ExpertStats:
        if self.given_stats is None:
            raise OptionError(
                f"method {self.method} needs statistics of the model's experts: give a trace with --trace"
            )
        return self.given_stats

    @property
    def selector(self) -> LynxSelector:
        if self.given_selector is None:
            raise OptionError(f"method {self.method} needs a selector: give one with --selector")
        return self.given_selector

    @property
    def sensitivities(self) -> Tensor:
        """Of each layer `(layers,)`, in nats of KL per unit of squared error in its output; see `Layered`."""
        return torch.stack([own.sensitivity for own in self.selector.layers]).float().cpu()  # type: ignore[misc]

    @property
    def experts(self) -> int:
        return min(layer.num_experts for layer in self.layers)

    @property
    def top_k(self) -> int:
        return max(layer.top_k for layer in self.layers)

    @property
    def loaded(self) -> float:
        """Experts that a batch loads if all are equally likely."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** self.size)

    @property
    def fewer(self) -> list[int]:
        """Numbers of experts per token below the model's own, descending."""
        self.check_several()
        return list(range(min(layer.top_k for layer in self.layers) - 1, 0, -1))

    def check_several(self) -> None:
        if any(layer.top_k < 2 for layer in self.layers):
            raise OptionError(
                f"method {self.method} tells a token's experts apart, this model gives each token one: leave it out for this model"
            )

    def keep(self, rule: Callable[[int], KeepSet], loaded: float | None = None) -> list[Policy]:
        """A rule with shares of the loaded experts, each number once and none below a token's top-k."""
        wanted = (round(share * (self.loaded if loaded is None else loaded)) for share in KEPT)
        return [rule(m) for m in dict.fromkeys(max(self.top_k, min(m, self.experts - 1)) for m in wanted)]


def curves(
    method: str,
    layers: list[MoeLayer],
    size: int,
    stats: ExpertStats | None,
    selector: LynxSelector | None,
    seed: int = 0,
) -> Curves:
    """A method's policies, as curves: each is its main parameter swept, gentle first, at one choice of the others.

    Args:
        method: a name in METHODS.
        layers: of the model to measure.
        size: decode batch size.
        stats: of the model's experts, which some rules need.
        selector: of the model, which `learned`, `formula` and `oracle` need.
        seed: of `random`.

    Raises:
        OptionError: the method is unknown, needs what is not given, or does not apply to the model.
    """
    if method not in METHODS:
        raise OptionError(f"method {method!r} is unknown: expected one of {', '.join(METHODS)}")
    return METHODS[method](Setup(method, layers, size, stats, selector, seed))


def _top_k(setup: Setup) -> Curves:
    return [[TopK(count, scaled) for count in setup.fewer] for scaled in (True, False)]


def _oea(setup: Setup) -> Curves:
    return [[OEA(count) for count in setup.fewer]]


def _lynx(setup: Setup) -> Curves:
    return [setup.keep(lambda m, a=alpha, b=beta: Lynx(m, a, b)) for alpha, beta in LYNX]  # type: ignore[misc]


def _vote(setup: Setup) -> Curves:
    k = setup.top_k
    voted = dict.fromkeys((k, max(3 * k // 4, 1)))
    return [setup.keep(lambda m, k=k: Vote(m, k)) for k in voted]  # type: ignore[misc]


def _gate_sum(setup: Setup) -> Curves:
    return [setup.keep(lambda m: XShare(m, warm_up=False)), *_one_threshold(setup)]


def _gate_sq(setup: Setup) -> Curves:
    return [setup.keep(GateSquared), setup.keep(lambda m: GateSquared(m, "drop")), *_one_threshold(setup)]


def _gate_max(setup: Setup) -> Curves:
    return [setup.keep(GateMax), setup.keep(lambda m: GateMax(m, "drop")), *_one_threshold(setup)]


def _one_threshold(setup: Setup) -> Curves:
    """A rule's score with one threshold over all layers, made comparable by what a layer's squared weights cost.

    That is the layer's sensitivity × the mean squared output norm of its experts; weights not squared have its root.
    """
    if setup.given_selector is None or setup.given_stats is None:
        return []
    power = 1.0 if setup.method == "gate_sq" else 0.5
    factors = (setup.sensitivities * setup.stats.squares.mean(-1)) ** power
    by_expert = factors.unsqueeze(-1).expand(-1, setup.experts)
    return [[Layered(setup.method, setup.method, tau**power, by_expert) for tau in _thresholds(setup)]]


def _layered(setup: Setup) -> Curves:
    factors = setup.sensitivities.unsqueeze(-1) * setup.stats.squares
    return [[Layered("layered", "gate_sq", tau, factors) for tau in _thresholds(setup)]]


def _sere(setup: Setup) -> Curves:
    stats, fewer = setup.stats, setup.fewer
    others = stats.similarities.masked_fill(torch.eye(setup.experts, dtype=torch.bool), 0.0)
    levels = torch.quantile(others.amax(-1).flatten(), torch.tensor(SERE_QUANTILES)).tolist()
    k = fewer[0] + 1
    return [
        [SERE(count, rho, stats) for rho in dict.fromkeys([*(round(level, 4) for level in levels), 0.0])]
        for count in fewer
        if count in (k // 2, 2, 1)
    ]


def _siftmoe(setup: Setup) -> Curves:
    weight = setup.layers[0].rule.scale / setup.top_k
    found = [[SiftMoE(factor * weight, setup.stats) for factor in SIFT_FACTORS]]
    if setup.given_selector is not None:
        roots = setup.sensitivities.sqrt()
        found.append([SiftMoE((TAU * factor) ** 0.5, setup.stats, roots) for factor in TAU_FACTORS])
    return found  # type: ignore[return-value]


def _exfold(setup: Setup) -> Curves:
    stats = setup.stats
    found = [[ExFold(pool, stats) for pool in setup.keep(lambda m: GateNorm(m, stats))]]  # type: ignore[arg-type]
    if setup.given_selector is not None:
        found.append([ExFold(pool, stats) for pool in _layered(setup)[0]])  # type: ignore[arg-type]
    return found  # type: ignore[return-value]


def _naee(setup: Setup) -> Curves:
    found = [NAEE(quantile, setup.stats) for quantile in NAEE_QUANTILES]
    found[0].bind(setup.layers)
    return [list(found)]


def _contribution(setup: Setup) -> Curves:
    setup.check_several()
    means = [share * setup.top_k for share in KEPT_PER_TOKEN]
    return [
        [Contribution(setup.stats, tau=tau) for tau in CONTRIBUTION_TAUS],
        [Contribution(setup.stats, kept=kept) for kept in means if kept > 1],
    ]


def _ace(setup: Setup) -> Curves:
    setup.check_several()
    stats, gains = setup.stats, expert_gains(setup.layers)
    return [[ACE(share, gains, stats) for share in ACE_SHARES]]


def _modes(setup: Setup) -> Curves:
    setup.check_several()
    importance = without_layers(setup.stats, setup.sensitivities)
    unit = float(importance.log().mean().exp()) * setup.layers[0].rule.scale / setup.top_k
    return [[MoDES(unit * factor, importance) for factor in MODES_FACTORS]]


def _alloc(setup: Setup) -> Curves:
    setup.check_several()
    chosen = allocate(layer_losses(setup.stats, setup.sensitivities))
    totals = dict.fromkeys(round(share * max(chosen)) for share in KEPT_PER_TOKEN)
    return [[Alloc(chosen[total]) for total in totals if min(chosen) <= total < max(chosen)]]


def _k1k2(setup: Setup) -> Curves:
    """Around a smaller top-k and, where it can be had, around `layered`; without k2 = k1 and k2 = k, which `top_k` has."""
    k, found = setup.top_k, []
    K1K2(TopK(1), k).bind(setup.layers)
    for k2 in dict.fromkeys((k - 1, 3 * k // 2)):
        found.append([K1K2(TopK(count, scaled=False), k2) for count in setup.fewer if count != k2])
        if setup.given_selector is not None and setup.given_stats is not None:
            found.append([K1K2(policy, k2) for policy in _layered(setup)[0]])
    return [curve for curve in found if curve]  # type: ignore[misc]


def _lda(setup: Setup) -> Curves:
    stats, size = setup.stats, setup.size
    found: Curves = [[TopK(count) for count in setup.fewer], setup.keep(lambda m: GateSquared(m, "drop"))]
    if setup.given_selector is not None:
        found.append(_layered(setup)[0])
    return [[LDA(policy, stats, size) for policy in curve] for curve in found]


def _learned_lda(setup: Setup) -> Curves:
    stats = setup.stats
    return [[LDA(policy, stats, setup.size, "learned_lda") for policy in _learned(setup)[0]]]


def _thresholds(setup: Setup) -> list[float]:
    return [TAU * setup.size**0.5 * factor for factor in TAU_FACTORS]


def _learned(setup: Setup) -> Curves:
    return [[setup.selector.at_threshold(tau) for tau in _thresholds(setup)]]


def _formula(setup: Setup) -> Curves:
    scored = setup.selector.with_formula()
    return [[_named("formula", scored.at_threshold(tau)) for tau in _thresholds(setup)]]


def _named(name: str, policy: ThresholdPolicy) -> ThresholdPolicy:
    policy.name = name
    return policy


def _one_expert(setup: Setup) -> Curves:
    """The harshest choice, with and without surrogates in the place of all others."""
    answered, (dropped, *_) = setup.selector.at_threshold(math.inf), _layered(setup)[0]
    answered.name, answered.setting = "one_expert", "answered"
    return [[answered], [replace(dropped, name="one_expert", threshold=math.inf)]]  # type: ignore[type-var]


def _oracle(setup: Setup) -> Curves:
    return [[Oracle(setup.selector, tau) for tau in _thresholds(setup)]]


METHODS: dict[str, Callable[[Setup], Curves]] = {
    "random": lambda setup: [setup.keep(lambda m: Random(m, setup.seed), setup.experts)],
    "top_k": _top_k,
    "popularity": lambda setup: [setup.keep(Popularity)],
    "lynx": _lynx,
    "xshare": lambda setup: [setup.keep(XShare)],
    "gate_sum": _gate_sum,
    "oea": _oea,
    "sere": _sere,
    "siftmoe": _siftmoe,
    "exfold": _exfold,
    "naee": _naee,
    "contribution": _contribution,
    "ace": _ace,
    "modes": _modes,
    "alloc": _alloc,
    "vote": _vote,
    "gate_sq": _gate_sq,
    "gate_max": _gate_max,
    "layered": _layered,
    "k1k2": _k1k2,
    "lda": _lda,
    "learned_lda": _learned_lda,
    "learned": _learned,
    "formula": _formula,
    "oracle": _oracle,
    "one_expert": _one_expert,
}
