"""A model's own continuations of prompts, sampled: the one place where text is generated to be measured or traced."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import OptionError


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest token.
        top_p: share of the probability whose likeliest tokens are drawn from (Holtzman et al. 2020, arXiv 1904.09751).

    Raises:
        OptionError: a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise OptionError(f"--temperature {self.temperature:g} is not usable: expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"--top_p {self.top_p:g} is not usable: expected above 0 and at most 1")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Next tokens `(sequences,)` from logits `(sequences, vocabulary)`; drawn on the CPU, so alike on any device."""
        if self.temperature == 0:
            return logits.argmax(-1)
        shares = (logits.double().cpu() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ranked, order = shares.sort(-1, descending=True)
            ranked[ranked.cumsum(-1) - ranked >= self.top_p] = 0.0
            shares = torch.zeros_like(shares).scatter(-1, order, ranked)
        return torch.multinomial(shares, 1, generator=generator).squeeze(-1).to(logits.device)


class CachedDecode:
    """A model that reads sequences piece by piece, with its key/value cache, and whatever hooks it has."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.cache, self.seen = model, None, 0
        self.known = inspect.signature(model.forward).parameters

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Logits of the next token `(sequences, vocabulary)` after the next tokens `(sequences, positions)`."""
        told: dict[str, object] = {"logits_to_keep": 1}
        # As `generate` does. Models whose first layer keeps no keys, as linear attention, cannot count them in the cache.
        place = torch.arange(self.seen, self.seen + tokens.shape[1], device=tokens.device)
        told["position_ids"] = place.expand(len(tokens), -1)
        told = {name: value for name, value in told.items() if name in self.known}
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, **told)
        self.cache, self.seen = out.past_key_values, self.seen + tokens.shape[1]
        return out.logits[:, -1]


def continue_rows(
    model: nn.Module,
    prompts: Tensor,
    length: int,
    sampling: Sampling,
    seed: int,
    step: Callable[[int], None] = lambda position: None,
) -> Tensor:
    """Prompts `(sequences, positions)` with the model's continuations, `(sequences, length)`.

    A cached decode with whatever hooks the model has, so a model that skips experts writes as it does when served. It goes
    on after an end-of-text token: what follows keeps the batch at its size, as the next request does in serving.
    """
    generator = torch.Generator().manual_seed(seed)
    decode, rows = CachedDecode(model), [prompts]
    for position in range(prompts.shape[1], length):
        rows.append(sampling.draw(decode.read(rows[-1]), generator).unsqueeze(-1))
        step(position)
    return torch.cat(rows, dim=1)
