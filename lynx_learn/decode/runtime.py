"""Run a policy at decode in transformers: `with skip_experts(model, selector, budget=0.01): model.generate(...)`."""

import warnings
import weakref
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import nn

from ..errors import ModelError
from ..moe.calls import DecodeCall, read_call
from ..moe.decision import Decision, Policy, Routing, silence
from ..moe.experts import experts_by_distinct
from ..moe.families import MoeLayer, find_moe_layers
from ..moe.hooks import intercept
from ..moe.loading import fast_dtype
from ..selector.config import outside
from ..selector.selector import LynxSelector, ThresholdPolicy
from .tally import Stats, Tally


def act(policy: Policy | None, layer: MoeLayer, routing: Routing, tally: Tally) -> Decision:
    """Let the policy rewrite one layer's routing, and count."""
    decision = Decision(routing.indices, routing.weights)
    if policy is not None:
        decision = policy.decide(layer, routing)
        if decision.loads is None:
            decision = silence(decision, routing.active, layer.num_experts)
    tally.add(layer, routing, decision)
    return decision


def warn_of_emulation(layer: MoeLayer) -> None:
    """Say how to get rid of it where the CPU has to emulate the products of the model's type."""
    if fast_dtype(layer.dtype, layer.device) != layer.dtype:
        kind = str(layer.dtype).removeprefix("torch.")
        warnings.warn(
            f"this CPU emulates {kind}, several times slower than float32: load the model with dtype=torch.float32",
            stacklevel=4,
        )


def warn_of_other_use(limits: dict[str, Any], use: dict[str, Any]) -> bool:
    """Say what of a use the budget is not certified for; whether anything was said."""
    found = outside(limits, use)
    if found:
        warnings.warn(
            f"the budget is not certified for {', '.join(found)}: run `lynx-learn calibrate` as you serve", stacklevel=4
        )
    return bool(found)


def use_of(model: nn.Module, layer: MoeLayer) -> dict[str, Any]:
    """How a model is about to be used, as far as it says so itself."""
    use: dict[str, Any] = {"dtype": str(layer.dtype).removeprefix("torch."), "device": layer.device.type}
    generation = getattr(model, "generation_config", None)
    if getattr(generation, "do_sample", None):
        defaults = {"temperature": 1.0, "top_p": 1.0}
        use |= {name: getattr(generation, name, None) or value for name, value in defaults.items()}
    return use


# Models something is attached to: two policies on one model would act on each other's output.
_attached: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class Skipping:
    """A policy on a model; a context manager, or `attach()` and `detach()`."""

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        self.model, self.policy = model, policy
        self.layers = find_moe_layers(model)
        warn_of_emulation(self.layers[0])
        if isinstance(policy, ThresholdPolicy):
            policy.selector.check(self.layers, model)
        policy.bind(self.layers)
        self.tally = Tally(self.layers, policy)
        self.stack: ExitStack | None = None
        self.call: DecodeCall | None = None
        self.limits: dict[str, Any] = {}
        """What the policy's budget is certified for; see `SelectorConfig.calibration`."""

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
        if self.call is not None and "length" in self.limits:
            past = kwargs["past_key_values"].get_seq_length()
            # Static caches count on the device, and asking would wait for it.
            if isinstance(past, int) and warn_of_other_use(self.limits, {"length": past + 1}):
                self.limits = {}

    def _on_layer(self, layer: MoeLayer, routing: Routing) -> Decision | None:
        if self.call is None:
            return None
        if self.call.active is not None:
            routing = routing._replace(active=self.call.active.to(routing.hidden.device).unsqueeze(0))
        return act(self.policy, layer, routing, self.tally)


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
        skipping = Skipping(model, selector.policy(budget, metric, kernel))
        skipping.limits = selector.config.calibration.get(metric, {}) if budget else {}
        warn_of_other_use(skipping.limits, use_of(model, skipping.layers[0]))
        return skipping
    if budget is not None:
        raise TypeError("a budget belongs to a calibrated selector; this policy has its own setting")
    return Skipping(model, selector)
