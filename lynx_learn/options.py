"""Words of the command line turned into a command's options, each a field of its dataclass; and what is said where they cannot be."""

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Sequence
from typing import Any

from .errors import LynxError

# How a value of a type is told to people.
EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    dict: "NAME=VALUE pairs, or JSON",
}


def parser_of(command: str, options: type, examples: Sequence[str] = ()) -> Any:
    """The parser of a command; its help has one line for each field of the options class, and the examples last."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    from .show.help import HelpFormatter

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    needed = "".join(f" {typed(f.name)} {f.name.upper()}" for f in dataclasses.fields(options) if _is_required(f))
    parser = ArgumentParser(
        prog=f"lynx-learn {command}",
        usage=f"lynx-learn {command}{needed} [options]",
        exit_on_error=False,
        description=(options.__doc__ or "").splitlines()[0],
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML file with options; --print-config writes one")
    parser.add_class_arguments(options, as_group=False)
    return parser


def parse(command: str, options: type, argv: list[str], examples: Sequence[str] = ()) -> Any:
    """Options from flags and `--config file.yaml`; `--batch-sizes 8 16` and `--batch_sizes 8 16` are the same.

    Args:
        examples: of whole commands, for help and for who leaves out what is required.

    Raises:
        LynxError: with one line, where argparse would print its usage too.
    """
    try:
        config = parser_of(command, options, examples).parse_args(_spread(options, argv))
    except Exception as error:  # jsonargparse's own, and whatever a file that is no YAML makes it raise
        more = f"see lynx-learn {command} --help"
        raise LynxError(
            f"{command}: {_reason(options, ' '.join(str(error).split()).rstrip('.'), examples)}; {more}"
        ) from None
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(options)}
    return options(**values)


def typed(name: str) -> str:
    """A field's name as an option."""
    return f"--{name.replace('_', '-')}"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _reason(options: type, message: str, examples: Sequence[str]) -> str:
    """What jsonargparse says, in the words of the command line."""
    hints = typing.get_type_hints(options)
    if found := re.fullmatch(r"the following arguments are required: (.+)", message):
        missing = ", ".join(map(typed, found[1].split(", ")))
        return f"required: {missing}" + (f"; as in `{examples[0]}`" if examples else "")
    if found := re.fullmatch(r'Parser key "(\w+)": .*(?:Got|Given) value: (.*)', message):
        return f"{typed(found[1])} {found[2]} is not usable: expected {expected(hints[found[1]])}"
    if found := re.fullmatch(r"argument --(\w+): expected one argument", message):
        return f"{typed(found[1])} has no value: expected {expected(hints.get(found[1], str))}"
    if found := re.fullmatch(r"unrecognized arguments: (\S+).*|Option '(\w+)' is not accepted", message):
        word = found[1] or typed(found[2])
        near = difflib.get_close_matches(word.partition("=")[0].strip("-").replace("-", "_"), hints, 1, 0.7)
        return f"unknown option or word {word}" + (f": did you mean {typed(near[0])}?" if near else "")
    if message.startswith("Unexpected config"):
        return "--config holds no options: expected YAML with NAME: VALUE on each line"
    return message.replace('Parser key "config":', "--config:")


def expected(hint: Any) -> str:
    """What a value of this type is, for people."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is list:
        return f"{expected(inner[0])}, or several"
    known = [kind for kind in inner if kind is not type(None)]  # of an optional value
    return EXPECTED.get(origin or hint) or (expected(known[0]) if known else "another value")


def _spread(options: type, argv: list[str]) -> list[str]:
    """Dashes to underscores, a leading word to `--model`, `--list 1 2 3` to `--list [1, 2, 3]`, and `--dict a=1 b=2` to
    `--dict {"a": 1, "b": 2}`."""
    hints = typing.get_type_hints(options)
    lists = {name for name, hint in hints.items() if typing.get_origin(hint) is list}
    dicts = {
        name for name, hint in hints.items() if dict in [typing.get_origin(h) for h in (hint, *typing.get_args(hint))]
    }
    if argv and not argv[0].startswith("-") and "model" in hints:
        argv = ["--model", *argv]
    found: list[str] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--"):
            found.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if (name in lists or name in dicts) and not equals:
            end = position
            while end < len(argv) and not argv[end].startswith("--"):
                end += 1
            values = argv[position:end]
            if name in dicts and all("=" in v and not v.startswith("{") for v in values):
                values = [json.dumps({k: _number(v) for k, _, v in (word.partition("=") for word in values)})]
            elif name in lists and not (len(values) == 1 and values[0].startswith("[")):
                values = [json.dumps([_number(v) for v in values])]
            found += [f"--{name}", *values]
            position = end
        else:
            found.append(f"--{name}{equals}{value}")
    return found


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
