"""The vLLM plugin: skip experts at decode in `vllm serve` and `LLM(...)`, asked for by one setting.

vLLM calls `register` in every process it starts. Nothing is imported from vLLM before that, because vLLM only logs a
plugin that cannot be imported and then serves without it. Of vLLM's classes these methods are wrapped: the one that
makes an engine's configuration, where settings are read and checked against it; a worker's `load_model`, after which
`engine.Acting` is attached to what was loaded; a request's question whether it may read cached prefixes.
"""

import logging
import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from ...errors import LynxError
from .settings import UnsupportedError, engine_version, opted_out, read_settings, refuse


def register() -> None:
    """Entry point of `vllm.general_plugins`.

    Raises:
        LynxError: this vLLM is built otherwise than the plugin expects, and skipping is asked for in the environment.
    """
    from . import metrics as vllm_metrics

    vllm_metrics.expose()
    # Also when nothing is asked for here: the additional config is only known to who makes the configuration.
    try:
        install()
    except (ImportError, AttributeError) as error:
        reason = UnsupportedError(f"vLLM {engine_version()} is built otherwise than the plugin expects ({error})")
        settings = read_settings(os.environ)
        if settings is not None:
            refuse(settings, reason)
        else:
            logging.getLogger(__name__).warning("lynx-learn looks at no additional config: %s", reason)


def install() -> None:
    """Wrap the classes of vLLM in this process, once."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.request import Request
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if hasattr(EngineArgs, "lynx_learn"):
        return
    EngineArgs.lynx_learn = True
    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    # Where a worker's wrapper has no such method of its own, it passes the call on to its worker.
    if not hasattr(WorkerWrapperBase, "load_model"):
        WorkerWrapperBase.load_model = lambda wrapper, *a, **k: wrapper.worker.load_model(*a, **k)
    _wrap(WorkerWrapperBase, "load_model", _load_model)
    _wrap(Request, "get_skip_reading_prefix_cache", _may_not_read)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Have `wrapper` called instead of what `owner` has under that name, with that as its first argument."""
    own = getattr(owner, name)

    @wraps(own)
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(own, *args, **kwargs)

    setattr(owner, name, call)


def _create_engine_config(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from .checks import make_again, prepare

    again = make_again(own, *args, **kwargs)
    config = own(*args, **kwargs)
    prepare(config, again)
    return config


def _load_model(own: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    from . import engine as vllm_engine

    result = own(wrapper, *args, **kwargs)
    try:
        vllm_engine.attach(wrapper.worker)
    except LynxError as error:
        vllm_engine.say(error)
        raise
    return result


def _may_not_read(own: Callable[..., bool], request: Any) -> bool:
    # Cached prefixes may hold what other requests generated with fewer experts.
    params = request.sampling_params
    return own(request) or (params is not None and opted_out(params.extra_args))
