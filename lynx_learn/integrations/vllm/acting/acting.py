"""A policy on a model in a worker: around the model runner's step, which knows what is run for whom."""

import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....errors import LynxError
from ....moe.decision import Sums
from ....selector.selector import ThresholdPolicy
from .. import metrics as metrics
from ..layers import EngineLayer, Wrapping, check_shape, find_layers, looking, passing_of
from ..settings import Settings, UnsupportedError, asked_budget, logger, refuse
from .audit import Audit, check_forward
from .layer import NAME, LayerHook
from .rows import Levels, Rows

LOG_EVERY_S = 60.0
CHECK_EVERY = 64
"""Steps acted on from one self-check to the next."""


class Acting(Wrapping):
    """Fills `rows` before each step of the engine, and clears it afterwards.

    Whatever else runs (warm-up, what a graph is captured of) finds it clear. All that stops skipping leaves it so.
    """

    def __init__(self, runner: Any, layers: list[EngineLayer], policy: ThresholdPolicy, settings: Settings) -> None:
        super().__init__()
        self.runner, self.layers, self.policy, self.settings = runner, layers, policy, settings
        check_shape(layers, policy.selector.config)
        policy.bind(layers)
        device = layers[0].device
        config, graphs = runner.vllm_config, runner.vllm_config.compilation_config
        captured = graphs.max_cudagraph_capture_size if graphs.cudagraph_mode else 0
        # Rows may be padded to a multiple of the workers that share them.
        most = config.scheduler_config.max_num_batched_tokens + config.parallel_config.tensor_parallel_size
        self.rows = Rows(most, captured, device)
        self.levels = Levels(policy.thresholds, settings.budget, policy.selector.config)
        self.asked: dict[str, float] = {}
        """Budgets of requests that ask for another one than the server's."""
        self.scheduled: Any = None
        self.outcome: str | None = None
        self.stopped = False
        self.sums = torch.zeros(len(layers), len(Sums), dtype=torch.int64, device=device)
        self.host = torch.zeros(self.sums.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.checked: torch.Tensor | None = None
        self.outcomes = dict.fromkeys((metrics.ACTED, *metrics.SKIPPED), 0)
        self.tokens = dict.fromkeys(metrics.ASKED, 0)
        self.audit = Audit(runner.model, self.rows, settings.audit_every) if settings.audit_every else None
        self.own_budget = np.empty(0, np.int64)
        """Rows of the step that skip at the server's budget, one of each request."""
        self.slots: Any = None
        self.logged = time.monotonic()

    def attach(self, rank: int, tensor_rank: int) -> None:
        """Wrap the runner and its layers, or nothing.

        Args:
            rank: of the worker; the first one counts for all, which decide alike.
            tensor_rank: among those that share its layers.
        """
        self.first = not rank
        folder = os.environ.get(metrics.FOLDER)
        if self.first and folder:
            self.slots = metrics.open_slots(Path(folder), f"worker-{os.getpid()}-{uuid.uuid4().hex[:12]}")
        try:
            self.give(self.runner, NAME, self)
            self.replace(self.runner, "execute_model", self._execute_model)
            if hasattr(self.runner, "_model_forward"):
                self.replace(self.runner, "_model_forward", self._model_forward)
            else:
                self.replace(self.runner, "prepare_inputs", self._prepare_inputs)
                if self.audit is not None:
                    check_forward(self.runner.model)
                    self.replace(self.runner.model, "forward", self._forward)
            self.replace(self.runner, "reload_weights", self._reload_weights)
            for layer in self.layers:
                LayerHook(self, layer, self.policy, self.rows, self.sums[layer.index], tensor_rank)
        except (AttributeError, LynxError):
            self.detach()
            raise

    def stop(self) -> None:
        """Skip nothing from the next step on; what was compiled or captured stays as it is."""
        self.stopped = True

    def _execute_model(self, own: Callable[..., Any], scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        # In this order: a name may be given to a new request in the step that ends its last one.
        for name in scheduled.finished_req_ids:
            self.asked.pop(name, None)
        for request in scheduled.scheduled_new_reqs:
            budget = asked_budget(getattr(request.sampling_params, "extra_args", None), self.settings.budget)
            self.asked.pop(request.req_id, None)
            if budget != self.settings.budget:
                self.asked[request.req_id] = budget
        self.scheduled, self.outcome = scheduled, None
        try:
            result = own(scheduled, *args, **kwargs)
        finally:
            self.scheduled = None
            self.rows.clear()
        if self.outcome is not None:
            self.outcomes[self.outcome] += 1
            self._fetch(non_blocking=True)
            if self.outcome == metrics.ACTED:
                self._check()
            self._publish()
        elif not scheduled.num_scheduled_tokens:
            # The engine runs nothing when its last request has ended: what lagged behind is waited for now.
            self._fetch(non_blocking=False)
            self._publish()
        return result

    def _model_forward(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Of the first model runner; warm-up comes here without a schedule."""
        if self.scheduled is not None:
            batch, planned = self.runner.input_batch, self.scheduled.num_scheduled_tokens
            names = batch.req_ids
            tokens = np.fromiter((planned[name] for name in names), np.int64, len(names))
            # The last token of a prompt alone in its chunk is still prompt.
            computed = batch.num_computed_tokens_cpu[: batch.num_reqs]
            self.plan(names, tokens, self._drafts(names), computed >= batch.num_prompt_tokens[: batch.num_reqs])
        return self._forward(own, *args, **kwargs)

    def _forward(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's run of a step that is planned."""
        acted = self.outcomes[metrics.ACTED]
        audit = self.audit if self.rows.acts and len(self.own_budget) else None
        if audit is None or not audit.due(acted):
            return own(*args, **kwargs)
        return audit.run(own, audit.choose(self.own_budget, acted), *args, **kwargs)

    def _prepare_inputs(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Of the second model runner, which comes here for what requests are run, and for nothing else."""
        batch = own(*args, **kwargs)
        self.plan(batch.req_ids, batch.num_scheduled_tokens, self._drafts(batch.req_ids), ~batch.is_prefilling_np)
        return batch

    def _drafts(self, names: Sequence[str]) -> Any:
        """How many tokens of each request in this step are drafts, which the step verifies `(requests,)`."""
        drafts = self.scheduled.scheduled_spec_decode_tokens
        return np.fromiter((len(drafts.get(name, ())) for name in names), np.int64, len(names)) if drafts else 0

    def plan(self, names: Sequence[str], tokens: Any, drafts: Any, generating: Any) -> None:
        """Fill `rows` for a step.

        Args:
            names: of its requests, in the order of their rows.
            tokens: of each of them in this step `(requests,)`.
            drafts: how many of these are drafts `(requests,)`, or 0.
            generating: whether its prompt is done `(requests,)`.
        """
        if self.stopped:
            return
        # Several tokens at once that are no drafts are generated text that is computed again.
        decodes = generating & (tokens == 1 + drafts)
        budgets = np.array([self.asked.get(name, self.settings.budget) for name in names])
        out, own = (int(tokens[decodes & (budgets == budget)].sum()) for budget in (0.0, self.settings.budget))
        for asked, count in zip(metrics.ASKED, (own, int(tokens[decodes].sum()) - own - out, out), strict=True):
            self.tokens[asked] += count
        layer = self.layers[0]
        if not decodes.any():
            self.outcome = "prefill"
        # Prompts keep all their experts; where they are long, hardly one is left that they do not need.
        elif tokens[~decodes].sum() * layer.top_k > layer.num_experts:
            self.outcome = "mixed"
        else:
            rows = np.repeat(np.where(decodes, budgets, 0.0), tokens)
            self.outcome, scale = self.levels.scales(rows, self.settings.budget)
            if self.outcome == metrics.ACTED:
                self.rows.fill(scale)
                # Each request's first: those behind it may be drafts that are not taken.
                first = np.cumsum(tokens) - tokens
                self.own_budget = first[(budgets == self.settings.budget) & (scale[first] == 1)]

    def _reload_weights(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Weights that are put in place of the loaded ones may be another model's."""
        selector = self.policy.selector
        passing = passing_of(selector.config.num_experts, self.runner.model_config)
        with looking(passing, self.runner.model_config):
            result = own(*args, **kwargs)
        try:
            selector.check(find_layers(self.runner.get_model(), selector.config.layers, 0))
            selector.compare(passing.identity())
        except LynxError as reason:
            self.stop()
            refuse(self.settings, reason)
        return result

    def _check(self) -> None:
        """Now and again: every layer must have decided, and its experts must have been given what it decided."""
        if (self.outcomes[metrics.ACTED] - 1) % CHECK_EVERY:
            return
        # Later ones do not wait for the device: there the sums may lag behind by a step.
        sums = (self.sums if self.checked is None else self.host).to("cpu", copy=True)
        risen = sums[:, Sums.ASSIGNMENTS] - (0 if self.checked is None else self.checked)
        wrong = (risen <= 0) | (sums[:, Sums.CHECK] != 0)
        if not wrong.any():
            if self.checked is None:
                logger().info("lynx-learn: self-check passed, every MoE layer ran what was decided for it")
            self.checked = sums[:, Sums.ASSIGNMENTS]
            return
        self.stop()
        missing = [layer.name for layer, is_wrong in zip(self.layers, wrong.tolist(), strict=True) if is_wrong]
        reason = UnsupportedError(
            f"in decode steps the experts of {len(missing)} of {len(self.layers)} layers ({missing[0]}, …) did not run "
            "what was decided"
        )
        try:
            refuse(self.settings, reason)
        except LynxError as error:
            say(error)
            raise

    def _fetch(self, non_blocking: bool) -> None:
        """What the device has summed."""
        self.host.copy_(self.sums, non_blocking=non_blocking)
        if self.audit is not None:
            self.audit.host.copy_(self.audit.sums, non_blocking=non_blocking)

    def _publish(self) -> None:
        if not self.first:
            return
        # As for the check, the sums may lag behind by a step while there is another one to come.
        totals = self.host.sum(0)[: len(metrics.SUMS)].tolist()
        if self.slots is not None:
            audited = [0.0] * len(metrics.AUDIT) if self.audit is None else self.audit.host.tolist()
            gauges = (len(self.layers), self.settings.budget, self.layers[0].expert_bytes)
            self.slots[:] = [*totals, *self.outcomes.values(), *self.tokens.values(), *audited, *gauges]
        if time.monotonic() - self.logged > LOG_EVERY_S:
            self.logged = time.monotonic()
            share = max(self.outcomes[metrics.ACTED], 1) * len(self.layers)
            logger().info(
                "lynx-learn: steps %s; distinct experts per layer %.1f -> %.1f in those acted on",
                ", ".join(f"{name} {count}" for name, count in self.outcomes.items() if count),
                totals[0] / share,
                totals[1] / share,
            )


def say(error: LynxError) -> None:
    logger().error("lynx-learn: %s", error)
    metrics.refused(str(error))
