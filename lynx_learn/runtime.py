"""Run a policy at decode in transformers: `with skip_experts(model, selector, budget=0.01): model.generate(...)`."""

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .errors import ModelError
from .families import MoeLayer, find_moe_layers
from .hooks import DecodeCall, Rewrite, Routing, experts_by_distinct, intercept, read_call
from .policies import Decision, Groups, Policy, silence, used_experts
from .selector import LynxSelector, ThresholdPolicy


class Tally:
    """Sums over decode batches, kept on the device of each layer so that counting never waits for it."""

    def __init__(self, layers: list[MoeLayer], policy: Policy | None) -> None:
        self.layers, self.policy = layers, policy
        self.batches = 0
        # per layer: experts before and after, assignments, those answered by surrogates, surrogates read
        self.sums = {layer.index: torch.zeros(5, dtype=torch.int64, device=layer.device) for layer in layers}

    def add(self, layer: MoeLayer, groups: Groups, decision: Decision) -> None:
        """Count one layer's decode batches, as routed and as run."""
        none = groups.active.sum() * 0
        parts = (
            used_experts(groups.indices, groups.active, layer.num_experts).sum(),
            used_experts(decision.indices, groups.active, layer.num_experts).sum(),
            groups.active.sum() * layer.top_k,
            none if decision.answered is None else decision.answered.sum(),
            none if decision.surrogates_read is None else decision.surrogates_read.sum(),
        )
        self.sums[layer.index] += torch.stack(parts)

    def stats(self) -> "Stats":
        rows = torch.stack([self.sums[layer.index].cpu() for layer in self.layers]).double()
        count = max(self.batches, 1)
        size = torch.tensor([float(layer.expert_bytes) for layer in self.layers], dtype=torch.float64)
        extra = [float(self.policy.surrogate_bytes(layer)) if self.policy else 0.0 for layer in self.layers]
        before = float(rows[:, 0] @ size)
        after = float(rows[:, 1] @ size + rows[:, 4] @ torch.tensor(extra, dtype=torch.float64))
        return Stats(
            steps=self.batches,
            experts_before=(rows[:, 0] / count).tolist(),
            experts_after=(rows[:, 1] / count).tolist(),
            bytes_ratio=after / before if before else 1.0,
            answered_share=float(rows[:, 3].sum() / rows[:, 2].sum().clamp_min(1)),
        )


@dataclass(frozen=True)
class Stats:
    """What skipping did, averaged over the decode steps it acted on.

    Attributes:
        steps: decode batches acted on.
        experts_before, experts_after: mean distinct experts of each MoE layer, untouched and as run.
        bytes_ratio: weights read by routed experts and surrogates, relative to the untouched experts.
        answered_share: share of the assignments that a surrogate answered.
    """

    steps: int
    experts_before: list[float]
    experts_after: list[float]
    bytes_ratio: float
    answered_share: float

    def __str__(self) -> str:
        if not self.steps:
            return "no decode step was acted on"
        before, after = (sum(v) / len(v) for v in (self.experts_before, self.experts_after))
        return (
            f"{self.steps} decode steps: {before:.1f} -> {after:.1f} distinct experts per layer, "
            f"{self.bytes_ratio:.0%} of the bytes, {self.answered_share:.0%} of assignments answered by surrogates"
        )


def act(policy: Policy | None, layer: MoeLayer, groups: Groups, tally: Tally) -> Decision:
    """Let the policy rewrite one layer's groups, and count."""
    decision = Decision(groups.indices, groups.weights)
    if policy is not None:
        decision = silence(policy.decide(layer, groups), groups.active, layer.num_experts)
    tally.add(layer, groups, decision)
    return decision


# Models something is attached to: two policies on one model would act on each other's output.
_attached: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class Skipping:
    """A policy on a model; a context manager, or `attach()` and `detach()`."""

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        self.model, self.policy = model, policy
        self.layers = find_moe_layers(model)
        policy.bind(self.layers)
        self.tally = Tally(self.layers, policy)
        self.stack: ExitStack | None = None
        self.call: DecodeCall | None = None

    @property
    def stats(self) -> Stats:
        """Averages since the policy was first attached; reading them waits for the device."""
        return self.tally.stats()

    def attach(self) -> "Skipping":
        """Put the hooks on. A policy that skips nothing (budget 0) leaves the model untouched, bit for bit.

        Raises:
            ModelError: something is attached to the model already.
        """
        if self.model in _attached:
            raise ModelError("this model already skips experts: detach that first")
        with ExitStack() as stack:
            _attached.add(self.model)
            stack.callback(_attached.discard, self.model)
            if not (isinstance(self.policy, ThresholdPolicy) and not self.policy.skips):
                stack.enter_context(experts_by_distinct(self.model))
                stack.enter_context(intercept(self.model, self.layers, self._on_layer, self._on_call))
            self.stack = stack.pop_all()
        return self

    def detach(self) -> None:
        """Take every hook off again; does nothing when none is on."""
        if self.stack is not None:
            self.stack.close()
            self.stack, self.call = None, None

    def __enter__(self) -> "Skipping":
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _on_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = read_call(self.model, args, kwargs)
        self.tally.batches += self.call is not None

    def _on_layer(self, layer: MoeLayer, routing: Routing) -> Rewrite | None:
        if self.call is None:
            return None
        tokens = routing.hidden.shape[0]
        active = self.call.active
        if active is None:
            active = torch.ones(tokens, dtype=torch.bool, device=routing.hidden.device)
        hidden, logits, indices, weights = (part.unsqueeze(0) for part in routing)
        groups = Groups(hidden, logits, indices, weights, active.to(routing.hidden.device).unsqueeze(0))
        done = act(self.policy, layer, groups, self.tally)
        return Rewrite(done.indices[0], done.weights[0], None if done.addition is None else done.addition[0])


def skip_experts(
    model: nn.Module, selector: LynxSelector | Policy, budget: float | None = None, metric: str = "kl"
) -> Skipping:
    """Let `model` skip experts at decode, within a budget.

    Args:
        model: a transformers model with MoE blocks.
        selector: a calibrated selector, or any other policy.
        budget: for a selector, mean KL in nats per token against the untouched model (or the unit of `metric`).
        metric: `kl`, `nll` or `agreement`; what the budget counts.

    Raises:
        ModelError: the model cannot be acted on.
        SelectorError: the selector belongs to another model.
        OptionError: the selector is not calibrated for this budget.
    """
    if isinstance(selector, LynxSelector):
        if budget is None:
            raise TypeError("skip_experts(model, selector) needs budget=…, in nats of KL per token")
        return Skipping(model, selector.policy(budget, metric))
    if budget is not None:
        raise TypeError("a budget belongs to a calibrated selector; this policy has its own setting")
    return Skipping(model, selector)
