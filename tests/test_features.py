"""Features and scorers: finite whatever the router says, and meaning what they are called."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lynx_learn.moe.routing_rules import Activation, ScoringRule
from lynx_learn.selector.features import NAMES, assignment_features
from lynx_learn.selector.scorers import SCORERS

extremes = st.one_of(st.sampled_from([-1e4, 1e4, 0.0, 1.0]), st.floats(-1e4, 1e4, width=32))


@st.composite
def routers(draw: st.DrawFn) -> tuple[list[list[float]], int]:
    """Logits of some tokens, ties and extremes among them, and a top_k up to the number of experts."""
    experts = draw(st.integers(2, 9))
    row = st.one_of(st.lists(extremes, min_size=experts, max_size=experts), extremes.map(lambda v: [v] * experts))
    return draw(st.lists(row, min_size=1, max_size=4)), draw(st.integers(1, experts))


@settings(max_examples=150, deadline=None)
@given(router=routers(), activation=st.sampled_from(["softmax", "sigmoid", "topk_softmax"]), normalise=st.booleans())
def test_finite_for_any_finite_logits(
    router: tuple[list[list[float]], int], activation: Activation, normalise: bool
) -> None:
    rows, top_k = router
    logits = torch.tensor(rows)
    indices, weights = ScoringRule(activation, top_k, normalise).route(logits)
    assert weights.isfinite().all()
    features = assignment_features(logits, indices, weights)
    assert features.shape == (len(rows), top_k, len(NAMES))
    assert features.isfinite().all()


def test_values_by_hand() -> None:
    # probabilities 1/2, 1/4, 1/8, 1/8; the two best chosen and normalised to 2/3 and 1/3
    logits = torch.tensor([[0.5, 0.125, 0.25, 0.125]]).log()
    found = assignment_features(logits, torch.tensor([[2, 0]]), torch.tensor([[1 / 3, 2 / 3]]))[0]
    mean, log2 = -2.25 * math.log(2), math.log(2)
    spread = log2 * math.sqrt(((2.25 - 1) ** 2 + (2.25 - 2) ** 2 + 2 * (2.25 - 3) ** 2) / 3)
    wanted = {
        "log_weight": [math.log(1 / 3), math.log(2 / 3)],
        "weight_share": [1 / 3, 2 / 3],
        "rank": [0.5, 0.0],
        "logit_below_best": [-log2, 0.0],
        "logit_standardised": [(-2 * log2 - mean) / spread, (-log2 - mean) / spread],
        "logit_above_first_unchosen": [log2, 2 * log2],
        "log_probability": [-2 * log2, -log2],
        "entropy": [1.75 * log2] * 2,
        "logit_spread": [spread] * 2,
        "best_weight_share": [2 / 3] * 2,
        "last_weight_share": [1 / 3] * 2,
        "last_logit_above_first_unchosen": [log2] * 2,
        "log_partition": [0.0] * 2,
    }
    assert set(wanted) == set(NAMES)
    for at, name in enumerate(NAMES):
        assert found[:, at].tolist() == pytest.approx(wanted[name], abs=1e-6), name


def random_routing(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    logits = 2 * torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
    return (logits, *ScoringRule("softmax", 3, normalise=True).route(logits))


def test_order_of_assignments_and_shape_of_the_batch_do_not_matter() -> None:
    logits, indices, weights = random_routing()
    features = assignment_features(logits, indices, weights)
    turned = assignment_features(logits, indices.flip(1), weights.flip(1))
    torch.testing.assert_close(turned, features.flip(1))
    grouped = assignment_features(*(part.unflatten(0, (2, 3)) for part in (logits, indices, weights)))
    torch.testing.assert_close(grouped.flatten(0, 1), features)


def test_only_the_partition_sees_a_shift_of_all_logits() -> None:
    logits, indices, weights = random_routing()
    before, after = assignment_features(logits, indices, weights), assignment_features(logits + 3, indices, weights)
    moved = [name for at, name in enumerate(NAMES) if not torch.allclose(before[..., at], after[..., at], atol=1e-4)]
    assert moved == ["log_partition"]


@pytest.mark.parametrize("kind", SCORERS)
def test_untrained_scorers_are_the_formula(kind: str) -> None:
    """Cost = weight² × the expert's mean squared residual."""
    logits, indices, weights = random_routing()
    residual = torch.rand(8, generator=torch.Generator().manual_seed(1)) + 0.1
    scorer = SCORERS[kind](8, 5)
    scorer.log_residual.copy_(residual.log())
    hidden = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    cost = scorer(assignment_features(logits, indices, weights), indices, hidden).exp()
    torch.testing.assert_close(cost, weights.square() * residual[indices])


@pytest.mark.parametrize("kind", [kind for kind in SCORERS if kind != "formula"])
def test_scorers_can_learn_what_the_formula_misses(kind: str) -> None:
    """A target with a factor per expert, one by the router's entropy, and for `mlp` one by the hidden state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits, hidden = 2 * torch.randn(400, 8), torch.randn(400, 5)
        indices, weights = ScoringRule("softmax", 3, normalise=True).route(logits)
        features = assignment_features(logits, indices, weights)
        scorer = SCORERS[kind](8, 5)
        scorer.mean.copy_(features.mean((0, 1)))
        scorer.spread.copy_(features.std((0, 1)))
        extra = torch.linspace(-1, 1, 8)[indices] + features[..., NAMES.index("entropy")]
        if kind == "mlp":
            extra = extra + hidden[:, :1]
        target = scorer(features, indices, hidden).detach() + extra
        optimiser = torch.optim.Adam(scorer.parameters(), lr=0.03)
        for _ in range(200):
            loss = (scorer(features, indices, hidden) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert float(loss.detach()) < 0.02 * float(extra.var())
