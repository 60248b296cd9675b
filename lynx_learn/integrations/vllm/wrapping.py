"""Methods of one object wrapped, and put back."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any


class Wrapping:
    """Wraps methods of instances, never of classes: another model in the same process stays as it is."""

    def __init__(self) -> None:
        self.undo: list[Callable[[], None]] = []

    def replace(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Have `wrapper` called instead of the method, with the method as its first argument."""
        own = getattr(owner, name)
        # Where the instance has one of its own already, somebody else's wrapper perhaps, that is put back.
        undo = partial(setattr, owner, name, own) if name in vars(owner) else partial(delattr, owner, name)

        @wraps(own)
        def call(*args: Any, **kwargs: Any) -> Any:
            return wrapper(own, *args, **kwargs)

        setattr(owner, name, call)
        self.undo.append(undo)

    def detach(self) -> None:
        """Take everything off again."""
        for undo in reversed(self.undo):
            undo()
        self.undo.clear()
