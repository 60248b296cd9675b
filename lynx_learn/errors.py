"""The errors a user can cause, each with one clear line: what, what was expected, what to do."""

import re

# What would break the line or move a terminal's cursor: names that are quoted come from files.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def printable(text: str) -> str:
    """A text whose control characters are written as Python writes them."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class LynxError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it as one line and exits with 2."""

    has_lines = False
    """Whether line breaks of the message are its own, as in a list of reasons."""

    def __init__(self, message: str) -> None:
        lines = message.split("\n") if self.has_lines else [message]
        super().__init__("\n".join(map(printable, lines)))


class CorpusError(LynxError):
    """The text source is missing, empty or shorter than one sequence."""


class ModelError(LynxError):
    """The model is no Mixture-of-Experts model, or of a kind that cannot be acted on."""


class TraceError(LynxError):
    """A trace directory is incomplete, damaged or belongs to other options."""


class SelectorError(LynxError):
    """A selector directory is damaged, of another format, or belongs to another model."""


class OptionError(LynxError):
    """An option has a value that cannot be used."""


class Unfinished(LynxError):
    """This process has done its part of a command, and what others do is not there yet; no failure."""
