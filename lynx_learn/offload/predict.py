"""Which experts the next layer will need, foreseen from what is known when a layer begins, and the files that keep this."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import OptionError
from ..files import write, write_json
from ..moe.families import Layer
from ..moe.identity import Identity, differences, identify, is_identity

# Ridge penalty, as a multiple of the mean diagonal of the Gram matrix.
PENALTY = 1e-2
# Successors that a token votes for, of each of its experts.
VOTES = 2
WEIGHTS, CONFIG, FORMAT_VERSION = "predictors.safetensors", "predictors.json", 1


@dataclass(frozen=True)
class Seen:
    """Tokens at one layer.

    Attributes:
        hidden: what enters the MoE block before `(tokens, hidden)`.
        before: experts of the block before `(tokens, top_k)`.
        routed: experts of the block that is foreseen `(tokens, top_k)`.
        experts: how many a block has.
    """

    hidden: Tensor
    before: Tensor
    routed: Tensor
    experts: int

    def of(self, rows: Tensor) -> "Seen":
        return Seen(self.hidden[rows], self.before[rows], self.routed[rows], self.experts)

    @property
    def used(self) -> Tensor:
        """Experts of the block that is foreseen `(tokens, experts)`, 0 or 1."""
        return torch.zeros(len(self.routed), self.experts).scatter(1, self.routed, 1.0)


@dataclass(frozen=True)
class Popular:
    """By how many tokens used each expert."""

    rates: Tensor
    shapes = staticmethod(lambda experts, width: {"rates": (experts,)})

    @classmethod
    def fit(cls, seen: Seen) -> Self:
        return cls(seen.used.mean(0))

    def scores(self, hidden: Tensor, before: Tensor) -> Tensor:
        """How much each token speaks for each expert `(tokens, experts)`; a batch's scores are their sum.

        Args:
            hidden, before: as in `Seen`.
        """
        return self.rates.expand(len(before), -1)


@dataclass(frozen=True)
class Correlated:
    """Klotski's table (arXiv 2502.06888): how often a token that used e' before used e next; each token votes for the best
    successors of each of its experts. Ties go by popularity."""

    votes: Tensor
    ties: Tensor
    shapes = staticmethod(lambda experts, width: {"votes": (experts, experts), "ties": (experts,)})

    @classmethod
    def fit(cls, seen: Seen) -> Self:
        before = torch.zeros(len(seen.before), seen.experts).scatter(1, seen.before, 1.0)
        table = before.T @ seen.used
        return cls(torch.zeros_like(table).scatter(1, table.topk(VOTES).indices, 1.0), 1e-3 * seen.used.mean(0))

    def scores(self, hidden: Tensor, before: Tensor) -> Tensor:
        return self.votes[before].sum(1) + self.ties


@dataclass(frozen=True)
class Learned:
    """A ridge regression from the hidden state to which experts are used."""

    map: Tensor
    shapes = staticmethod(lambda experts, width: {"map": (width + 1, experts)})

    @classmethod
    def fit(cls, seen: Seen) -> Self:
        x = cls._inputs(seen.hidden).double()
        gram = x.T @ x
        gram += PENALTY * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        return cls(torch.linalg.solve(gram, x.T @ seen.used.double()).float())

    @staticmethod
    def _inputs(hidden: Tensor) -> Tensor:
        """Directions of the hidden states, and a constant: routers see them normalised."""
        x = torch.nn.functional.normalize(hidden, dim=-1) * hidden.shape[-1] ** 0.5
        return torch.cat([x, torch.ones(len(x), 1)], dim=1)

    def scores(self, hidden: Tensor, before: Tensor) -> Tensor:
        return (self._inputs(hidden) @ self.map).clamp_min(0)


Predictor = Popular | Correlated | Learned
Predictors = dict[int, Predictor]
"""By layer; the first one has none."""
PREDICTORS: dict[str, type[Popular] | type[Correlated] | type[Learned]] = {
    "popularity": Popular,
    "correlation": Correlated,
    "learned": Learned,
}


def write_predictors(
    folder: Path, fitted: dict[tuple[str, int], Predictor], identity: Identity, about: dict[str, Any]
) -> None:
    """Write what was fitted, by predictor and layer, of the model that `identity` describes.

    Raises:
        OptionError: the folder cannot be written to.
    """
    tensors = {
        f"{name}.{layer}.{part}": value.contiguous()
        for (name, layer), predictor in fitted.items()
        for part, value in vars(predictor).items()
    }
    write(folder / WEIGHTS, safetensors.torch.save(tensors))
    write_json(folder / CONFIG, {"format_version": FORMAT_VERSION, "identity": identity, **about})


def read_predictors(folder: str, name: str, layers: Sequence[Layer]) -> Predictors:
    """Those of one name, for the layers of a model.

    Raises:
        OptionError: the folder has none, they are damaged, or another model's.
    """
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(Path(folder) / WEIGHTS)
        known, version = config["identity"], config["format_version"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise OptionError(
            f"predictors {folder} cannot be read ({type(error).__name__}: {reason}): write them with `lynx-learn replay --predictors`"
        ) from None
    if version != FORMAT_VERSION or not is_identity(known):
        raise OptionError(
            f"predictors {folder} are of another format: write them again with `lynx-learn replay --predictors`"
        )
    different = differences(known, identify(layers))
    if len(known["routers"]) != len(layers):
        different = [f"{len(known['routers'])} MoE layers, not {len(layers)}"]
    if different:
        raise OptionError(f"predictors {folder} are another model's ({different[0]}): fit them on a trace of this one")
    kind: Any = PREDICTORS[name]
    found: Predictors = {}
    for layer in layers[1:]:
        shapes = kind.shapes(layer.num_experts, layer.hidden_size)
        own = {part: tensors.get(f"{name}.{layer.index}.{part}") for part in shapes}
        if any(value is None or tuple(value.shape) != shapes[part] for part, value in own.items()):
            raise OptionError(
                f"predictors {folder} lack {name} for layer {layer.index}: fit them on a trace of this model"
            )
        found[layer.index] = kind(**own)
    return found
