"""The vLLM plugin: skip experts at decode in `vllm serve` and `LLM(...)`, asked for by one setting.

vLLM calls `register` in every process it starts. Nothing is imported from vLLM before that, because vLLM only logs a
plugin that cannot be imported and then serves without it. Of vLLM's classes these methods are wrapped: the one that
makes an engine's configuration, where settings are read and checked against it; a worker's `load_model`, after which
`acting.Acting` is attached to what was loaded; what checks a request when it comes; and what names blocks of the prefix
cache.
"""

import logging
import os
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

from ...errors import LynxError, OptionError
from .settings import (
    KEY,
    Settings,
    UnsupportedError,
    asked_budget,
    check_request,
    engine_version,
    read_settings,
    recorded,
    refuse,
)


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
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if hasattr(EngineArgs, "lynx_learn"):
        return
    EngineArgs.lynx_learn = True
    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    # Where a worker's wrapper has no such method of its own, it passes the call on to its worker.
    if not hasattr(WorkerWrapperBase, "load_model"):
        WorkerWrapperBase.load_model = lambda wrapper, *a, **k: wrapper.worker.load_model(*a, **k)
    _wrap(WorkerWrapperBase, "load_model", _load_model)
    _wrap(InputProcessor, "_validate_params", _validate_params)
    _wrap(EngineCore, "preprocess_add_request", _add_request)
    # By this one of its parts, as others import the whole under a name of their own.
    _wrap(kv_cache_utils, "_gen_prompt_embeds_extra_hash_keys", _block_keys)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Have `wrapper` called instead of what `owner` has under that name, with that as its first argument."""
    own = getattr(owner, name)

    @wraps(own)
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(own, *args, **kwargs)

    setattr(owner, name, call)


def _create_engine_config(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from .checks.mending import make_again
    from .checks.prepare import prepare

    again = make_again(own, *args, **kwargs)
    config = own(*args, **kwargs)
    prepare(config, again)
    return config


def _load_model(own: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    from . import engine as vllm_engine
    from .acting.acting import say

    try:
        return vllm_engine.load_model(partial(own, wrapper, *args, **kwargs), wrapper.worker)
    except LynxError as error:
        say(error)
        raise


def _validate_params(own: Callable[..., Any], processor: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """Admission, in the process that a client talks to: the OpenAI server answers this error with status 400."""
    from vllm.exceptions import VLLMValidationError

    settings = _settings(processor.vllm_config)
    if settings is not None:
        try:
            check_request(getattr(params, "extra_args", None), partial(_budgets, settings.selector))
        except OptionError as error:
            raise VLLMValidationError(str(error), parameter=f"vllm_xargs.{KEY}") from None
    return own(processor, params, *args, **kwargs)


def _add_request(own: Callable[..., Any], core: Any, request: Any) -> Any:
    """Before the first request the engine's way of hashing is wrapped: it made it while plugins were being loaded."""
    if not hasattr(core, "lynx_learn"):
        core.lynx_learn = True
        settings = _settings(core.vllm_config)
        if settings is not None and settings.budget and core.request_block_hasher is not None:
            core.request_block_hasher = partial(_hash_blocks, core.request_block_hasher, settings.reuse_generated)
    return own(core, request)


def _hash_blocks(own: Callable[[Any], Any], reuse: bool, request: Any) -> Any:
    """Say of a new request which blocks of its keys and values are not to be taken for another's, then hash as always.

    Prompts are run untouched, so everybody may read their blocks. Those that hold what was generated with fewer experts
    have a hash that no prompt has: only the request itself finds them again, after a preemption. With `reuse`, prompts
    that skip find them, and requests that opted out share a cache of their own.
    """
    if not hasattr(request, "lynx_blocks"):
        out = not asked_budget(getattr(request.sampling_params, "extra_args", None), 1.0)
        # The first prompt's end: a session that is continued counts what it has generated as prompt.
        first = 0 if reuse else request.num_prompt_tokens
        request.lynx_blocks = ("untouched" if out else "generated", first) if out is reuse else None
    return own(request)


def _block_keys(own: Callable[..., list[Any]], request: Any, start: int, end: int) -> list[Any]:
    """What goes into the hash of a block beside its tokens."""
    mark = getattr(request, "lynx_blocks", None)
    return own(request, start, end) + ([(KEY, mark[0])] if mark is not None and end > mark[1] else [])


@cache
def _budgets(selector: str) -> tuple[float, ...]:
    """Those that a selector is calibrated for."""
    from ...selector.selector import LynxSelector

    return tuple(sorted(map(float, LynxSelector.from_pretrained(selector).config.thresholds.get("kl", {}))))


def _settings(config: Any) -> Settings | None:
    """Those that the first process has put into the configuration."""
    given = config.additional_config
    return None if recorded(given) is not None else read_settings({}, given)
