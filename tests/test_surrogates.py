"""Surrogates: every form against a loop, their bytes and their ranks."""

import math

import pytest
import torch
from torch import Tensor

from lynx_learn.selector.surrogates import Surrogates, choose_ranks, rank_for

HIDDEN = 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def test_owners_that_no_fit_gives_are_refused() -> None:
    for wrong in ([1, 0, 0, 1], [0, 0, 1, 2], [-1, 0, 0, 1]):
        module = Surrogates(2, HIDDEN, 2)
        module.owner.copy_(torch.tensor(wrong))
        with pytest.raises(ValueError, match="owner"):
            module.check()


@pytest.mark.parametrize(("share", "rank"), [(0.0, 0), (0.001, 1), (0.08, 14), (0.9, 100)])
def test_ranks_follow_the_experts_bytes(share: float, rank: int) -> None:
    assert rank_for(share, 3 * 100 * 120, 100) == rank
