"""The scorer's figures against other libraries, and what learning gains."""

from pathlib import Path

import pytest
import torch
from flows import (
    layer_figures,
    reference_flow,
    tiny_flow,
    train_options,
)

from lynx_learn.fit.scorer import quality
from lynx_learn.fit.train import train


def test_quality_is_that_of_other_libraries() -> None:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_gamma_deviance

    generator = torch.Generator().manual_seed(0)
    true = torch.rand(300, 2, generator=generator) ** 3 + 1e-3
    given = true * torch.rand(300, 2, generator=generator) + 0.01
    found = quality(given, true)
    y, p = (v.flatten().double().numpy() for v in (true, given))
    assert found["deviance"] == pytest.approx(mean_gamma_deviance(y / y.mean(), p / p.mean()), rel=1e-4)
    assert found["correlation"] == pytest.approx(pearsonr(y, p).statistic, rel=1e-4)
    assert found["rank_correlation"] == pytest.approx(spearmanr(y, p).statistic, rel=1e-3)
    assert quality(7 * true, true)["deviance"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_a_learned_scorer_predicts_better_than_the_formula_on_the_reference_model() -> None:
    figures = layer_figures(reference_flow().selector)
    formula, learned = (sum(row[kind]["deviance"] for row in figures) for kind in ("formula", "mlp"))
    assert learned < 0.95 * formula
    assert all(row["unexplained"] < 0.9 for row in figures)


def test_gradient_boosting_is_fitted_for_comparison(tmp_path: Path) -> None:
    train(train_options(tiny_flow(), tmp_path / "s", reference=True))
    for row in layer_figures(tmp_path / "s"):
        assert 0 < row["gradient_boosting"]["deviance"] < 2 * row["formula"]["deviance"]
