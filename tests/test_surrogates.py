"""Closed-form fits against brute force and against scikit-learn."""

import math
from itertools import pairwise

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from lynx_learn.selector import surrogates
from lynx_learn.selector.surrogates import Moments, Surrogates, choose_ranks, fit_surrogate, rank_for

HIDDEN = 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x: Tensor, y: Tensor, weights: Tensor) -> Moments:
    """Summed over uneven chunks, as from shards."""
    total = Moments.empty(x.shape[1])
    for part in torch.arange(len(x)).split(37):
        total.add(x[part], y[part], weights[part])
    return total


def tokens(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs off the origin, outputs that no affine map gives, and uneven weights."""
    x = normal(count, HIDDEN, seed=seed) @ normal(HIDDEN, HIDDEN, seed=1) + 0.5
    y = (x @ normal(HIDDEN, HIDDEN, seed=2)).tanh() + 0.3 * x.roll(1, 1) + 1.0
    return x, y, normal(count, seed=seed + 100).square()


def fitted(fit: Moments, check: Moments, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    found = fit_surrogate(fit, check, rank)
    return found.down, found.up, found.constant(rank)


def squared_error(x: Tensor, y: Tensor, weights: Tensor, down: Tensor, up: Tensor, constant: Tensor) -> float:
    total = 0.0
    for row, target, weight in zip(x, y, weights, strict=True):
        answer = up.double().T @ (down.double() @ row) + constant.double()
        total += float(weight * (answer - target).square().sum())
    return total


@pytest.mark.parametrize("rank", [1, 3])
def test_recovers_a_low_rank_affine_map(rank: int) -> None:
    left, right, shift = normal(HIDDEN, rank, seed=3), normal(rank, HIDDEN, seed=4), normal(HIDDEN, seed=5)

    def sample(seed: int) -> tuple[Moments, Tensor, Tensor]:
        x = normal(400, HIDDEN, seed=seed) + 1.0
        y = x @ left @ right + shift
        return moments(x, y, normal(400, seed=seed + 50).square()), x, y

    down, up, constant = fitted(sample(6)[0], sample(7)[0], rank)
    assert down.shape == up.shape == (rank, HIDDEN)
    assert constant.shape == (HIDDEN,)
    check, x, y = sample(8)
    off_mean = float((y - y.mean(0)).square().sum())
    answers = x @ down.double().T @ up.double() + constant.double()
    assert float((answers - y).square().sum()) < 1e-4 * off_mean  # what the smallest penalty costs
    assert check.error(down.double().T @ up.double(), constant.double()) < 1e-4 * check.yy


def test_error_of_moments_is_the_sum_over_tokens() -> None:
    fit, (x, y, weights) = tokens(200, 10), tokens(150, 11)
    down, up, constant = fitted(moments(*fit), moments(x, y, weights), 4)
    found = moments(x, y, weights).error(down.double().T @ up.double(), constant.double())
    assert found == pytest.approx(squared_error(x, y, weights, down, up, constant), rel=1e-8)


def test_higher_rank_never_fits_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = moments(*tokens(300, 12))
    for penalty in surrogates.PENALTIES:
        monkeypatch.setattr(surrogates, "PENALTIES", (penalty,))
        errors = []
        for rank in range(1, HIDDEN + 1):
            down, up, constant = fitted(fit, fit, rank)
            errors.append(fit.error(down.double().T @ up.double(), constant.double()))
        assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
        assert errors[-1] < errors[0]


@pytest.mark.parametrize("penalty", surrogates.PENALTIES)
def test_full_rank_is_scikit_learns_ridge(penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surrogates, "PENALTIES", (penalty,))
    x, y, weights = tokens(300, 13)
    fit = moments(x, y, weights)
    down, up, constant = fitted(fit, fit, HIDDEN)
    centred = x - (weights @ x) / weights.sum()
    scale = float((weights @ centred.square()).mean())
    oracle = Ridge(alpha=penalty * scale).fit(x.numpy(), y.numpy(), sample_weight=weights.numpy())
    torch.testing.assert_close((down.T @ up).T.double(), torch.tensor(oracle.coef_), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(constant.double(), torch.tensor(oracle.intercept_), rtol=1e-3, atol=1e-4)


def test_the_penalty_is_chosen_on_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, check = moments(*tokens(16, 14)), moments(*tokens(300, 15))

    def error(penalties: tuple[float, ...]) -> float:
        monkeypatch.setattr(surrogates, "PENALTIES", penalties)
        down, up, constant = fitted(fit, check, 6)
        return check.error(down.double().T @ up.double(), constant.double())

    each = [error((penalty,)) for penalty in (1e-3, 1e-2, 1e-1, 1.0, 10.0)]
    assert error((1e-3, 1e-2, 1e-1, 1.0, 10.0)) == pytest.approx(min(each), rel=1e-9)
    assert min(each) < 0.9 * each[0], "16 tokens for 12 inputs must want a larger penalty than the smallest"


def test_an_expert_without_tokens_gives_zeros() -> None:
    for check in (Moments.empty(HIDDEN), moments(*tokens(50, 16))):
        assert all(not part.any() for part in fitted(Moments.empty(HIDDEN), check, 3))


def test_one_token_gives_its_output() -> None:
    x, y, _ = tokens(1, 17)
    one = moments(x, y, torch.tensor([0.7], dtype=torch.float64))
    down, up, constant = fitted(one, one, 3)
    torch.testing.assert_close((x @ down.double().T @ up.double() + constant.double()), y, rtol=1e-5, atol=1e-5)


def test_rank_zero_is_the_mean_output() -> None:
    x, y, weights = tokens(60, 18)
    fit = moments(x, y, weights)
    down, up, constant = fitted(fit, fit, 0)
    assert down.shape == up.shape == (0, HIDDEN)
    torch.testing.assert_close(constant.double(), (weights @ y) / weights.sum())


@pytest.mark.parametrize(
    ("form", "dtype", "rank"),
    [(f, d, r) for f in ("dense", "picked") for d, r in ((torch.float32, 3), (torch.float32, 8), (torch.bfloat16, 8))]
    + [("grouped", torch.bfloat16, 8)],
)
def test_every_form_is_a_loop_over_assignments(form: str, dtype: torch.dtype, rank: int) -> None:
    experts, hidden_size = 5, 16
    module = Surrogates(experts, hidden_size, rank).to(dtype)
    module.owner.copy_(torch.tensor(sorted([*[0, 1, 4] * rank, *[2] * rank, *[4] * rank])))  # none for expert 3
    for seed, part in enumerate((module.down, module.up, module.constant)):
        part.copy_(normal(*part.shape, seed=seed))
    module.use(form)
    hidden = normal(2, 7, hidden_size, seed=20).to(dtype)
    indices = normal(2, 7, experts, seed=22).argsort(dim=-1)[..., :3]
    weights = normal(2, 7, 3, seed=21).relu().to(dtype)  # about half of them answer
    by_expert = torch.zeros(2, 7, experts).scatter(-1, indices, weights.float())
    wanted = torch.zeros(2, 7, hidden_size)
    for g, t, e in (by_expert > 0).nonzero().tolist():
        down, up, constant = (part.float() for part in module.of(e))
        wanted[g, t] += by_expert[g, t, e] * (down @ hidden[g, t].float() @ up + constant)
    error = 1e-4 if dtype == torch.float32 else 3e-2 * float(wanted.abs().max())
    torch.testing.assert_close(module(hidden, by_expert).float(), wanted, rtol=0, atol=error)
    torch.testing.assert_close(module.answer(hidden, indices, weights).float(), wanted, rtol=0, atol=error)
    assert not module(hidden, torch.zeros_like(by_expert)).any()
    assert not module.answer(hidden, indices, torch.zeros_like(weights)).any()


@pytest.mark.parametrize("form", ["picked", "grouped"])
def test_no_surrogate_is_read_that_does_not_answer(form: str) -> None:
    """A surrogate full of NaN spoils whatever reads it."""
    module = Surrogates(4, 16, 8).bfloat16()
    module.down.fill_(math.nan)[module.owner == 2] = 1.0
    module.use(form)
    indices, weights = torch.tensor([[[0, 2], [1, 3], [2, 0]]]), torch.tensor([[[0.0, 0.5], [0.0, 0.0], [0.25, 0.0]]])
    assert module.answer(normal(1, 3, 16).bfloat16(), indices, weights.bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    ("device", "dtype", "rank", "experts_to_one", "form", "counted"),
    [
        ("cpu", torch.bfloat16, 8, 10, "picked", 5),
        ("cpu", torch.float32, 3, 1000, "picked", 5),
        ("meta", torch.bfloat16, 8, 10, "grouped", 5),  # stands for any device that is no CPU
        ("meta", torch.bfloat16, 8, 100, "dense", 3 * 4),
        ("meta", torch.float32, 8, 10, "dense", 3 * 4),
    ],
)
def test_the_form_follows_device_and_size_and_what_it_reads_is_counted(
    device: str, dtype: torch.dtype, rank: int, experts_to_one: int, form: str, counted: int
) -> None:
    """Of 4 experts, in 3 batches that leave out 5 in all."""
    module, there = Surrogates(4, 16, rank).to(device, dtype), Surrogates(4, 16, rank).to(dtype)
    assert module.fitting(expert_bytes=experts_to_one * (there.bytes // 4)) == form
    there.use(form)
    assert there.bytes_read(skipped=torch.tensor([0, 3, 2, 0]), batches=3) == counted * there.bytes // 4


def test_bytes_are_those_of_each_experts_rows() -> None:
    module = Surrogates(5, HIDDEN, 3)
    module.owner.copy_(torch.tensor([0] * 6 + [2] * 8 + [3]))
    wanted = [4 * (2 * rows * HIDDEN + HIDDEN) for rows in (6, 0, 8, 1, 0)]
    assert module.bytes_each.tolist() == wanted
    assert module.bytes == sum(wanted)
    module.choose(expert_bytes=10_000)
    assert module.bytes_read(skipped=torch.tensor([1, 0, 0, 2, 0]), batches=7) == wanted[0] + 2 * wanted[3]
    assert module.bfloat16().bytes == sum(wanted) // 2
    assert Surrogates(5, HIDDEN, 0).bytes == 0


def test_ranks_go_where_they_explain_most() -> None:
    gains = [torch.tensor([9.0, 5.0, 1.0]), torch.tensor([0.0, 0.0, 0.0]), torch.tensor([4.0, 3.0, 2.0])]
    assert choose_ranks(gains, 4) == [2, 0, 2]
    assert choose_ranks(gains, 9) == [3, 3, 3]
    assert choose_ranks(gains, 0) == [0, 0, 0]


def test_uneven_ranks_explain_more_than_even_ones() -> None:
    """Two experts, one of which is a constant."""
    x, y, weights = tokens(300, 30)
    hard, easy = moments(x, y, weights), moments(x, torch.ones_like(y), weights)
    module = Surrogates(2, HIDDEN, 2)
    module.put([fit_surrogate(hard, hard, 2, 4), fit_surrogate(easy, easy, 2, 4)])
    assert module.ranks.tolist() == [4, 0]
    down, up, constant = (part.double() for part in module.of(0))
    assert hard.error(down.T @ up, constant) < hard.error(*even(hard))
    torch.testing.assert_close(module.output(1, x.float()), torch.ones_like(y).float())


def even(expert: Moments) -> tuple[Tensor, Tensor]:
    down, up, constant = fitted(expert, expert, 2)
    return down.double().T @ up.double(), constant.double()


def test_owners_that_no_fit_gives_are_refused() -> None:
    for wrong in ([1, 0, 0, 1], [0, 0, 1, 2], [-1, 0, 0, 1]):
        module = Surrogates(2, HIDDEN, 2)
        module.owner.copy_(torch.tensor(wrong))
        with pytest.raises(ValueError, match="owner"):
            module.check()


@pytest.mark.parametrize(("share", "rank"), [(0.0, 0), (0.001, 1), (0.08, 14), (0.9, 100)])
def test_ranks_follow_the_experts_bytes(share: float, rank: int) -> None:
    assert rank_for(share, 3 * 100 * 120, 100) == rank
