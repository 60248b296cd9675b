"""Learn which experts a batch can skip, and skip them at decode within a quality budget."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LynxError", "LynxSelector", "Skipping", "find_moe_layers", "load_model", "reference_moe", "skip_experts"]

if TYPE_CHECKING:
    from .decode.runtime import Skipping, skip_experts
    from .errors import LynxError
    from .moe.families import find_moe_layers
    from .moe.loading import load_model, reference_moe
    from .selector.selector import LynxSelector

_HOMES = {
    "LynxError": "errors",
    "LynxSelector": "selector.selector",
    "Skipping": "decode.runtime",
    "find_moe_layers": "moe.families",
    "load_model": "moe.loading",
    "reference_moe": "moe.loading",
    "skip_experts": "decode.runtime",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import lynx_learn` stays light."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
