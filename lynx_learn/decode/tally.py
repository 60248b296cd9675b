"""What skipping did, counted."""

import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ..moe.decision import ANSWERED, BATCHES, LOADS, TOKENS, Decision, Policy, Routing, used_experts
from ..moe.families import MoeLayer

# So many batches of a layer are summed at once.
TOGETHER = 64


class Added(NamedTuple):
    """Decode batches of one layer, or one without a leading dimension; as in `Routing` and `Decision`."""

    active: Tensor
    answered: Tensor | None
    wanted: Tensor
    """Experts that active tokens load as routed `(G, experts)`, and as run."""
    run: Tensor

    @property
    def kind(self) -> tuple[torch.Size, int, bool]:
        return self.active.shape[-1:], self.active.ndim, self.answered is None


class Tally:
    """Sums over decode batches, kept on the device of each layer so that counting never waits for it.

    Several threads may add at once.
    """

    def __init__(self, layers: list[MoeLayer], policy: Policy | None) -> None:
        self.layers, self.policy, self.lock = layers, policy, threading.Lock()
        # What was added to layers on the CPU and is not summed yet: in a decode step there, summing a few numbers costs more
        # time in calls than in sums.
        self.pending: dict[int, list[Added]] = {layer.index: [] for layer in layers}
        # Calls that looked like decode and were not acted on, by the reason.
        self.passed_by: Counter[str] = Counter()

        # What is made under inference mode could be updated under it only, which belongs to a thread and ends.
        with torch.inference_mode(False):
            # Each layer's in one vector, as `Decision.counts` has them.
            self.counts = {
                layer.index: torch.zeros(LOADS + 2 * layer.num_experts, dtype=torch.int64, device=layer.device)
                for layer in layers
            }

    def add(self, layer: MoeLayer, routing: Routing, decision: Decision) -> None:
        """Count one layer's decode batches, as routed and as run."""
        index = layer.index
        if decision.counts is not None:
            with nullcontext() if torch.compiler.is_compiling() else self.lock:
                self.counts[index] += decision.counts
            return
        loads = decision.loads or tuple(
            used_experts(part, routing.active, layer.num_experts) for part in (routing.indices, decision.indices)
        )
        added = Added(routing.active, decision.answered, *loads)
        if torch.compiler.is_compiling():
            self._sum(index, added)  # what torch compiles cannot take a lock: there, threads that meet may lose a count
        elif type(added.active) is Tensor and added.active.device.type == "cpu":
            self.pending[index].append(added)
            if len(self.pending[index]) >= TOGETHER:
                self._sum_pending(index)
        else:
            with self.lock:
                self._sum(index, added)

    def pass_by(self, reason: str) -> None:
        """Count a call that was not acted on."""
        with self.lock:
            self.passed_by[reason] += 1

    def _sum(self, index: int, added: "Added") -> None:
        counts, experts = self.counts[index], added.wanted.shape[-1]
        counts[BATCHES] += added.wanted.numel() // experts
        counts[TOKENS] += added.active.sum()
        counts[LOADS:] += torch.cat((added.wanted, added.run), -1).view(-1, 2 * experts).sum(0)
        if added.answered is not None:
            counts[ANSWERED] += (added.answered & added.active.unsqueeze(-1)).sum()

    def _sum_pending(self, index: int) -> None:
        with self.lock, torch.inference_mode(False):
            # Others may append meanwhile.
            some = self.pending[index][:]
            del self.pending[index][: len(some)]
            for _, alike in groupby(some, key=lambda added: added.kind):
                same = list(alike)
                answered = [added.answered for added in same if added.answered is not None]
                join = torch.stack if same[0].active.ndim == 1 else torch.cat
                parts = zip(*((added.active, added.wanted, added.run) for added in same), strict=True)
                active, wanted, run = map(join, parts)
                self._sum(index, Added(active, join(answered) if answered else None, wanted, run))

    def stats(self) -> "Stats":
        for index in self.pending:
            self._sum_pending(index)
        counts = [self.counts[layer.index].cpu() for layer in self.layers]
        batches = [int(part[BATCHES]) for part in counts]
        each = [part[LOADS:].view(2, -1) for part in counts]
        loaded = [loads.sum(1).tolist() for loads in each]
        assigned = sum(int(part[TOKENS]) * layer.top_k for part, layer in zip(counts, self.layers, strict=True))
        before, after = 0.0, 0.0
        for layer, count, loads, (wanted, run) in zip(self.layers, batches, each, loaded, strict=True):
            before += wanted * layer.expert_bytes
            after += run * layer.expert_bytes
            after += self.policy.own_bytes(layer, loads[0] - loads[1], count) if self.policy else 0.0
        return Stats(
            steps=max(batches, default=0),
            experts_before=[wanted / max(count, 1) for count, (wanted, _) in zip(batches, loaded, strict=True)],
            experts_after=[run / max(count, 1) for count, (_, run) in zip(batches, loaded, strict=True)],
            bytes_ratio=after / before if before else 1.0,
            answered_share=sum(int(part[ANSWERED]) for part in counts) / max(assigned, 1),
            passed_by=dict(self.passed_by),
        )


@dataclass(frozen=True)
class Stats:
    """What skipping did, averaged over the decode steps it acted on.

    Attributes:
        steps: decode batches acted on.
        experts_before, experts_after: mean distinct experts of each MoE layer, untouched and as run.
        bytes_ratio: weights read by routed experts, surrogates and scorers, relative to the untouched experts.
        answered_share: share of the assignments that a surrogate answered.
        passed_by: calls of the model that could not be acted on, by the reason.
    """

    steps: int
    experts_before: list[float]
    experts_after: list[float]
    bytes_ratio: float
    answered_share: float
    passed_by: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        left = "".join(f"; {count} calls not acted on: {reason}" for reason, count in self.passed_by.items())
        if not self.steps:
            return f"no decode step was acted on{left}"
        before, after = (sum(v) / len(v) for v in (self.experts_before, self.experts_after))
        return (
            f"{self.steps} decode steps: {before:.1f} -> {after:.1f} distinct experts per layer, "
            f"{self.bytes_ratio:.0%} of the bytes, {self.answered_share:.0%} of assignments answered by surrogates{left}"
        )
