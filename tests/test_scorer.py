"""The scorer's figures against other libraries, and what learning gains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flows import (
    layer_figures,
    reference_flow,
    tiny_flow,
    train_options,
)

from lynx_learn.fit.scorer import Assignments, ScorerOptions, new_scorer, quality, train_scorer
from lynx_learn.fit.train import train
from lynx_learn.selector.features import NAMES


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


def test_costs_that_are_equal_share_a_rank() -> None:
    """Ranks 1, 2.5, 2.5, 4 against 2, 1, 3, 4: Pearson's correlation of these is 3 / sqrt(4.5 × 5)."""
    found = quality(torch.tensor([2.0, 1.0, 3.0, 4.0]), torch.tensor([1.0, 5.0, 5.0, 9.0]))
    assert found["rank_correlation"] == pytest.approx(3.0 / (4.5 * 5) ** 0.5)


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


SURROUNDINGS: dict[str, dict[str, str]] = {
    "sbatch": {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train.sh", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"},
    "srun": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_LOCALID": "1"},
    "torchrun": {"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "GROUP_RANK": "0"},
    "lightning": {"PL_TRAINER_MAX_STEPS": "1", "PL_TRAINER_PRECISION": "bf16-true"},
}


def forty_tokens() -> Assignments:
    generator = torch.Generator().manual_seed(0)
    shape = (40, 2)
    return Assignments(
        torch.randn(*shape, len(NAMES), generator=generator),
        torch.randint(4, shape, generator=generator),
        torch.rand(shape, generator=generator),
        torch.randn(40, 8, generator=generator),
    )


@pytest.mark.parametrize("steps", [1, 2, 9, 10])
def test_few_steps_are_enough(steps: int, tmp_path: Path) -> None:
    """With nine steps the rising part of the rate's cycle once had a length of 0."""
    fit = forty_tokens()
    scorer = new_scorer("linear", fit, torch.ones(4))
    before = {key: value.clone() for key, value in scorer.state_dict().items()}
    train_scorer(scorer, fit, fit, ScorerOptions("linear", steps, 40, 1e-2, 0), tmp_path, "layer-00")
    changed = [key for key, value in scorer.state_dict().items() if not torch.equal(value, before[key])]
    assert changed
    assert all(torch.isfinite(value).all() for value in scorer.state_dict().values())


@pytest.mark.parametrize("variables", SURROUNDINGS.values(), ids=SURROUNDINGS.keys())
def test_a_scorer_is_trained_alike_whatever_surrounds_it(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    fit, found = forty_tokens(), []
    for name in ("plain", "surrounded"):
        if name == "surrounded":
            for variable, value in variables.items():
                monkeypatch.setenv(variable, value)
            # What Lightning reads of the variables when it is imported.
            rank = int(variables.get("SLURM_PROCID", variables.get("RANK", 0)))
            monkeypatch.setattr(rank_zero_only, "rank", rank)
        torch.manual_seed(0)
        scorer = new_scorer("linear", fit, torch.ones(4))
        train_scorer(scorer, fit, fit, ScorerOptions("linear", 2, 8, 1e-2, 0), tmp_path / name, "layer-00")
        logs = {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.csv")}
        found.append((logs, {key: value.tolist() for key, value in scorer.state_dict().items()}))
    assert list(found[0][0]) == ["metrics.csv"]
    assert found[0] == found[1]
    assert rank_zero_only.rank == rank
    assert all(os.environ[variable] == value for variable, value in variables.items())


def test_variables_of_a_launcher_that_hold_no_number_stop_no_import() -> None:
    """As compose files and scripts leave them; Lightning would fail while it is imported."""
    program = "import os\nfrom lynx_learn.fit.trainer import rank_zero_only\nprint(rank_zero_only.rank, repr(os.environ['RANK']))"
    environment = {**os.environ, "RANK": "", "LOCAL_RANK": "x"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, "0 ''\n"), done.stderr
