"""What skipping did, counted."""

import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..moe.decision import Decision, Policy, Routing, used_experts
from ..moe.families import MoeLayer


class Tally:
    """Sums over decode batches, kept on the device of each layer so that counting never waits for it.

    Several threads may add at once.
    """

    def __init__(self, layers: list[MoeLayer], policy: Policy | None) -> None:
        self.layers, self.policy, self.lock = layers, policy, threading.Lock()
        # Calls that looked like decode and were not acted on, by the reason.
        self.passed_by: Counter[str] = Counter()

        def zeros() -> dict[int, Tensor]:
            return {layer.index: torch.zeros((), dtype=torch.int64, device=layer.device) for layer in layers}

        # What is made under inference mode could be updated under it only, which belongs to a thread and ends.
        with torch.inference_mode(False):
            self.batches, self.tokens, self.answered = zeros(), zeros(), zeros()
            # Batches that loaded each expert, as routed and as run.
            self.loads = {
                la.index: torch.zeros(2, la.num_experts, dtype=torch.int64, device=la.device) for la in layers
            }

    def add(self, layer: MoeLayer, routing: Routing, decision: Decision) -> None:
        """Count one layer's decode batches, as routed and as run."""
        index = layer.index
        loads = decision.loads or tuple(
            used_experts(part, routing.active, layer.num_experts) for part in (routing.indices, decision.indices)
        )
        # What torch compiles cannot take a lock: there, threads that meet may lose a count.
        with nullcontext() if torch.compiler.is_compiling() else self.lock:
            self._add(index, routing.active, decision.answered, *loads)

    def pass_by(self, reason: str) -> None:
        """Count a call that was not acted on."""
        with self.lock:
            self.passed_by[reason] += 1

    def _add(self, index: int, active: Tensor, answered: Tensor | None, wanted: Tensor, run: Tensor) -> None:
        if type(active) is Tensor and active.device.type == "cpu" and not torch.compiler.is_compiling():
            self._add_on_host(index, active, answered, wanted, run)
            return
        self.batches[index] += len(active)
        self.tokens[index] += active.sum()
        self.loads[index] += torch.stack((wanted, run)).sum(1)
        if answered is not None:
            self.answered[index] += (answered & active.unsqueeze(-1)).sum()

    def _add_on_host(self, index: int, active: Tensor, answered: Tensor | None, wanted: Tensor, run: Tensor) -> None:
        """The same sums in NumPy, which takes a fraction of the time for so few numbers."""
        live, sums = active.numpy(), self.loads[index].numpy()
        batches, tokens = self.batches[index].numpy(), self.tokens[index].numpy()
        batches += len(live)
        tokens += np.count_nonzero(live)
        sums[0] += wanted.numpy().sum(0)
        sums[1] += run.numpy().sum(0)
        if answered is not None:
            count = self.answered[index].numpy()
            count += np.count_nonzero(answered.numpy() & live[..., None])

    def stats(self) -> "Stats":
        batches = [int(self.batches[layer.index]) for layer in self.layers]
        each = [self.loads[layer.index].cpu() for layer in self.layers]
        loaded = [loads.sum(1).tolist() for loads in each]
        assigned = sum(int(self.tokens[layer.index]) * layer.top_k for layer in self.layers)
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
            answered_share=sum(int(value) for value in self.answered.values()) / max(assigned, 1),
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
