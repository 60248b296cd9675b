"""The errors a user can cause, each with one clear line: what, what was expected, what to do."""

import re

# What moves a terminal's cursor: names that are quoted come from files. A list of reasons has a line for each.
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")


class LynxError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it as one line and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(CONTROL.sub(lambda found: repr(found[0])[1:-1], message))


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
