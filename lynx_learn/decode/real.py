"""One group decoded for real, with a key/value cache: what a simulated decode is held against.

A threshold is found by simulated decode, which is one pass of the model over the text. That says something of decode only
where the model's own cached decode computes the same, and how small a loss it can tell is a matter of rounding: how far
the untouched model is from itself in another batch shape and in another precision.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..moe.decision import Policy
from ..moe.experts import experts_by_distinct
from ..moe.families import MoeLayer
from ..traces.sampling import CachedDecode
from .runtime import Skipping
from .simulate import METRICS, Losses, Reference, simulated_logits

# Decode steps that are run at most: what disagrees does so from the first ones on, and quickstart waits for them.
STEPS = 32
# KL (nats per token) of the untouched model between one pass and cached decode from which they are two computations.
# Measured on the reference MoE: less than .00001 in float32, .0003 in bfloat16; on models whose decode went wrong (keys at
# wrong positions, other keys chosen by sparse attention) .08 and more. Logits that are coarser in half precision than the
# reference's stay far below.
ANOTHER = 0.02
# Models of more bytes are not copied for the sake of another precision, nor more than so many sequences run in it.
COPIED_BYTES, COPIED_ROWS = 2**31, 4


@dataclass(frozen=True)
class Floor:
    """How far the untouched model is from itself, per token, in the unit of a metric."""

    batch_size: int
    steps: int
    cached: float
    """Between one pass over the text and a decode with a cache: batches of another shape."""
    precision: float | None
    """Between its own precision and `other`; None: not measured, by reason of `other`."""
    other: str


def real_logits(model: nn.Module, layers: list[MoeLayer], tokens: Tensor, policy: Policy | None, prompt: int) -> Tensor:
    """As `simulate.simulated_logits`, from a decode with a cache: `(sequences, positions - prompt, vocabulary)`."""
    decode = CachedDecode(model)
    with experts_by_distinct(layers) if policy is None else Skipping(model, policy):
        decode.read(tokens[:, :prompt])
        return torch.stack([decode.read(tokens[:, i : i + 1]) for i in range(prompt, tokens.shape[1])], dim=1)


class RealDecode:
    """One group of sequences, decoded by the untouched model in one pass and with a cache.

    Args:
        tokens: `(sequences, positions)`, without padding; the first STEPS after the prompt are decoded.
        prompt: leading positions that are prefill.

    Raises:
        ModelError: the two are not the same computation.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, layers: list[MoeLayer], tokens: Tensor, prompt: int) -> None:
        self.model, self.layers, self.prompt = model, layers, prompt
        self.tokens = tokens[:, : prompt + STEPS + 1]
        one, _ = simulated_logits(model, layers, self.tokens, None, prompt)
        cached = real_logits(model, layers, self.tokens, None, prompt)
        self.one, self.cached, self.few = map(self._reference, (one, cached, one[:COPIED_ROWS]))
        self.apart = self.one.losses(cached[:, :-1])
        if not (apart := mean_of(self.apart, "kl")) <= ANOTHER:
            raise ModelError(
                f"model type {model.config.model_type!r} decodes with a cache otherwise than in one pass over the same "  # type: ignore[union-attr]
                f"text (KL {apart:.3g} nats per token, at most {ANOTHER:g} is rounding): thresholds are found by one pass and "
                "would say nothing of decode; try another version of transformers or --dtype float32"
            )

    def _reference(self, logits: Tensor) -> Reference:
        return Reference(logits[:, :-1], self.tokens[: len(logits), self.prompt + 1 :])

    def floor(self, metric: str) -> Floor:
        """How far the untouched model is from itself; a metric's sums may cancel, so absolute values."""
        found, other = self._in_another_precision()
        return Floor(
            len(self.tokens),
            self.tokens.shape[1] - self.prompt - 1,
            abs(mean_of(self.apart, metric)),
            None if found is None else abs(mean_of(found, metric)),
            other,
        )

    @torch.no_grad()
    def _in_another_precision(self) -> tuple[Losses | None, str]:
        """Losses of a copy in another precision against the model, in one pass, and which; or why there is none."""
        own = self.layers[0].dtype
        other = torch.bfloat16 if own == torch.float32 else torch.float32
        name = str(other).removeprefix("torch.")
        size = sum(p.numel() * other.itemsize for p in self.model.parameters())
        if size > COPIED_BYTES:
            return None, f"{name}: a second copy of the model would take {size / 2**30:.1f} GiB"
        if getattr(self.model, "hf_device_map", None):
            return None, f"{name}: the model is spread over devices"
        tokens = self.tokens[:COPIED_ROWS]
        # Others, and buffers such as frequencies, have a precision of their own. What is given here is not copied first.
        given = {id(p): nn.Parameter(p.to(other), False) for p in self.model.parameters() if p.dtype == own}
        twin = copy.deepcopy(self.model, given)
        try:
            logits = twin(input_ids=tokens, use_cache=False).logits[:, self.prompt :]
        except RuntimeError as error:
            return None, f"{name}: the model does not run in it ({str(error).splitlines()[0]})"
        return self.few.losses(logits[:, :-1]), name

    @torch.no_grad()
    def compare(self, policy: Policy, metric: str) -> tuple[float, float]:
        """What a policy loses per token against the untouched model: simulated, and for real."""
        policy.bind(self.layers)
        simulated, _ = simulated_logits(self.model, self.layers, self.tokens, policy, self.prompt)
        real = real_logits(self.model, self.layers, self.tokens, policy, self.prompt)
        return mean_of(self.one.losses(simulated[:, :-1]), metric), mean_of(self.cached.losses(real[:, :-1]), metric)


def mean_of(losses: Losses, metric: str) -> float:
    """Loss per token."""
    return float(losses.sums[:, METRICS.index(metric)].sum() / losses.tokens.sum())
