"""Low-rank fits against the exact solution, brute force and scikit-learn."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor

from lynx_learn.fit import low_rank
from lynx_learn.fit.low_rank import PENALTIES, Rows, fit_surrogate, fit_surrogates
from lynx_learn.selector.surrogates import Surrogates

HIDDEN = 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(count: int, seed: int, hidden: int = HIDDEN) -> Rows:
    """Inputs off the origin, outputs that no affine map gives, and uneven weights."""
    x = normal(count, hidden, seed=seed) @ normal(hidden, hidden, seed=1) + 0.5
    y = (x @ normal(hidden, hidden, seed=2)).tanh() + 0.3 * x.roll(1, 1) + 1.0
    return Rows(x, y, normal(count, seed=seed + 100).square())


def fitted(fit: Rows, check: Rows, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    found = fit_surrogate(fit, check, rank)
    return found.down, found.up, found.constant(rank)


def exact(fit: Rows, penalty: float) -> tuple[Tensor, Tensor]:
    """What each direction explains, falling, and the directions, from the full matrices."""
    share = fit.weights / fit.weights.sum()
    root = fit.weights.sqrt().unsqueeze(1)
    x, y = (fit.x - share @ fit.x) * root, (fit.y - share @ fit.y) * root
    gram = x.T @ x
    ridged = gram + penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    energy, vectors = torch.linalg.eigh(y.T @ x @ torch.linalg.solve(ridged, x.T @ y))
    return energy.flip(0).clamp_min(0), vectors.T.flip(0)


@given(
    st.integers(4, 60), st.integers(8, 40), st.integers(1, 6), st.sampled_from(PENALTIES), st.booleans(), st.booleans()
)
@settings(max_examples=60)
def test_as_much_is_explained_as_by_the_exact_solution(
    count: int, hidden: int, rank: int, penalty: float, single: bool, wide: bool
) -> None:
    """With fewer tokens than numbers and with more, decomposed and iterated, to 1e-4."""
    fit = tokens(count, 3, hidden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank, "PENALTIES", (penalty,))
        patch.setattr(low_rank, "NARROW", 0 if wide else hidden)
        found = fit_surrogate(Rows(*(part.float() for part in fit)) if single else fit, fit, rank, 2 * rank)
    energy, vectors = exact(fit, penalty)
    if not found.up.any():  # where the mean alone is as good, nothing is taken
        return
    for part in (rank, 2 * rank):
        wanted = float(energy[:part].sum())
        assert float(found.gains[:part].double().sum()) == pytest.approx(wanted, rel=1e-4)
        # What the directions explain is also so when it is worked out from the full matrix.
        up = found.up[:part].double()
        matrix = (vectors.T * energy) @ vectors
        assert float((up @ matrix @ up.T).trace()) == pytest.approx(wanted, rel=1e-4)


@given(st.integers(6, 60), st.integers(8, 40), st.integers(1, 4), st.sampled_from([0, 512]), st.booleans())
@settings(max_examples=40)
def test_fits_on_parts_are_those_of_the_parts_alone(
    count: int, hidden: int, rank: int, narrow: int, mixed: bool
) -> None:
    """Of all of an expert's tokens and of both halves of them, by tokens and by width, checked on others.

    Solutions may turn where two directions explain as much as one another, so it is errors and gains that must agree.
    """
    rows = tokens(count, 3, hidden)
    if not narrow:  # with products in float32
        rows = Rows(*(whole.float() for whole in rows))
    number = torch.arange(count) if not mixed else torch.randperm(count, generator=torch.Generator().manual_seed(count))
    check = number % 5 == 4
    parts = [~check, ~check & (number % 2 == 0), ~check & (number % 2 == 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank, "NARROW", narrow)
        together = fit_surrogates(rows, parts, check, rank, 2 * rank)
        for part, found in zip(parts, together, strict=True):
            fit, others = (Rows(*(whole[mask] for whole in rows)) for mask in (part, check))
            alone = fit_surrogate(fit, others, rank, 2 * rank)
            torch.testing.assert_close(found.gains, alone.gains, rtol=1e-3, atol=1e-3 * float(alone.gains.sum()) + 1e-9)
            error, expected = (
                others.error(own.down[:rank], own.up[:rank], own.constant(rank)) for own in (found, alone)
            )
            assert error == pytest.approx(expected, rel=1e-3)


def squared_error(rows: Rows, down: Tensor, up: Tensor, constant: Tensor) -> float:
    total = 0.0
    for row, target, weight in zip(*rows, strict=True):
        answer = up.double().T @ (down.double() @ row) + constant.double()
        total += float(weight * (answer - target).square().sum())
    return total


@pytest.mark.parametrize("rank", [1, 3])
def test_recovers_a_low_rank_affine_map(rank: int) -> None:
    left, right, shift = normal(HIDDEN, rank, seed=3), normal(rank, HIDDEN, seed=4), normal(HIDDEN, seed=5)

    def sample(seed: int) -> Rows:
        x = normal(400, HIDDEN, seed=seed) + 1.0
        return Rows(x, x @ left @ right + shift, normal(400, seed=seed + 50).square())

    down, up, constant = fitted(sample(6), sample(7), rank)
    assert down.shape == up.shape == (rank, HIDDEN)
    assert constant.shape == (HIDDEN,)
    check = sample(8)
    off_mean = float((check.weights.unsqueeze(1) * (check.y - check.y.mean(0)).square()).sum())
    assert check.error(down, up, constant) < 1e-4 * off_mean  # what the smallest penalty costs


def test_the_error_is_the_sum_over_tokens() -> None:
    fit, check = tokens(200, 10), tokens(150, 11)
    found = fitted(fit, check, 4)
    assert check.error(*found) == pytest.approx(squared_error(check, *found), rel=1e-8)


def test_higher_rank_never_fits_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = tokens(300, 12)
    for penalty in PENALTIES:
        monkeypatch.setattr(low_rank, "PENALTIES", (penalty,))
        errors = [fit.error(*fitted(fit, fit, rank)) for rank in range(1, HIDDEN + 1)]
        assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
        assert errors[-1] < errors[0]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("count", [300, 9])
def test_full_rank_is_scikit_learns_ridge(count: int, penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "PENALTIES", (penalty,))
    fit = x, y, weights = tokens(count, 13)
    down, up, constant = fitted(fit, fit, HIDDEN)
    centred = x - (weights @ x) / weights.sum()
    scale = float((weights @ centred.square()).mean())
    oracle = Ridge(alpha=penalty * scale).fit(x.numpy(), y.numpy(), sample_weight=weights.numpy())
    torch.testing.assert_close((down.T @ up).T.double(), torch.tensor(oracle.coef_), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(constant.double(), torch.tensor(oracle.intercept_), rtol=1e-3, atol=1e-4)


def test_the_penalty_is_chosen_on_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, check = tokens(16, 14), tokens(300, 15)

    def error(penalties: tuple[float, ...]) -> float:
        monkeypatch.setattr(low_rank, "PENALTIES", penalties)
        return check.error(*fitted(fit, check, 6))

    each = [error((penalty,)) for penalty in PENALTIES]
    assert error(PENALTIES) == pytest.approx(min(each), rel=1e-5)
    assert min(each) < 0.9 * each[0], "16 tokens for 12 inputs must want a larger penalty than the smallest"


def test_an_expert_without_tokens_gives_zeros() -> None:
    for check in (tokens(0, 16), tokens(50, 16)):
        assert all(not part.any() for part in fitted(tokens(0, 16), check, 3))


def test_one_token_gives_its_output() -> None:
    one = tokens(1, 17)
    down, up, constant = fitted(one, one, 3)
    torch.testing.assert_close((one.x @ down.double().T @ up.double() + constant.double()), one.y, rtol=1e-5, atol=1e-5)


def test_rank_zero_is_the_mean_output() -> None:
    fit = tokens(60, 18)
    down, up, constant = fitted(fit, fit, 0)
    assert down.shape == up.shape == (0, HIDDEN)
    torch.testing.assert_close(constant.double(), (fit.weights @ fit.y) / fit.weights.sum(), rtol=1e-6, atol=1e-6)


def test_uneven_ranks_explain_more_than_even_ones() -> None:
    """Two experts, one of which is a constant."""
    hard = tokens(300, 30)
    easy = hard._replace(y=torch.ones_like(hard.y))
    module = Surrogates(2, HIDDEN, 2)
    module.put([fit_surrogate(hard, hard, 2, 4), fit_surrogate(easy, easy, 2, 4)])
    assert module.ranks.tolist() == [4, 0]
    assert hard.error(*module.of(0)) < hard.error(*fitted(hard, hard, 2))
    torch.testing.assert_close(module.output(1, hard.x.float()), torch.ones_like(hard.y).float())


def test_directions_that_explain_nothing_may_be_left_out() -> None:
    """Four tokens give three directions."""
    few, many = tokens(4, 31), tokens(300, 32)
    fits = [fit_surrogate(rows, many, 4, 6) for rows in (few, many)]
    assert fits[0].gains.count_nonzero() == 3
    whole, trimmed = Surrogates(2, HIDDEN, 4), Surrogates(2, HIDDEN, 4)
    for part in trimmed.parameters():
        part.data.fill_(1.0)
    whole.put(fits)
    trimmed.put(
        [fit._replace(down=fit.down[:count], up=fit.up[:count]) for fit, count in zip(fits, (3, 6), strict=True)]
    )
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), trimmed.parameters(), strict=True))
    assert torch.equal(whole.owner, trimmed.owner)
    short = fits[0]._replace(down=fits[0].down[:3], up=fits[0].up[:3])
    for rank in (2, 4):
        torch.testing.assert_close(short.output(many.x, rank), fits[0].output(many.x, rank))
