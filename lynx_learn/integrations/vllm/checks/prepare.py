"""What the first process does with a configuration: all reasons at once, and the command that works."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ....errors import OptionError
from ..settings import KEY, UnsupportedError, read_settings, recorded, warn
from .mending import Again, explain, mends
from .reasons import Reason, check, known_reasons, reasons, recording_reasons


def prepare(config: Any, again: Again) -> None:
    """Check a `VllmConfig` that the first process has just made, and give it the settings of the environment, so that
    workers that do not inherit it (Ray's, other nodes') know them, and the key of what was compiled does.

    Raises:
        UnsupportedError: with every reason, ending in the command that works.
    """
    given = config.additional_config
    if recorded(given) is not None:
        check(recording_reasons(config))
        return
    try:
        settings = read_settings(os.environ, given)
    except OptionError as error:
        settings, found = None, [Reason(str(error), mistake=True), *known_reasons(config)]
    else:
        if settings is None:
            return
        found = reasons(config, settings)
    if found:
        if settings is None or settings.on_unsupported != "warn" or any(reason.mistake for reason in found):
            raise UnsupportedError(explain(*behind(found, again)))
        warn("; ".join(reason.text for reason in found))
        settings = settings.untouched()
    assert settings is not None
    if isinstance(given, Mapping):
        config.additional_config = {**given, KEY: settings.to_config()}


def behind(found: Sequence[Reason], again: Again) -> tuple[list[Reason], bool]:
    """The reasons, with those that show only when the others are mended (vLLM compiles nothing where LoRA is, say), and
    whether a configuration with all mended has been made and has none left."""
    found = list(found)
    while True:
        options, environment = mends(found)
        if not options and not environment:
            return found, False
        try:
            config = again(options, environment)
        except Exception:  # vLLM's own checks raise many kinds: then it is not known to work
            return found, False
        known = {reason.text for reason in found}
        more = [reason for reason in known_reasons(config) if reason.text not in known]
        if not more:
            return found, not known_reasons(config)
        found += more
