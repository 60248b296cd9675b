"""`--help` as a person reads it: options spelled as they are typed, one line of text, defaults in the same spelling."""

import typing
from argparse import Action
from typing import Any

from jsonargparse import DefaultHelpFormatter

WIDTH = 80
# What stands for a value of a type.
PLACEHOLDERS = {int: "N", float: "X", bool: "true|false", str: "TEXT"}


class HelpFormatter(DefaultHelpFormatter):
    """Dashes instead of underscores, lists as words, and no types of Python."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=WIDTH, max_help_position=30)  # type: ignore[no-untyped-call]

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = next((word for word in action.option_strings if word.startswith("--")), action.option_strings[0])
        value = placeholder(action)
        return f"{name.replace('_', '-')} {value}".rstrip()

    def _expand_help(self, action: Action) -> str:
        text = (action.help or "").rstrip(".")
        if action.dest in ("help", "config", "print_config"):
            return {"help": "show this help", "print_config": "print all options as YAML, for --config"}.get(
                action.dest, text
            )
        if action.required:
            return f"{text} (required)"
        return text if action.default in (None, [], {}) else f"{text} (default: {spelled(action.default)})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def placeholder(action: Action) -> str:
    """What follows an option's name: its choices, or what stands for a value of its type."""
    if action.dest in ("help", "print_config"):
        return ""
    return _of_type(getattr(action, "_typehint", str))


def _of_type(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, arguments))
    if typing.get_origin(hint) is list:
        return f"{_of_type(arguments[0])} …"
    if typing.get_origin(hint) is dict:
        return "JSON"
    known = [kind for kind in arguments if kind is not type(None)]  # of an optional value
    return _of_type(known[0]) if known else PLACEHOLDERS.get(hint, "TEXT")


def spelled(value: object) -> str:
    """A default as it would be typed."""
    if isinstance(value, list | tuple):
        return " ".join(map(spelled, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
