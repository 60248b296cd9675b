"""A selector at work inside a vLLM worker.

Three places are wrapped, all on the instances of one loaded model: the model runner's step, which says what is being
run for whom; each MoE layer's routing, where the decision is made; and each MoE layer's experts, where the surrogates'
answer is added.
"""

import os
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import LynxError
from ...moe.decision import Routing
from ...moe.identity import Passing
from ...selector.selector import LynxSelector, ThresholdPolicy
from . import metrics as metrics
from .checks import check_engine
from .layers import EngineLayer, Wrapping, check_shape, find_layers, looking
from .record import Recording
from .settings import Settings, UnsupportedError, opted_out, read_settings, recorded, refuse

LOG_EVERY_S = 60.0


def load_policy(settings: Settings) -> ThresholdPolicy:
    """The selector at the budget.

    Raises:
        LynxError: it cannot be loaded, or is not calibrated for the budget.
    """
    # With numba's compiled decision loaded, no second engine starts in the same process on a CPU.
    kernel = "auto" if torch.cuda.is_available() else "torch"
    return LynxSelector.from_pretrained(settings.selector).policy(settings.budget, kernel=kernel)


def load_model(load: Callable[[], Any], worker: Any) -> Any:
    """Have a worker load its model, and let that skip experts if it was asked for.

    Raises:
        LynxError: a setting cannot be used, or skipping cannot act here.
    """
    config = worker.vllm_config
    if (names := recorded(config.additional_config)) is not None:
        check_engine(worker)
        result = load()
        Recording.on(worker, find_layers(worker.model_runner.get_model(), names, 0))
        return result
    # Those of the environment are in the additional config, but of an engine whose configuration was made by hand.
    settings = read_settings(os.environ, config.additional_config)
    if settings is None:
        return load()
    policy = load_policy(settings)
    if not policy.skips:
        _logger().info_once("lynx-learn: a budget of 0 leaves the model untouched")
        return load()
    passing = Passing(policy.selector.config.num_experts, config.model_config.hf_text_config.num_hidden_layers)
    with looking(passing):
        result = load()
    attach(worker, settings, policy, passing)
    return result


def attach(worker: Any, settings: Settings, policy: ThresholdPolicy, passing: Passing) -> None:
    """Let the model that a worker has just loaded skip experts, or `refuse`.

    Raises:
        UnsupportedError: skipping cannot act here.
    """
    own, seen = policy.selector.config, passing.identity()
    try:
        check_engine(worker)
        layers = find_layers(worker.model_runner.get_model(), own.layers, own.expert_bytes)
        acting = Acting(worker.model_runner, layers, policy)
        policy.selector.compare(seen)
        acting.attach(settings, first=not worker.rank)
    except LynxError as reason:
        refuse(settings, reason)
        return
    except (ImportError, AttributeError) as error:
        refuse(settings, UnsupportedError(f"this vLLM is built otherwise than the plugin expects ({error})"))
        return
    _logger().info_once(
        "lynx-learn: %s at %s acts on decode steps of %d MoE layers (compared with its model: routers, experts of %d layers, "
        "%d of %d other weights)",
        settings.selector,
        policy.setting,
        len(layers),
        sum(bool(part) for part in seen["experts"]),
        len(seen["rest"].keys() & own.identity.get("rest", {}).keys()),
        len(own.identity.get("rest", {})),
    )


class Step(NamedTuple):
    """A decode step: its first rows are one token each of the requests, any further rows are padding."""

    tokens: int
    kept: tuple[int, ...]
    """Rows of requests that keep all their experts."""

    def masks(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Rows that are real, and among them those that keep everything, `(1, rows)`; None: no row does."""
        place = torch.arange(rows, device=device).unsqueeze(0)
        active = place < self.tokens
        return active, torch.isin(place, torch.tensor(self.kept, device=device)) if self.kept else None


class Acting(Wrapping):
    """A policy on a model in a worker.

    `step` is set while the engine runs a decode step to act on; whatever else runs (prompts, mixed steps, warm-up)
    finds None and is left alone.
    """

    def __init__(self, runner: Any, layers: list[EngineLayer], policy: ThresholdPolicy) -> None:
        super().__init__()
        self.runner, self.layers, self.policy = runner, layers, policy
        check_shape(layers, policy.selector.config)
        policy.bind(layers)
        self.smallest = min(policy.thresholds)
        self.step: Step | None = None
        self.masks: tuple[Tensor, Tensor | None] | None = None
        self.opted: set[str] = set()
        self.scheduled: Any = None
        self.proven = False
        self.reached: set[int] = set()
        self.sums = torch.zeros(len(metrics.SUMS), dtype=torch.int64, device=layers[0].device)
        pinned = self.sums.device.type == "cuda"
        self.host = torch.zeros(len(metrics.SUMS), dtype=torch.int64, pin_memory=pinned)
        self.outcomes = dict.fromkeys((metrics.ACTED, *metrics.SKIPPED), 0)
        self.slots: Any = None
        self.logged = time.monotonic()

    def attach(self, settings: Settings, first: bool) -> None:
        """Wrap the runner and its layers, or nothing; the first worker counts for all, which decide alike."""
        self.settings = settings
        self.first = first
        folder = os.environ.get(metrics.FOLDER)
        if first and folder:
            self.slots = metrics.open_slots(Path(folder), f"worker-{os.getpid()}-{uuid.uuid4().hex[:12]}")
        try:
            self.replace(self.runner, "execute_model", self._execute_model)
            self.replace(self.runner, "_model_forward", self._model_forward)
            self.replace(self.runner, "reload_weights", self._reload_weights)
            for layer in self.layers:
                _LayerHook(self, layer)
        except AttributeError:
            self.detach()
            raise

    def _execute_model(self, own: Callable[..., Any], scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        # In this order: a name may be given to a new request in the step that ends its last one.
        self.opted -= scheduled.finished_req_ids
        for request in scheduled.scheduled_new_reqs:
            out = opted_out(getattr(request.sampling_params, "extra_args", None))
            (self.opted.add if out else self.opted.discard)(request.req_id)
        self.scheduled = scheduled
        try:
            return own(scheduled, *args, **kwargs)
        finally:
            self.scheduled = None

    def _reload_weights(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Weights that are put in place of the loaded ones may be another model's."""
        selector = self.policy.selector
        passing = Passing(selector.config.num_experts, self.runner.model_config.hf_text_config.num_hidden_layers)
        with looking(passing):
            result = own(*args, **kwargs)
        try:
            selector.check(find_layers(self.runner.get_model(), selector.config.layers, 0))
            selector.compare(passing.identity())
        except LynxError as reason:
            self.detach()
            refuse(self.settings, reason)
        return result

    def _model_forward(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outcome, self.step = self._read_step()
        self.masks = None
        self.reached.clear()
        try:
            result = own(*args, **kwargs)
        finally:
            acted, self.step = self.step, None
        if acted is not None and not self.proven:
            self._prove()
        if outcome:
            self.outcomes[outcome] += 1
            self._publish()
        return result

    def _read_step(self) -> tuple[str, Step | None]:
        """What the scheduler has planned, and the decode step that it is if it is one to act on."""
        if self.scheduled is None:  # a warm-up
            return "", None
        batch = self.runner.input_batch
        count = batch.num_reqs
        planned = self.scheduled.num_scheduled_tokens
        # The last token of a prompt alone in its chunk is still prompt.
        generating = batch.num_computed_tokens_cpu[:count] >= batch.num_prompt_tokens[:count]
        decodes = [bool(done) and planned[name] == 1 for name, done in zip(batch.req_ids, generating, strict=True)]
        if not all(decodes):
            return "mixed" if any(decodes) else "prefill", None
        kept = tuple(row for row, name in enumerate(batch.req_ids) if name in self.opted)
        if len(kept) == count:
            return "opted_out", None
        if count - len(kept) < self.smallest:
            return "below_smallest_size", None
        return metrics.ACTED, Step(count, kept)

    def _prove(self) -> None:
        """After the first decode step: every layer's decision must have reached its experts."""
        missing = [layer.name for layer in self.layers if layer.index not in self.reached]
        if not missing:
            self.proven = True
            _logger().info(
                "lynx-learn: self-check passed, every MoE layer ran what was decided in the first decode step"
            )
            return
        self.detach()
        reason = UnsupportedError(
            f"in the first decode step the experts of {len(missing)} of {len(self.layers)} layers ({missing[0]}, …) did "
            "not run what was decided"
        )
        try:
            refuse(self.settings, reason)
        except LynxError as error:
            say(error)
            raise

    def _publish(self) -> None:
        if not self.first:
            return
        # Without waiting for the device: there the sums may lag behind by a step.
        self.host.copy_(self.sums, non_blocking=True)
        if self.slots is not None:
            self.slots[:] = [*self.host.tolist(), *self.outcomes.values(), len(self.layers)]
        if time.monotonic() - self.logged > LOG_EVERY_S:
            self.logged = time.monotonic()
            routed, loaded = self.host[:2].tolist()
            share = max(self.outcomes[metrics.ACTED], 1) * len(self.layers)
            _logger().info(
                "lynx-learn: steps %s; distinct experts per layer %.1f -> %.1f in those acted on",
                ", ".join(f"{name} {count}" for name, count in self.outcomes.items() if count),
                routed / share,
                loaded / share,
            )


class _LayerHook:
    """One MoE layer's routing and experts."""

    def __init__(self, acting: Acting, layer: EngineLayer) -> None:
        self.acting, self.layer = acting, layer
        runner = layer.runner
        # The runner may scale what the experts return, instead of the router its weights.
        self.scale = float(runner.routed_scaling_factor)
        # Until a reduction sums the workers' outputs, one of them adds for all.
        self.adds = runner._fused_output_is_reduced or _tensor_rank() == 0
        # On the CPU the kernel multiplies rows of weight 0 like any other, and which rows stay is known without waiting.
        self.gathers = layer.device.type == "cpu"
        self.decided = False
        self.ids: Tensor | None = None
        self.addition: Tensor | None = None
        acting.replace(runner.router, "_compute_routing", self.route)
        acting.replace(runner.routed_experts, "forward_modular", self.run_experts)

    def route(
        self,
        own: Callable[..., tuple[Tensor, Tensor]],
        hidden_states: Tensor,
        router_logits: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        weights, ids = own(hidden_states, router_logits, *args, **kwargs)
        step = self.acting.step
        self.ids = self.addition = None
        self.decided = step is not None
        if step is None:
            return weights, ids
        if self.acting.masks is None:
            self.acting.masks = step.masks(len(ids), ids.device)
        active, kept = self.acting.masks
        routing = Routing(
            hidden_states[:, : self.layer.hidden_size].unsqueeze(0),
            router_logits.unsqueeze(0),
            ids.long().clamp_min(0).unsqueeze(0),  # rows of padding may name no expert
            (weights * self.scale).unsqueeze(0),
            active,
        )
        decision = self.acting.policy.decide(self.layer, routing, kept)
        assert decision.loads is not None
        before, after = decision.loads
        answered = decision.answered.sum() if decision.answered is not None else torch.zeros_like(before.sum())
        assigned = active.sum() * self.layer.top_k
        self.acting.sums += torch.stack([before.sum(), after.sum(), assigned, answered])
        if decision.addition is not None and self.adds:
            self.addition = decision.addition[0] / self.scale
        new = torch.where(ids < 0, ids, decision.indices[0].to(ids.dtype))
        if not self.acting.proven:
            self.ids = new
        return (decision.weights[0] / self.scale).to(weights.dtype), new

    def run_experts(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = partial(_run_kept, own) if self.decided and self.gathers else own
        output = run(*args, **kwargs)
        if self.ids is not None and torch.equal(kwargs["topk_ids"].long(), self.ids.long()):
            self.acting.reached.add(self.layer.index)
        if self.addition is not None:
            output[:, : self.layer.hidden_size] += self.addition.to(output.dtype)
        self.ids = self.addition = None
        return output


def _run_kept(own: Callable[..., Tensor], x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **kwargs: Any) -> Tensor:
    """As `own`, a layer's `forward_modular`, but only for assignments that stay, each as a token with one expert."""
    token, place = topk_weights.nonzero(as_tuple=True)
    if not len(token):
        return own(x=x, topk_weights=topk_weights, topk_ids=topk_ids, **kwargs)
    weights, ids = (part[token, place].unsqueeze(-1) for part in (topk_weights, topk_ids))
    rows = own(x=x[token], topk_weights=weights, topk_ids=ids, **kwargs)
    total = torch.zeros(len(x), rows.shape[-1], dtype=torch.float32).index_add_(0, token, rows.float())
    return total.to(rows.dtype)


def say(error: LynxError) -> None:
    _logger().error("lynx-learn: %s", error)
    metrics.refused(str(error))


def _tensor_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.plugins.lynx_learn")
