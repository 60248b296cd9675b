"""Run a graph that `lynx-learn export` wrote in onnxruntime, without torch and without the selector's folder."""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import LynxError, OptionError, SelectorError
from ..selector.config import SelectorConfig, by_active

# Version of the graph's inputs and outputs, and the keys of its metadata.
FORMAT_VERSION = "3"
VERSION_KEY, CONFIG_KEY = "lynx_learn.format_version", "lynx_learn.config"
OUTPUTS = ("keep", "costs", "run_indices", "run_weights", "addition")
Provider = Literal["cpu", "cuda"]
NAMES: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
SILENT = 4  # errors come as exceptions; onnxruntime would print them as well


def runtime_with(provider: Provider) -> Any:
    """The onnxruntime module, if it was built with a provider; whether that works shows only in a session.

    Raises:
        LynxError: it is not installed, or without this provider.
    """
    try:
        import onnxruntime
    except ImportError:
        raise LynxError(
            "onnxruntime is not installed: pip install 'lynx-learn[onnx]', or for CUDA 'lynx-learn[onnx-gpu]', never both"
        ) from None
    if provider not in NAMES:
        raise OptionError(f"provider {provider!r} is not usable: expected one of {', '.join(NAMES)}")
    available = onnxruntime.get_available_providers()
    if NAMES[provider] not in available:
        raise LynxError(
            f"provider {provider} is not usable: this onnxruntime was built with {', '.join(available)} alone; in an "
            "environment without it, pip install 'lynx-learn[onnx-gpu]'"
        )
    return onnxruntime


class OnnxDecision(NamedTuple):
    """What the graph answers for one layer and one decode batch; see `export.Graph`."""

    keep: np.ndarray
    """(experts,) bool: the experts that stay."""
    costs: np.ndarray
    """(tokens, top_k) float32: predicted cost in nats of leaving out each assignment."""
    run_indices: np.ndarray
    """(tokens, top_k) int64: the experts to run instead of those chosen."""
    run_weights: np.ndarray
    """(tokens, top_k) float32: and their weights, 0 where an assignment is left out."""
    addition: np.ndarray | None = None
    """(tokens, hidden) float32: what surrogates answer, to be added to the experts' output; None without surrogates."""


class OnnxSelector:
    """An exported selector in an onnxruntime session.

    Attributes:
        config: the selector's configuration.
        provider: the onnxruntime provider in use, as the session itself reports it.
        session: the onnxruntime session, for IO binding.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes, provider: Provider = "cpu", threads: int = 1) -> None:
        """Load a graph.

        Args:
            source: the file, or its content.
            provider: where it is to run.
            threads: of one call, on the CPU.

        Raises:
            LynxError: onnxruntime is not installed, or has no such provider that works.
            SelectorError: the file is missing, damaged, or not one that `lynx-learn export` wrote.
        """
        onnxruntime = runtime_with(provider)
        name = "the graph" if isinstance(source, bytes) else str(source)
        if not isinstance(source, bytes) and not Path(source).is_file():
            raise SelectorError(f"{name} is no file: expected one that `lynx-learn export` wrote")
        wanted = NAMES[provider]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, SILENT
        try:
            # Without the fallback a provider that fails raises; it would be printed and replaced by the CPU.
            self.session: Any = onnxruntime.InferenceSession(
                source if isinstance(source, bytes) else os.fspath(source),
                options,
                providers=[wanted],
                enable_fallback=0,
            )
        except Exception as error:  # onnxruntime's exceptions share no base
            raise SelectorError(
                f"{name} cannot be loaded by onnxruntime on {wanted} ({_reason(error)}): expected a whole file of `lynx-learn export` and a device that works"
            ) from None
        # A provider that was built in but finds no device or library is left out without an error.
        self.provider: str = self.session.get_providers()[0]
        if self.provider != wanted:
            raise LynxError(
                f"provider {provider} is not usable: onnxruntime names {wanted} but runs on {self.provider}, because it "
                "finds no such device or not its libraries; see the CUDA and cuDNN versions it was built for"
            )
        self.config = self._read_config(name)
        shape = self.config
        self._shapes: dict[str, tuple[int, ...]] = {
            "logits": (shape.num_experts,),
            "indices": (shape.top_k,),
            "weights": (shape.top_k,),
            "active": (),
            "hidden": (shape.hidden_size,),
        }

    @property
    def uses_hidden(self) -> bool:
        """Whether scorer or surrogates look at the hidden state, so that the graph has it as an input."""
        return any(given.name == "hidden" for given in self.session.get_inputs())

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what the graph answers, in the order of `OnnxDecision`."""
        return tuple(found.name for found in self.session.get_outputs())

    def threshold(self, active: int, budget: float, metric: str = "kl") -> float:
        """The calibrated threshold (nats) for a batch with `active` tokens; 0, which skips nothing, below all sizes.

        Raises:
            OptionError: the budget is negative, or the selector was not calibrated for it.
        """
        table = by_active(self.config.calibrated(budget, metric))
        return table[min(active, len(table) - 1)]

    def run(
        self,
        layer: int,
        logits: Any,
        indices: Any,
        weights: Any,
        threshold: float,
        hidden: Any = None,
        active: Any = None,
        prices: Any = None,
        devices: Any = None,
    ) -> OnnxDecision:
        """Decide for one layer and one decode batch, from arrays of numpy or tensors of torch, in any precision.

        Args:
            layer: place of the MoE block in `config.layers`.
            logits: router logits before the activation `(tokens, experts)`.
            indices: experts that the router chose `(tokens, top_k)`, each of a token once, 0 to experts - 1.
            weights: the weights it gave them `(tokens, top_k)`.
            threshold: in nats.
            hidden: what enters the block `(tokens, hidden)`; may be left out where neither scorer nor surrogates look at it.
            active: `(tokens,)` False for padding and ended sequences; by default all are active.
            prices: what reading each expert costs `(experts,)`, in units of an ordinary one; by default 1.
            devices: where each lies `(experts,)`, from 0, of devices that read side by side; by default all on one.

        Raises:
            OptionError: the layer does not exist, or a shape does not fit.
        """
        if not 0 <= layer < len(self.config.layers):
            raise OptionError(f"layer {layer} is not usable: expected 0 to {len(self.config.layers) - 1}")
        feeds = {
            "logits": _array(logits, np.float32),
            "indices": _array(indices, np.int64),
            "weights": _array(weights, np.float32),
        }
        tokens = feeds["logits"].shape[:1]
        feeds["active"] = np.ones(tokens, np.bool_) if active is None else _array(active, np.bool_)
        if self.uses_hidden:
            if hidden is None:
                raise OptionError(
                    f"hidden is missing: scorer {self.config.scorer!r} with surrogates of rank {self.config.rank} looks at the hidden state"
                )
            feeds["hidden"] = _array(hidden, np.float32)
        experts = (self.config.num_experts,)
        of_experts = {
            "prices": np.ones(experts, np.float32) if prices is None else _array(prices, np.float32),
            "devices": np.zeros(experts, np.int64) if devices is None else _array(devices, np.int64),
        }
        for name, array in of_experts.items():
            if array.shape != experts:
                raise OptionError(f"{name} of shape {array.shape} is not usable: expected ({experts[0]},)")
        for name, array in feeds.items():
            # onnxruntime would repeat a single row for all tokens.
            if array.shape != (wanted := tokens + self._shapes[name]) or tokens == (0,):
                shape = ", ".join(("tokens", *map(str, wanted[1:])))
                raise OptionError(
                    f"{name} of shape {array.shape} is not usable: expected ({shape}), tokens as in logits"
                )
        feeds |= of_experts
        feeds["layer"], feeds["threshold"] = np.asarray(layer, np.int64), np.asarray(threshold, np.float32)
        return OnnxDecision(*self.session.run(list(self.outputs), feeds))

    def _read_config(self, name: str) -> SelectorConfig:
        found = self.session.get_modelmeta().custom_metadata_map
        if VERSION_KEY not in found or CONFIG_KEY not in found:
            raise SelectorError(f"{name} is no graph of a selector: expected one that `lynx-learn export` wrote")
        if found[VERSION_KEY] != FORMAT_VERSION:
            raise SelectorError(
                f"{name} has graph format version {found[VERSION_KEY]}, this package reads {FORMAT_VERSION}: export again"
            )
        return SelectorConfig.parse(found[CONFIG_KEY], f"{name}, metadata {CONFIG_KEY}")


def _array(value: Any, dtype: type[np.generic]) -> np.ndarray:
    """As an array of the graph's own type, which onnxruntime insists on."""
    if hasattr(value, "detach"):  # of torch, which is not imported for this; numpy knows no bfloat16
        value = value.detach()
        value = (value.float() if value.is_floating_point() else value).cpu().numpy()
    return np.asarray(value, dtype)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
