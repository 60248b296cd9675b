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

from .families import MoeLayer, Rewrite, Routing, intercept
from .policies import Groups, Policy
from .runtime import Stats, Tally, act

METRICS = ("kl", "nll", "agreement")
# Rows of logits compared at a time, so that float32 copies of a large vocabulary stay small.
ROWS_AT_A_TIME = 2048


@torch.no_grad()
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
    tally.batches = positions - prompt

    def on_layer(layer: MoeLayer, routing: Routing) -> Rewrite | None:
        def by_position(part: Tensor) -> Tensor:
            return part.unflatten(0, (sequences, positions)).transpose(0, 1)[prompt:]

        def put_back(whole: Tensor, part: Tensor) -> Tensor:
            head = whole.unflatten(0, (sequences, positions))[:, :prompt]
            return torch.cat([head, part.transpose(0, 1).to(head.dtype)], dim=1).flatten(0, 1)

        hidden, logits, indices, weights = (by_position(part) for part in routing)
        active = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        groups = Groups(hidden, logits, indices, weights, active)
        indices, weights, addition = act(policy, layer, groups, tally)
        if policy is None:
            return None
        added = None if addition is None else put_back(torch.zeros_like(routing.hidden), addition)
        return Rewrite(put_back(routing.indices, indices), put_back(routing.weights, weights), added)

    with intercept(model, layers, on_layer):
        logits = model(input_ids=tokens, use_cache=False).logits
    return logits[:, prompt:], tally.stats()


@torch.no_grad()
def losses(base: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """Per-sequence means of KL(base, other), rise of the negative log-likelihood, and changed greedy choices.

    Args:
        base, other: logits `(sequences, positions, vocabulary)`.
        targets: next tokens `(sequences, positions)`.

    Returns:
        `(sequences, 3)` in the order of METRICS; nats, nats, share.
    """
    rows = []
    for a, b, y in zip(*(t.flatten(0, 1).split(ROWS_AT_A_TIME) for t in (base, other, targets)), strict=True):
        p, q = functional.log_softmax(a.float(), -1), functional.log_softmax(b.float(), -1)
        kl = (p.exp() * (p - q)).sum(-1)
        rise = (p - q).gather(-1, y.unsqueeze(-1)).squeeze(-1)
        changed = (p.argmax(-1) != q.argmax(-1)).float()
        rows.append(torch.stack([kl, rise, changed], dim=-1))
    return torch.cat(rows).unflatten(0, targets.shape).mean(dim=1).double().cpu()


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
        for rows, policy in zip(found, policies, strict=True):
            other, stats = simulated_logits(model, layers, tokens, policy, prompt)
            rows.append((losses(base[:, :-1], other[:, :-1], tokens[:, prompt + 1 :]), stats))
    sources = [names for _, names in groups]
    scored = sum(part.shape[0] * (part.shape[1] - prompt - 1) for part, _ in groups)
    return [
        Comparison(p.name, p.setting, torch.stack([loss for loss, _ in rows]), [s for _, s in rows], sources, scored)
        for p, rows in zip(policies, found, strict=True)
    ]
