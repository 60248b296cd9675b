"""Train one layer's scorer on assignment costs, with Lightning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from ..selector.features import NAMES
from ..selector.scorers import SCORERS, Scorer
from .low_rank import COLUMNS_AT_A_TIME
from .trainer import CSVLogger, L, fit_module

# Costs are divided by the layer's mean; below this share of it they count as this, so that a logarithm stays finite.
SMALLEST_COST = 1e-6
# Rows the gradient-boosted reference is fitted on; its time grows with them, its figures hardly.
REFERENCE_ROWS = 60_000


Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class Assignments:
    """Assignments of n tokens of one layer.

    Attributes:
        features: `(n, top_k, features)`.
        experts, costs: `(n, top_k)`; costs are the true ones.
        hidden: `(n, hidden)`, in the trace's dtype.
    """

    features: Tensor
    experts: Tensor
    costs: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class ScorerOptions:
    """How a scorer is trained."""

    kind: str
    epochs: int
    batch: int
    rate: float
    seed: int


class Drawn(Dataset[Batch]):
    """Assignments of a batch of tokens by their numbers."""

    def __init__(self, rows: Assignments) -> None:
        self.parts = (rows.features, rows.experts, rows.costs, rows.hidden)

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, chosen: list[int]) -> Batch:
        # As one tensor: each part would turn the list into one of its own.
        numbers = torch.tensor(chosen)
        features, experts, costs, hidden = (part[numbers] for part in self.parts)
        return features, experts, costs, hidden


class AssignmentData(L.LightningDataModule):
    """Batches of tokens with their assignments, drawn by index so that a batch is one gather."""

    def __init__(self, fit: Assignments, check: Assignments, batch: int, seed: int) -> None:
        super().__init__()
        self.fit, self.check, self.batch, self.seed = fit, check, batch, seed

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.fit, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.check, shuffle=False)

    def _loader(self, rows: Assignments, shuffle: bool) -> DataLoader[Any]:
        data = Drawn(rows)
        order = (
            RandomSampler(data, generator=torch.Generator().manual_seed(self.seed))
            if shuffle
            else SequentialSampler(data)
        )
        return DataLoader(data, batch_size=None, sampler=BatchSampler(order, self.batch, drop_last=False))


class ScorerTraining(L.LightningModule):
    """Gamma regression: the loss `s + cost · exp(−s)` has its minimum where exp(s) is the expected cost.

    The expectation, not the median, is what must be right, because decode adds predicted costs up. The loss does not
    change when all costs are scaled, so cheap assignments, where the threshold lies, count as much as dear ones.
    """

    def __init__(self, scorer: Scorer, scale: float, rate: float) -> None:
        super().__init__()
        self.scorer, self.scale, self.rate = scorer, scale, rate

    def loss(self, batch: Batch) -> Tensor:
        features, experts, costs, hidden = batch
        predicted = self.scorer(features, experts, hidden) - np.log(self.scale)
        return (predicted + (costs / self.scale).clamp_min(SMALLEST_COST) * (-predicted).exp()).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("check_loss", self.loss(batch), on_epoch=True, batch_size=len(batch[2]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=1e-3)
        total = max(1, int(self.trainer.estimated_stepping_batches)) + 1
        # The rate rises over a tenth of the steps; a rise that ends with the first one divides by its length, 0.
        rise = max(0.1, 1.5 / total)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=total, pct_start=rise)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def new_scorer(kind: str, fit: Assignments, residuals: Tensor) -> Scorer:
    """An untrained scorer, which is the two-factor formula; `residuals` are the experts' mean squared residuals."""
    scorer = SCORERS[kind](len(residuals), fit.hidden.shape[1])
    flat = fit.features.flatten(0, 1)
    scorer.mean.copy_(flat.mean(0))
    scorer.spread.copy_(flat.std(0).clamp_min(1e-3))
    # Some columns at a time: a float32 copy of all hidden states of a wide model would be the most that a fit holds.
    for columns in torch.arange(fit.hidden.shape[1]).split(COLUMNS_AT_A_TIME):
        hidden = fit.hidden[:, columns[0] : columns[-1] + 1].float()
        scorer.hidden_mean[columns] = hidden.mean(0)
        scorer.hidden_spread[columns] = hidden.std(0).clamp_min(1e-3)
    scorer.log_residual.copy_(residuals.clamp_min(1e-30).log())
    return scorer


def train_scorer(
    scorer: Scorer, fit: Assignments, check: Assignments, options: ScorerOptions, logs: Path, name: str
) -> None:
    """Train in place; writes the losses as CSV to `logs/name`."""
    if not any(p.requires_grad for p in scorer.parameters()):
        return
    training = ScorerTraining(scorer, float(fit.costs.mean().clamp_min(1e-30)), options.rate)
    fit_module(
        training,
        AssignmentData(fit, check, options.batch, options.seed),
        max_epochs=options.epochs,
        logger=CSVLogger(logs, name=name, version=""),
        gradient_clip_val=1.0,
        log_every_n_steps=10,
    )
    scorer.requires_grad_(False)


@torch.no_grad()
def predicted_costs(scorer: Scorer, rows: Assignments) -> Tensor:
    """Predicted costs `(n, top_k)`."""
    return scorer(rows.features, rows.experts, rows.hidden).exp()


@torch.no_grad()
def quality(predicted: Tensor, costs: Tensor) -> dict[str, float]:
    """Gamma deviance (0 is perfect), Pearson and Spearman correlation of predicted and true costs.

    Both are scaled to the same mean first: a constant factor is the sensitivity's and the threshold's affair.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_gamma_deviance

    true = (costs / costs.mean()).clamp_min(SMALLEST_COST).double().flatten().numpy()
    given = (predicted / predicted.mean()).clamp_min(SMALLEST_COST).double().flatten().numpy()
    return {
        "deviance": float(mean_gamma_deviance(true, given)),
        "correlation": float(pearsonr(true, given).statistic),
        "rank_correlation": float(spearmanr(true, given).statistic),
    }


def boosted_reference(fit: Assignments, check: Assignments, seed: int) -> dict[str, float]:
    """What the router's features give a gradient-boosted regressor: the reference for what is in them."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    def table(rows: Assignments) -> np.ndarray:
        return torch.cat([rows.features, rows.experts.unsqueeze(-1)], dim=-1).flatten(0, 1).numpy()

    chosen = torch.randperm(len(fit.costs), generator=torch.Generator().manual_seed(seed))[
        : REFERENCE_ROWS // fit.costs.shape[1]
    ]
    part = Assignments(fit.features[chosen], fit.experts[chosen], fit.costs[chosen], fit.hidden[chosen])
    scale = part.costs.mean()
    experts = int(max(fit.experts.max(), check.experts.max())) + 1
    categorical = [len(NAMES)] if experts <= 255 else None  # scikit-learn's limit of categories
    # On the logarithm: its own gamma loss runs away on costs that span six orders of magnitude.
    model = HistGradientBoostingRegressor(max_iter=200, categorical_features=categorical, random_state=seed)
    model.fit(table(part), (part.costs / scale).clamp_min(SMALLEST_COST).log().flatten().numpy())
    return quality(torch.from_numpy(model.predict(table(check))).exp(), check.costs)
