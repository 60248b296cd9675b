"""What mends reasons: another configuration, and the command that makes it."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, fields
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from ..settings import ON_UNSUPPORTED
from .reasons import Reason

# Options of vLLM's command that have no meaning without the one that they belong to; a `*` stands for any end.
BELONGS = {
    "speculative_config": ("spec_*",),
    "enable_lora": ("lora_*", "max_lora*", "max_cpu_loras", "fully_sharded_loras", "default_mm_loras"),
    "data_parallel_size": ("data_parallel_*",),
    "enable_eplb": ("eplb_*", "num_redundant_experts"),
    "enable_dbo": ("dbo_*", "ubatch_size"),
}

Again = Callable[[Mapping[str, Any], Mapping[str, str]], Any]
"""Makes the configuration once more, with other arguments of vLLM and other variables of the environment."""


def mends(found: Sequence[Reason]) -> tuple[dict[str, Any], dict[str, str]]:
    """Arguments and variables that mend the reasons, together."""
    options = {name: value for reason in found for name, value in reason.options.items()}
    return options, {name: value for reason in found for name, value in reason.environment.items()}


def make_again(own: Callable[..., Any], args: Any, *more: Any, **kwargs: Any) -> Again:
    """For `behind`: `own` makes a configuration of `args`, of which a copy is kept as it is now."""
    before = copy(args)
    defaults = {part.name: part for part in fields(args)}

    def again(options: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
        other = copy(before)
        for part in defaults.values():
            for name in options:
                if _belongs(part.name, name):
                    made = part.default if part.default_factory is MISSING else part.default_factory()
                    setattr(other, part.name, made)
        for name, value in options.items():
            outer, _, inner = name.partition(".")
            if inner:
                setattr(other, outer, copy(getattr(other, outer)))
                setattr(getattr(other, outer), inner, value)
            elif not _left_out(value):
                setattr(other, name, value)
        saved = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            return own(other, *more, **kwargs)
        finally:
            for name, value in saved.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    return again


def explain(found: Sequence[Reason], works: bool) -> str:
    """All reasons, and the command that mends those that something in the command or the environment mends."""
    told = found[0].text if len(found) == 1 else f"skipping cannot act here, for {len(found)} reasons:"
    if not any(reason.mistake for reason in found):
        told += f" (or set {ON_UNSUPPORTED}=warn to serve untouched)"
    lines = [told, *(f"{number}. {reason.text}" for number, reason in enumerate(found, 1) if len(found) > 1)]
    mending = [reason for reason in found if reason.options or reason.environment]
    if mending and (command := mended(mending)):
        whole = works and len(mending) == len(found)
        lines += ["this works:" if whole else "with what an option can mend:", command]
    return "\n".join(lines)


def mended(found: Sequence[Reason]) -> str:
    """The command that this process was started with, or the call of `LLM`, with what mends the reasons; empty where an
    option to leave out stands in a file."""
    options, environment = mends(found)
    prefix = "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items())
    words = server_command()
    if words is None:
        call = ", ".join(["LLM(…", *(_argument(name, value) for name, value in options.items())]) + ")"
        return prefix + call if options else f"{prefix}python …"
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    actions = make_arg_parser(FlexibleArgumentParser())._actions
    for name, value in options.items():
        kept = without(words, [action for action in actions if _belongs(action.dest, name)])
        if len(kept) == len(words) and "--config" in words and _left_out(value):
            return ""
        outer, dot, inner = name.partition(".")
        option = f"--{outer.replace('_', '-')}"
        if dot:  # vLLM puts parts together only where they are written in one way
            forms = [form for action in actions if action.dest == outer for form in action.option_strings]
            option = next((form for form in forms if any(word.startswith(f"{form}.") for word in words)), option)
            option = f"{option}.{inner}"
        more = (
            []
            if value is True
            else [json.dumps(value) if isinstance(value, Mapping) else getattr(value, "name", str(value))]
        )
        words = kept if _left_out(value) else [*kept, option, *more]
    return prefix + shlex.join(words)


def _argument(name: str, value: Any) -> str:
    outer, _, inner = name.partition(".")
    return f"{outer}={ {inner: value.name} }" if inner else f"{name}={value!r}"


def _left_out(value: Any) -> bool:
    """Whether a value of an argument is what it is when it is not given."""
    return value is None or value is False or (value == 1 and value is not True)


def _belongs(other: str, name: str) -> bool:
    rules = BELONGS.get(name, ())
    return other == name or any(other.startswith(rule[:-1]) if rule[-1] == "*" else other == rule for rule in rules)


def server_command() -> list[str] | None:
    """The words that started this process, if they are those of a server of vLLM and no other program's."""
    words = list(sys.orig_argv)
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    if parent_process() is not None:
        return None
    if len(words) > 1 and Path(words[1]).name == "vllm":
        return ["vllm", *words[2:]]
    return words if main is not None and main.name.startswith("vllm.") else None


def without(words: Sequence[str], actions: Iterable[Any]) -> list[str]:
    """A command without the options of some of its parser's actions, however they are written (`--a-b 1`, `--a_b=1`, `--a.b 1`)."""
    forms = {form: action for action in actions for form in action.option_strings}
    kept: list[str] = []
    dropped = None  # the option whose values come next, and how many of them there have been
    for word in words:
        if not word.startswith("-") and dropped is not None and (dropped[0] != 1 or not dropped[1]):
            dropped = (dropped[0], dropped[1] + 1)
            continue
        dropped = None
        form = word.partition("=")[0].partition(".")[0].rstrip("+").replace("_", "-")
        if not word.startswith("-") or form not in forms:
            kept.append(word)
        elif "=" not in word and forms[form].nargs != 0:
            dropped = (1 if forms[form].nargs is None else 0, 0)
    return kept
