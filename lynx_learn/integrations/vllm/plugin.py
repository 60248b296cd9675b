"""The vLLM plugin: skip experts at decode in `vllm serve` and `LLM(...)`, asked for by one setting.

vLLM calls `register` in every process it starts. Nothing is imported from vLLM before that, because vLLM only logs a
plugin that cannot be imported and then serves without it. The worker that loads a model attaches `engine.Acting` to it.
"""

import logging
import os

from .settings import (
    UnsupportedError,
    check_version,
    engine_version,
    read_settings,
    refuse,
)


def register() -> None:
    """Entry point of `vllm.general_plugins`.

    Raises:
        LynxError: what is asked for in the environment cannot be had; raised in the first process already, so that
            nothing else starts.
    """
    settings = read_settings(os.environ)
    from . import engine as vllm_engine
    from . import metrics as vllm_metrics

    if settings is not None:
        vllm_engine.load_policy(settings)
        if not check_version(settings):
            return
    vllm_metrics.expose()
    # Also when nothing is asked for here: the additional config is only known to who loads the model.
    try:
        vllm_engine.install()
    except (ImportError, AttributeError) as error:
        reason = UnsupportedError(f"vLLM {engine_version()} is built otherwise than the plugin expects ({error})")
        if settings is not None:
            refuse(settings, reason)
        else:
            logging.getLogger(__name__).warning("lynx-learn looks at no additional config: %s", reason)
