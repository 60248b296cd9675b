"""Teacher-forced decode of many sequences side by side, in one pass per batch.

The tokens at one position of B sequences form one decode batch of size B. All layers skip at once, and later positions
see the keys and values of earlier ones that skipped, as in a real decode. The first positions stand for the prompt: they
run untouched and are not scored.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..moe.decision import Decision, Policy, Routing
from ..moe.families import MoeLayer
from ..moe.hooks import intercept
from .runtime import act
from .tally import Stats, Tally

METRICS = ("kl", "nll", "agreement")
# Rows of logits compared at a time, so that float32 copies of a large vocabulary stay small.
ROWS_AT_A_TIME = 512


def simulated_logits(
    model: nn.Module, layers: list[MoeLayer], tokens: Tensor, policy: Policy | None, prompt: int
) -> tuple[Tensor, Stats]:
    """Logits `(sequences, positions - prompt, vocabulary)` of a simulated decode, and what skipping did.

    Args:
        tokens: `(sequences, positions)`; the sequences of one decode batch, without padding.
        policy: what decides; None for the untouched model.
        prompt: leading positions that are prefill.
    """
    sequences, positions = tokens.shape
    tally = Tally(layers, policy)

    def on_layer(layer: MoeLayer, routing: Routing) -> Decision | None:
        def by_position(part: Tensor) -> Tensor:
            return part[0].unflatten(0, (sequences, positions)).transpose(0, 1)[prompt:]

        def put_back(whole: Tensor, part: Tensor) -> Tensor:
            head = whole[0].unflatten(0, (sequences, positions))[:, :prompt]
            return torch.cat([head, part.transpose(0, 1).to(head.dtype)], dim=1).flatten(0, 1).unsqueeze(0)

        done = act(policy, layer, Routing(*map(by_position, routing)), tally)
        if policy is None:
            return None
        added = None if done.addition is None else put_back(torch.zeros_like(routing.hidden), done.addition)
        return Decision(put_back(routing.indices, done.indices), put_back(routing.weights, done.weights), added)

    with intercept(model, layers, on_layer):
        logits = model(input_ids=tokens, use_cache=False).logits
    return logits[:, prompt:], tally.stats()


class Reference:
    """The untouched model's predictions of one group, against which others are measured.

    Args:
        logits: `(sequences, positions, vocabulary)`.
        targets: next tokens `(sequences, positions)`.
    """

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        self.targets = targets = targets.to(logits.device)
        self.probabilities = functional.softmax(logits.float(), -1).flatten(0, 1)
        log = functional.log_softmax(logits.float(), -1).flatten(0, 1)
        self.negative_entropy = (self.probabilities * log).sum(-1)
        self.target_log = log.gather(-1, targets.flatten().unsqueeze(-1)).squeeze(-1)
        self.greedy = log.argmax(-1)

    def losses(self, logits: Tensor) -> Tensor:
        """Per-sequence means `(sequences, 3)`, in the order of METRICS: nats, nats, share.

        KL(untouched, other), the rise of the negative log-likelihood, and the share of changed greedy choices.
        """
        rows = []
        flat, targets = logits.flatten(0, 1), self.targets.flatten().unsqueeze(-1)
        for start in range(0, len(flat), ROWS_AT_A_TIME):
            part = slice(start, start + ROWS_AT_A_TIME)
            other = flat[part].float()
            partition = other.logsumexp(-1)
            expected = torch.linalg.vecdot(self.probabilities[part], other)
            kl = self.negative_entropy[part] - expected + partition
            rise = self.target_log[part] - other.gather(-1, targets[part]).squeeze(-1) + partition
            rows.append(torch.stack([kl, rise, (other.argmax(-1) != self.greedy[part]).float()], dim=-1))
        return torch.cat(rows).unflatten(0, self.targets.shape).double().mean(dim=1).cpu()


@dataclass
class Comparison:
    """Losses of one policy against the untouched model over groups of sequences decoded together.

    `losses` is `(groups, sequences, 3)`, `sources` names the source of each sequence `[groups][sequences]`.
    """

    name: str
    setting: str
    losses: Tensor
    stats: list[Stats]
    sources: list[list[str]]
    tokens: int
    """Decode tokens scored."""

    def group_means(self, metric: str) -> Tensor:
        """One value per group: the unit of independence."""
        return self.losses[:, :, METRICS.index(metric)].mean(dim=1)

    def mean(self, metric: str) -> float:
        return float(self.group_means(metric).mean())

    def by_source(self, metric: str) -> dict[str, float]:
        values = self.losses[:, :, METRICS.index(metric)].flatten().tolist()
        found: dict[str, list[float]] = {}
        for source, value in zip([s for group in self.sources for s in group], values, strict=True):
            found.setdefault(source, []).append(value)
        return {source: sum(v) / len(v) for source, v in sorted(found.items())}

    def mean_stats(self) -> dict[str, float]:
        """Mean distinct experts per layer before and after, bytes relative to untouched, share answered."""
        count = len(self.stats)

        def average(pick: Callable[[Stats], float]) -> float:
            return sum(pick(s) for s in self.stats) / count

        return {
            "experts_before": average(lambda s: sum(s.experts_before) / len(s.experts_before)),
            "experts": average(lambda s: sum(s.experts_after) / len(s.experts_after)),
            "bytes": average(lambda s: s.bytes_ratio),
            "answered": average(lambda s: s.answered_share),
        }


@torch.no_grad()
def compare(
    model: nn.Module,
    layers: list[MoeLayer],
    groups: Sequence[tuple[Tensor, list[str]]],
    policies: Sequence[Policy],
    prompt: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda steps: steps,
) -> list[Comparison]:
    """Measure policies on the same groups, each group's untouched logits computed once.

    Args:
        groups: token rows `(sequences, positions)` and the source of each sequence.
    """
    for policy in policies:
        policy.bind(layers)
    found: list[list[tuple[Tensor, Stats]]] = [[] for _ in policies]
    for index in progress(range(len(groups))):
        tokens = groups[index][0]
        base, _ = simulated_logits(model, layers, tokens, None, prompt)
        reference = Reference(base[:, :-1], tokens[:, prompt + 1 :])
        for rows, policy in zip(found, policies, strict=True):
            other, stats = simulated_logits(model, layers, tokens, policy, prompt)
            rows.append((reference.losses(other[:, :-1]), stats))
    sources = [names for _, names in groups]
    scored = sum(part.shape[0] * (part.shape[1] - prompt - 1) for part, _ in groups)
    return [
        Comparison(p.name, p.setting, torch.stack([loss for loss, _ in rows]), [s for _, s in rows], sources, scored)
        for p, rows in zip(policies, found, strict=True)
    ]
