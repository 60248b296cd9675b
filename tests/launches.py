"""What a piece of code would launch on a device: operations that compute, and kernels; counted on a CPU."""

from collections import Counter
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

# None of these computes anything on a device: some take memory, some look at what is there in another way.
NOTHING = ("empty", "new_empty", "empty_like", "detach", "alias", "lift_fresh", "_unsafe_view", "promote_types")


class Launches(TorchDispatchMode):
    """While open, counts by name; what Triton's interpreter does inside of a kernel is one launch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.inside = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if not (self.inside or function.is_view or name in NOTHING):
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> "Launches":
        from triton.runtime.interpreter import InterpretedFunction

        run = InterpretedFunction.run

        def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen[kernel.fn.__name__], self.inside = self.seen[kernel.fn.__name__] + 1, True
            try:
                return run(kernel, *args, **kwargs)
            finally:
                self.inside = False

        self.patched = mock.patch.object(InterpretedFunction, "run", counted)
        self.patched.start()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.patched.stop()
