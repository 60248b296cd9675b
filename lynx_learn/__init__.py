"""Learn which experts a batch can skip, and skip them at decode within a quality budget."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LynxError", "LynxSelector", "Skipping", "find_moe_layers", "load_model", "reference_moe", "skip_experts"]

if TYPE_CHECKING:
    from .errors import LynxError
    from .families import find_moe_layers
    from .models import load_model, reference_moe
    from .runtime import Skipping, skip_experts
    from .selector import LynxSelector

_HOMES = {
    "LynxError": "errors",
    "LynxSelector": "selector",
    "Skipping": "runtime",
    "find_moe_layers": "families",
    "load_model": "models",
    "reference_moe": "models",
    "skip_experts": "runtime",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import lynx_learn` stays light."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
