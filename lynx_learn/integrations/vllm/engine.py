"""A worker loads its model, and is given what skips experts in it, or what records its traces.

All that is wrapped is wrapped on the instances of that one model, and before its first step, which compiles it.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from ...errors import LynxError
from ...moe.identity import Passing
from ...selector.config import SelectorConfig, outside
from ...selector.selector import LynxSelector, ThresholdPolicy
from .acting.acting import Acting
from .checks.reasons import audit_reasons, check, engine_reasons, recording_reasons
from .layers import find_layers, looking, passing_of, steering
from .record import Recording
from .settings import Settings, UnsupportedError, logger, read_settings, recorded, refuse


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
        check(recording_reasons(config))
        result = load()
        Recording.on(worker, find_layers(worker.model_runner.get_model(), names, 0))
        return result
    # Those of the environment are in the additional config, but of an engine whose configuration was made by hand.
    settings = read_settings(os.environ, config.additional_config)
    if settings is None:
        return load()
    policy = load_policy(settings)
    if not policy.skips:
        logger().info_once("lynx-learn: a budget of 0 leaves the model untouched")
        return load()
    passing = passing_of(policy.selector.config.num_experts, config.model_config)
    # Where untouched is good enough, vLLM's own choice of a kernel is.
    steered = steering() if settings.on_unsupported == "fail" else nullcontext()
    with looking(passing, config.model_config), steered:
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
        # Again: a configuration may have been made without the plugin's first process.
        check(engine_reasons(worker.vllm_config) + audit_reasons(worker.vllm_config, settings))
        layers = find_layers(worker.model_runner.get_model(), own.layers, own.expert_bytes)
        acting = Acting(worker.model_runner, layers, policy, settings)
        policy.selector.compare(seen)
        acting.attach(worker.rank, _tensor_rank())
    except LynxError as reason:
        refuse(settings, reason)
        return
    except (ImportError, AttributeError) as error:
        refuse(settings, UnsupportedError(f"this vLLM is built otherwise than the plugin expects ({error})"))
        return
    say_of_drafts(worker.vllm_config.speculative_config, own)
    logger().info_once(
        "lynx-learn: %s at %s acts on decode steps of %d MoE layers (compared with its model: routers, experts of %d layers, "
        "%d of %d other weights)",
        settings.selector,
        policy.setting,
        len(layers),
        sum(bool(part) for part in seen["experts"]),
        len(seen["rest"].keys() & own.identity.get("rest", {}).keys()),
        len(own.identity.get("rest", {})),
    )


def say_of_drafts(speculation: Any, selector: SelectorConfig) -> None:
    """Say in a line that steps hold more or fewer drafts than those that budgets are certified for.

    Thresholds go by a step's rows, whoever they are of, so that they are of the right size in any case.
    """
    drafts = int(speculation.num_speculative_tokens) if speculation is not None else 0
    certified = {"speculative_tokens": 0, **selector.calibration.get("kl", {})}
    if found := outside(certified, {"speculative_tokens": drafts}):
        logger().warning_once(
            "lynx-learn: the budget is not certified for %s: run `lynx-learn calibrate --speculative_tokens %d`",
            found[0],
            drafts,
        )


def _tensor_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())
