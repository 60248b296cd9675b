"""The errors a user can cause, each with one clear line: what, what was expected, what to do."""


class LynxError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it as one line and exits with 2."""


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
