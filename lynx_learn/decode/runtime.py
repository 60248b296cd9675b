"""Run a policy at decode in transformers: `with skip_experts(model, selector, budget=0.01): model.generate(...)`."""

import sys
import threading
import warnings
import weakref
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, OptionError
from ..moe.calls import EXPECTED, DecodeCall, Generations, padding_token, read_call, watch_generate
from ..moe.decision import Decision, Policy, Routing, confine, each_tensor
from ..moe.experts import experts_by_distinct
from ..moe.families import MoeLayer, find_moe_layers, moe_blocks
from ..moe.hooks import intercept, left_out_of_copies
from ..moe.loading import fast_dtype
from ..selector.config import outside
from ..selector.prices import RESIDENT, Prices, read_prices
from ..selector.selector import LynxSelector, ThresholdPolicy
from .tally import Stats, Tally

# Wrappers that run copies or pieces of the model, which hooks on the model itself do not reach.
_SPLIT = ("FullyShardedDataParallel", "DeepSpeedEngine")


def act(policy: Policy | None, layer: MoeLayer, routing: Routing, tally: Tally) -> Decision:
    """Let the policy rewrite one layer's routing, and count."""
    decision = Decision(routing.indices, routing.weights)
    if policy is not None:
        decision = policy.decide(layer, routing)
        if decision.loads is None:
            decision = confine(decision, routing.active, layer.num_experts)
    tally.add(layer, routing, decision)
    return decision


def act_on_one(
    policy: Policy, layer: MoeLayer, routing: Routing, tally: Tally, scale: Tensor | None = None
) -> Decision:
    """As `act` for one decode batch, without a leading dimension; `scale` as in `ThresholdPolicy.decide`."""
    if not isinstance(policy, ThresholdPolicy):
        return each_tensor(_squeezed, act(policy, layer, each_tensor(_unsqueezed, routing), tally))
    decision = policy.decide_one(layer, routing, scale)
    tally.add(layer, routing, decision)
    return decision


def _unsqueezed(part: Tensor) -> Tensor:
    return part.unsqueeze(0)


def _squeezed(part: Tensor) -> Tensor:
    return part.squeeze(0)


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


def use_of(model: nn.Module) -> dict[str, Any]:
    """How a model is about to be used, as far as it says so itself.

    Precision and device are not compared: a selector serves all of them, and what they change is rounding.
    """
    generation = getattr(model, "generation_config", None)
    if not getattr(generation, "do_sample", None):
        return {}
    defaults = {"temperature": 1.0, "top_p": 1.0}
    return {name: getattr(generation, name, None) or value for name, value in defaults.items()}


# Experts that something acts on: two policies on one model would act on each other's output.
_attached: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class _Now(threading.local):
    """What each thread's call of the model is."""

    def __init__(self) -> None:
        self.call: DecodeCall | None = None
        self.scale: Tensor | None = None
        """As in `ThresholdPolicy.decide`."""


class Skipping:
    """A policy on a model; a context manager, or `attach()` and `detach()`.

    Several threads may call the model at once: each call decides for its own batch.
    """

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        self.model, self.policy = unwrapped(model), policy
        # What is made here is used by calls in any mode and thread.
        with torch.inference_mode(False), torch.no_grad():
            self.layers = find_moe_layers(self.model)
            warn_of_emulation(self.layers[0])
            if isinstance(policy, ThresholdPolicy):
                policy.selector.check(self.layers, self.model)
            policy.bind(self.layers)
            self.tally = Tally(self.layers, policy)
        self.stack: ExitStack | None = None
        self.limits: dict[str, Any] = {}
        """What the policy's budget is certified for; see `SelectorConfig.calibration`."""
        self.now, self.generations, self.warned = _Now(), Generations(), False

    @property
    def stats(self) -> Stats:
        """Averages since the policy was first attached; reading them waits for the device."""
        return self.tally.stats()

    def attach(self) -> "Skipping":
        """Put the hooks on. A policy that skips nothing (budget 0) leaves the model untouched, bit for bit.

        A pickle or copy of the model made meanwhile is one of the untouched model.

        Raises:
            ModelError: something is attached to the model already.
        """
        own = {layer.experts for layer in self.layers}
        if any(experts in _attached for experts in own):
            raise ModelError("this model already skips experts: detach that first")
        with ExitStack() as stack:
            _attached.update(own)
            stack.callback(_attached.difference_update, own)
            if not (isinstance(self.policy, ThresholdPolicy) and not self.policy.skips):
                stack.callback(forget_compiled)
                stack.enter_context(left_out_of_copies(self.model, self.layers))
                stack.enter_context(experts_by_distinct(self.layers))
                self.generations = stack.enter_context(watch_generate(self.model))
                stack.enter_context(intercept(self.model, self.layers, self._on_layer, self._on_call))
                forget_compiled()
            self.stack, self.warned = stack.pop_all(), False
        return self

    def detach(self) -> None:
        """Take every hook off again; does nothing when none is on."""
        if self.stack is not None:
            self.stack.close()
            self.stack = None

    def __enter__(self) -> "Skipping":
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _on_call(self, arguments: dict[str, Any] | None) -> None:
        self.now.call = None
        if arguments is None:
            return
        call = read_call(arguments, self.generations.innermost, padding_token(self.model))
        if isinstance(call, str):
            self._pass_by(call)
            return
        self.now.call = call
        # Tokens of prompts keep all their experts.
        prompts = None if call is None else call.prompts
        self.now.scale = None if prompts is None else torch.where(prompts, torch.inf, 1.0)
        if call is not None and "length" in self.limits:
            past = getattr(arguments.get("past_key_values"), "get_seq_length", lambda: None)()
            # Static caches count on the device, and asking would wait for it.
            if isinstance(past, int) and warn_of_other_use(self.limits, {"length": past + 1}):
                self.limits = {}

    def _pass_by(self, reason: str) -> None:
        if torch.compiler.is_compiling():
            return
        self.tally.pass_by(reason)
        if not self.warned and reason not in EXPECTED:
            self.warned = True
            warnings.warn(f"decoding without skipping: {reason}; `stats.passed_by` counts such calls", stacklevel=2)

    def _on_layer(self, layer: MoeLayer, routing: Routing) -> Decision | None:
        call, device = self.now.call, routing.hidden.device
        if call is None:
            return None
        if call.active is not None:
            routing = routing._replace(active=call.active.to(device))
        scale = None if self.now.scale is None else self.now.scale.to(device)
        return act_on_one(self.policy, layer, routing, self.tally, scale)


def skip_experts(
    model: nn.Module,
    selector: LynxSelector | Policy,
    budget: float | None = None,
    metric: str = "kl",
    kernel: str = "auto",
    prices: str | Prices = "uniform",
) -> Skipping:
    """Let `model` skip experts at decode, within a budget.

    Args:
        model: a transformers model with MoE blocks, or torch.compile, PEFT or the like around it.
        selector: a calibrated selector, or any other policy.
        budget: for a selector, mean KL in nats per token against the untouched model (or the unit of `metric`).
        metric: `kl`, `nll` or `agreement`; what the budget counts.
        kernel: what computes a selector's decisions, as in `ThresholdPolicy`.
        prices: what reading each expert costs, for a selector that was calibrated with it: `uniform`, `bytes`,
            `devices:COUNT`, `residency` inside of `offload_experts`, or an object of your own; see `lynx_learn.selector.prices`.

    Raises:
        ModelError: the model cannot be acted on.
        SelectorError: the selector belongs to another model, or was calibrated with other prices.
        OptionError: the selector is not calibrated for this budget.
    """
    if isinstance(selector, LynxSelector):
        if budget is None:
            raise TypeError("skip_experts(model, selector) needs budget=…, in nats of KL per token")
        skipping = Skipping(model, selector.policy(budget, metric, kernel, _prices_of(prices, model)))
        skipping.limits = selector.config.calibration.get(metric, {}) if budget else {}
        warn_of_other_use(skipping.limits, {**use_of(skipping.model), "speculative_tokens": 0})
        return skipping
    if budget is not None:
        raise TypeError("a budget belongs to a calibrated selector; this policy has its own setting")
    return Skipping(model, selector)


def _prices_of(prices: str | Prices, model: nn.Module) -> Prices:
    if prices == "residency":
        found = next((RESIDENT[experts] for _, _, experts in moe_blocks(unwrapped(model)) if experts in RESIDENT), None)
        if found is None:
            raise OptionError(
                "prices 'residency' are those of fast memory that is managed: use offload_experts(model, …) around this"
            )
        return found
    return read_prices(prices) if isinstance(prices, str) else prices


def unwrapped(model: Any) -> nn.Module:
    """The transformers model that holds the MoE blocks: `model`, or what torch.compile, PEFT or the like wraps.

    Raises:
        ModelError: it is no model, or in a wrapper that skipping cannot act in; named, with what to do.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a {type(model).__name__} is no model: pass the transformers model (of a pipeline, its .model)"
        )
    wanted = {experts for _, _, experts in moe_blocks(model)}
    for part in model.modules():
        kind = type(part).__name__
        if kind in _SPLIT or (isinstance(part, nn.DataParallel) and len(part.device_ids) > 1):
            raise ModelError(f"{kind} runs copies or pieces of the model: attach before wrapping, on one device each")
        if isinstance(part, PreTrainedModel) and wanted <= set(part.modules()):
            return part
    return model


def forget_compiled() -> None:
    """Let torch compile anew what it has compiled: its code has the hooks in it that were there then, and no others."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]["total"]:
        dynamo.reset()
