"""Run a policy at decode in transformers: `with skip_experts(model, selector, budget=0.01): model.generate(...)`."""

import warnings
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..moe.decision import Decision, Groups, Policy, silence, used_experts
from ..moe.families import MoeLayer, find_moe_layers
from ..moe.hooks import DecodeCall, Rewrite, Routing, experts_by_distinct, intercept, read_call
from ..moe.loading import fast_dtype
from ..selector.selector import LynxSelector, ThresholdPolicy


class Tally:
    """Sums over decode batches, kept on the device of each layer so that counting never waits for it."""

    def __init__(self, layers: list[MoeLayer], policy: Policy | None) -> None:
        self.layers, self.policy = layers, policy

        def zeros() -> dict[int, Tensor]:
            return {layer.index: torch.zeros((), dtype=torch.int64, device=layer.device) for layer in layers}

        self.batches, self.tokens, self.answered = zeros(), zeros(), zeros()
        # Batches that loaded each expert, as routed and as run.
        self.loads = {la.index: torch.zeros(2, la.num_experts, dtype=torch.int64, device=la.device) for la in layers}

    def add(self, layer: MoeLayer, groups: Groups, decision: Decision) -> None:
        """Count one layer's decode batches, as routed and as run."""
        index = layer.index
        loads = decision.loads or tuple(
            used_experts(part, groups.active, layer.num_experts) for part in (groups.indices, decision.indices)
        )
        self.batches[index] += len(groups.active)
        self.tokens[index] += groups.active.sum()
        self.loads[index] += torch.stack(loads).sum(1)
        if decision.answered is not None:
            self.answered[index] += decision.answered.sum()

    def stats(self) -> "Stats":
        batches = [int(self.batches[layer.index]) for layer in self.layers]
        loaded = [self.loads[layer.index].sum(1).tolist() for layer in self.layers]
        assigned = sum(int(self.tokens[layer.index]) * layer.top_k for layer in self.layers)
        before, after = 0.0, 0.0
        for layer, count, (wanted, run) in zip(self.layers, batches, loaded, strict=True):
            before += wanted * layer.expert_bytes
            after += run * layer.expert_bytes
            after += self.policy.surrogate_bytes(layer, wanted - run, count) if self.policy else 0.0
        return Stats(
            steps=max(batches, default=0),
            experts_before=[wanted / max(count, 1) for count, (wanted, _) in zip(batches, loaded, strict=True)],
            experts_after=[run / max(count, 1) for count, (_, run) in zip(batches, loaded, strict=True)],
            bytes_ratio=after / before if before else 1.0,
            answered_share=sum(int(value) for value in self.answered.values()) / max(assigned, 1),
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
        decision = policy.decide(layer, groups)
        if decision.loads is None:
            decision = silence(decision, groups.active, layer.num_experts)
    tally.add(layer, groups, decision)
    return decision


def warn_of_emulation(layer: MoeLayer) -> None:
    """Say how to get rid of it where the CPU has to emulate the products of the model's type."""
    if fast_dtype(layer.dtype, layer.device) != layer.dtype:
        kind = str(layer.dtype).removeprefix("torch.")
        warnings.warn(
            f"this CPU emulates {kind}, several times slower than float32: load the model with dtype=torch.float32",
            stacklevel=4,
        )


# Models something is attached to: two policies on one model would act on each other's output.
_attached: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class Skipping:
    """A policy on a model; a context manager, or `attach()` and `detach()`."""

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        self.model, self.policy = model, policy
        self.layers = find_moe_layers(model)
        warn_of_emulation(self.layers[0])
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

    def _on_layer(self, layer: MoeLayer, routing: Routing) -> Rewrite | None:
        if self.call is None:
            return None
        tokens = routing.hidden.shape[0]
        active = self.call.active
        if active is None:
            active = torch.ones(tokens, dtype=torch.bool, device=routing.hidden.device)
        hidden, logits, indices, weights = (part.unsqueeze(0) for part in routing)
        groups = Groups(hidden, logits, indices.long(), weights, active.to(routing.hidden.device).unsqueeze(0))
        done = act(self.policy, layer, groups, self.tally)
        return Rewrite(done.indices[0], done.weights[0], None if done.addition is None else done.addition[0])


def skip_experts(
    model: nn.Module,
    selector: LynxSelector | Policy,
    budget: float | None = None,
    metric: str = "kl",
    kernel: str = "auto",
) -> Skipping:
    """Let `model` skip experts at decode, within a budget.

    Args:
        model: a transformers model with MoE blocks.
        selector: a calibrated selector, or any other policy.
        budget: for a selector, mean KL in nats per token against the untouched model (or the unit of `metric`).
        metric: `kl`, `nll` or `agreement`; what the budget counts.
        kernel: what computes a selector's decisions, as in `ThresholdPolicy`.

    Raises:
        ModelError: the model cannot be acted on.
        SelectorError: the selector belongs to another model.
        OptionError: the selector is not calibrated for this budget.
    """
    if isinstance(selector, LynxSelector):
        if budget is None:
            raise TypeError("skip_experts(model, selector) needs budget=…, in nats of KL per token")
        return Skipping(model, selector.policy(budget, metric, kernel))
    if budget is not None:
        raise TypeError("a budget belongs to a calibrated selector; this policy has its own setting")
    return Skipping(model, selector)
