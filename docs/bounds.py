"""Which upper bound of a mean keeps its level on few skewed losses: miss rate at 95%, and the bound as a multiple of the mean.

Losses are drawn from gamma distributions whose spread is that of groups of 1, 4 and 16 documents (coefficient of variation
.33, .16 and .08 on the reference MoE) and a wider one. Student's t; Hall's skewness correction; that of the package;
empirical Bernstein (Maurer and Pontil 2009) and the betting bound of Waudby-Smith and Ramdas (2024), which hold for every
distribution whose largest value is known, here taken to be 3 times the mean.

    python docs/bounds.py
"""

import numpy as np
import torch
from scipy.stats import t

from lynx_learn.measure.bound import upper_bound

DRAWS, CONFIDENCE, LARGEST = 4000, 0.95, 3.0


def student(rows: np.ndarray) -> np.ndarray:
    n = rows.shape[1]
    bound: np.ndarray = rows.mean(1) + t.ppf(CONFIDENCE, n - 1) * rows.std(1, ddof=1) / np.sqrt(n)
    return bound


def hall(rows: np.ndarray) -> np.ndarray:
    n, q = rows.shape[1], t.ppf(CONFIDENCE, rows.shape[1] - 1)
    third = ((rows - rows.mean(1, keepdims=True)) ** 3).mean(1)
    bound: np.ndarray = student(rows) + third * (2 * q**2 + 1) / (6 * n * rows.var(1, ddof=1))
    return bound


def package(rows: np.ndarray) -> np.ndarray:
    return np.array([upper_bound(row, CONFIDENCE) for row in torch.from_numpy(rows)])


def bernstein(rows: np.ndarray) -> np.ndarray:
    n, log = rows.shape[1], np.log(2 / (1 - CONFIDENCE))
    bound: np.ndarray = rows.mean(1) + np.sqrt(2 * rows.var(1, ddof=1) * log / n) + 7 * LARGEST * log / (3 * (n - 1))
    return bound


def betting(rows: np.ndarray) -> np.ndarray:
    """By capital that bets on small losses, stakes from the past alone; the largest mean that is not refuted."""
    n = rows.shape[1]
    gains = 1 - np.minimum(rows / LARGEST, 1)
    places = np.arange(1, n + 1)
    means = (0.5 + gains.cumsum(1)) / (1 + places)
    spread = (0.25 + ((gains - means) ** 2).cumsum(1)) / (1 + places)
    before = np.concatenate([np.full((len(rows), 1), 0.25), spread[:, :-1]], 1)
    stakes = np.sqrt(2 * np.log(1 / (1 - CONFIDENCE)) / (n * before))
    lowest = np.zeros(len(rows))
    for mean in np.linspace(0.001, 0.999, 400):
        capital = np.log1p(np.minimum(stakes, 0.75 / mean) * (gains - mean)).cumsum(1).max(1)
        lowest = np.where(capital >= np.log(1 / (1 - CONFIDENCE)), mean, lowest)
    return LARGEST * (1 - lowest)


def main() -> None:
    generator = np.random.default_rng(0)
    bounds = (student, hall, package, bernstein, betting)
    print("spread groups " + "".join(f"{bound.__name__:>16}" for bound in bounds))
    for spread in (0.08, 0.16, 0.33, 0.5):
        for groups in (8, 12, 20, 60):
            rows = generator.gamma(spread**-2, spread**2, size=(DRAWS, groups))
            found = [bound(rows) for bound in bounds]
            cells = (f"{(upper < 1).mean():.1%} / {upper.mean():.2f}" for upper in found)
            print(f"{spread:6.2f} {groups:6d} " + "".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
