"""One MoE layer's routing, where the decision is made, and its experts, where the surrogates' answer is added.

Nothing here depends on the step but for what `Rows` holds. Where the engine traces the model itself (on the CPU), both are
operations that the graph does not look into; elsewhere vLLM's own operation of the layer is one, and they are called there.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....moe.decision import Routing, Sums
from ....selector.selector import ThresholdPolicy
from ..layers import EngineLayer, Wrapping
from .rows import Rows

if TYPE_CHECKING:
    from ....selector.kernels.in_place import InPlace

NAME = "lynx_learn"
"""Under which a MoE runner has its `LayerHook`, and the model runner its `Acting`."""


class LayerHook:
    """Wraps a layer's router and experts."""

    def __init__(
        self, wrapping: Wrapping, layer: EngineLayer, policy: ThresholdPolicy, rows: Rows, sums: Tensor, rank: int
    ) -> None:
        """`sums` is where it counts, as in `Sums`; `rank` the worker's among those that share the layer's experts."""
        self.layer, self.policy, self.rows, self.sums = layer, policy, rows, sums
        runner = layer.runner
        self.name = str(runner.layer_name)
        # The runner may scale what the experts return, instead of the router its weights.
        self.scale = float(runner.routed_scaling_factor)
        # Until a reduction sums the workers' outputs, one of them adds for all.
        self.adds = runner._fused_output_is_reduced or rank == 0
        # On the CPU the kernel multiplies rows of weight 0 like any other, and which rows stay is known without waiting.
        self.gathers = layer.device.type == "cpu"
        self.kernels = policy.in_place(layer, self.scale, self.adds)
        self.undecided: Callable[[Tensor, Tensor], None] = partial(_finish, sums, None)
        self.finish: Callable[[Tensor, Tensor], None] = self.undecided
        """What is still to be done when the experts have run, with their output and what they ran."""
        self.experts: Callable[..., Tensor] = runner.routed_experts.forward_modular
        wrapping.give(runner, NAME, self)
        wrapping.replace(runner.router, "_compute_routing", self._compute_routing)
        wrapping.replace(runner.routed_experts, "forward_modular", self._forward_modular)

    def _compute_routing(
        self,
        own: Callable[..., tuple[Tensor, Tensor]],
        hidden_states: Tensor,
        router_logits: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        weights, ids = own(hidden_states, router_logits, *args, **kwargs)
        if torch.compiler.is_compiling():
            torch.ops.lynx_learn.decide(hidden_states, router_logits, weights, ids, self.name)
        else:
            self.decide(hidden_states, router_logits, weights, ids)
        return weights, ids

    def _forward_modular(
        self, own: Callable[..., Tensor], x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **kwargs: Any
    ) -> Tensor:
        if torch.compiler.is_compiling():
            # Without shared experts: on the CPU, where this is traced, the runner has run them before.
            return torch.ops.lynx_learn.run_experts(x, topk_weights, topk_ids, self.name)
        return self.run_experts(x, topk_weights, topk_ids, **kwargs)

    @torch.no_grad()
    def decide(self, hidden_states: Tensor, router_logits: Tensor, weights: Tensor, ids: Tensor) -> None:
        """Rewrite what the router has chosen, `weights` and `ids` `(rows, top_k)`, in place."""
        if not self.rows.decide(len(ids)):
            return
        scale = self.rows.scale[: len(ids)]
        routing = Routing(hidden_states[:, : self.layer.hidden_size], router_logits, ids, weights, scale)
        kernels = self.kernels
        if kernels is not None and kernels.takes(routing) and self._faster(kernels, routing):
            self.finish = kernels.decide(routing, self.sums)
        else:
            self.finish = self._decide(routing, self.sums)

    def _faster(self, kernels: "InPlace", routing: Routing) -> bool:
        return self.policy.kernel == "triton" or kernels.is_faster(routing, self.sums, self._decide)

    def _decide(self, routing: Routing, sums: Tensor) -> Callable[[Tensor, Tensor], None]:
        """As `InPlace.decide`, by what the policy decides with."""
        hidden, logits, ids, weights, scale = routing
        active = scale > 0
        # Rows of padding may name no expert.
        own = Routing(hidden, logits, ids.long().clamp_min(0), weights * self.scale, active)
        decision = self.policy.decide_one(self.layer, own, scale)
        assert decision.loads is not None
        before, after = (part.sum() for part in decision.loads)
        answered = torch.zeros_like(before)
        if decision.answered is not None:
            answered = (decision.answered & active.unsqueeze(-1)).sum()
        addition = decision.addition / self.scale if decision.addition is not None and self.adds else None
        # The router's own weights, not those that were scaled and back: what stays is as it was to the last bit.
        weights.masked_fill_(decision.weights == 0, 0)
        ids.copy_(torch.where(ids < 0, ids, decision.indices.to(ids.dtype)))
        # What a graph runs while nothing may be skipped is not counted.
        counted = torch.stack([before, after, active.sum() * self.layer.top_k, answered])
        sums[: Sums.CHECK] += counted * (active & scale.isfinite()).any()
        sums[Sums.CHECK] += ids.sum()
        return partial(_finish, sums, addition)

    @torch.no_grad()
    def run_experts(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **kwargs: Any) -> Tensor:
        """What the experts that stay return, with what surrogates answer `(rows, hidden)`."""
        if not self.rows.decide(len(topk_ids)):
            return self.experts(x=x, topk_weights=topk_weights, topk_ids=topk_ids, **kwargs)
        run = partial(run_kept, self.experts) if self.gathers else self.experts
        output = run(x=x, topk_weights=topk_weights, topk_ids=topk_ids, **kwargs)
        self.finish(output, topk_ids)
        self.finish = self.undecided
        return output


def _finish(sums: Tensor, addition: Tensor | None, output: Tensor, ids: Tensor) -> None:
    sums[Sums.CHECK] -= ids.sum()
    if addition is not None:
        output[:, : addition.shape[-1]] += addition.to(output.dtype)


def run_kept(own: Callable[..., Tensor], x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **kwargs: Any) -> Tensor:
    """As `own`, a layer's `forward_modular`, but only for assignments that stay, each as a token with one expert."""
    token, place = topk_weights.nonzero(as_tuple=True)
    if len(token) in (0, topk_weights.numel()):
        return own(x=x, topk_weights=topk_weights, topk_ids=topk_ids, **kwargs)
    weights, ids = (part[token, place].unsqueeze(-1) for part in (topk_weights, topk_ids))
    rows = own(x=x[token], topk_weights=weights, topk_ids=ids, **kwargs)
    total = torch.zeros(len(x), rows.shape[-1], dtype=torch.float32).index_add_(0, token, rows.float())
    return total.to(rows.dtype)


def _runner(layer: str) -> Any:
    """The MoE runner of that name in the model that is being run."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().no_compile_layers[layer]


@torch.library.custom_op("lynx_learn::decide", mutates_args=("weights", "ids"))
def _decide(hidden_states: Tensor, router_logits: Tensor, weights: Tensor, ids: Tensor, layer: str) -> None:
    hook = getattr(_runner(layer), NAME, None)
    if hook is not None:
        hook.decide(hidden_states, router_logits, weights, ids)


@torch.library.custom_op("lynx_learn::run_experts", mutates_args=())
def _run_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer: str) -> Tensor:
    runner = _runner(layer)
    # A graph that was kept by an engine that skips may be taken by one that does not.
    run = getattr(runner, NAME, None)
    run = runner.routed_experts.forward_modular if run is None else run.run_experts
    return run(x=x, topk_weights=topk_weights, topk_ids=topk_ids)


@_run_experts.register_fake
def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer: str) -> Tensor:
    return x.new_empty(x.shape)
