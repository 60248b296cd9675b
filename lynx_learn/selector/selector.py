"""`LynxSelector`: per MoE layer a scorer, surrogates and a sensitivity; with thresholds, a policy for a budget."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import OptionError, SelectorError
from ..files import staged
from ..moe.decision import Decision, Routing, each_tensor
from ..moe.families import Layer
from ..moe.identity import Identity, differences, identify
from .config import CARD, CONFIG, METRICS, WEIGHTS, SelectorConfig, by_active
from .layer import LayerSelector, Ready
from .prices import Price, Prices, Uniform, check_prices, named, read_prices
from .scorers import SCORERS

if TYPE_CHECKING:
    from .kernels.compiled import Compiled
    from .kernels.in_place import InPlace
    from .kernels.triton import Fused

KERNELS = ("auto", "torch", "triton", "numba")


class LynxSelector(nn.Module):
    """Learned selectors for all MoE layers of one model."""

    def __init__(self, config: SelectorConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(LayerSelector(config) for _ in config.layers)
        self.requires_grad_(False)

    def check(self, layers: Sequence[Layer], model: nn.Module | None = None) -> None:
        """Refuse a model that this selector was not trained for.

        Raises:
            SelectorError: it differs in its MoE layers, their routers, rule or experts, or with `model` in other weights.
        """
        names = tuple(layer.name for layer in layers)
        if names != self.config.layers:
            raise SelectorError(
                f"the selector has {len(self.config.layers)} layers of {self.config.base_model}, the model {len(names)} other ones: load the model it was trained for"
            )
        self.compare(identify(layers, model))

    def compare(self, found: Identity) -> None:
        """Refuse a model that is another one as far as is known of it.

        Raises:
            SelectorError: with what differs.
        """
        if other := differences(self.config.identity, found):
            raise SelectorError(
                f"the selector was trained for {self.config.base_model} (revision {self.config.base_revision}); this model "
                f"differs in {' and '.join(other)}: load that model and revision, or train a selector for this one"
            )

    def policy(
        self, budget: float, metric: str = "kl", kernel: str = "auto", prices: Prices | None = None
    ) -> "ThresholdPolicy":
        """The calibrated policy for a budget (nats of KL, or the unit of `metric`); the others as in `ThresholdPolicy`.

        Raises:
            OptionError: the budget is negative, or the selector was not calibrated for it.
            SelectorError: it was calibrated with other prices.
        """
        thresholds = self.config.calibrated(budget, metric)
        if budget:
            check_prices(prices or Uniform(), self.config.calibration.get(metric, {}))
        return ThresholdPolicy(self, thresholds, f"budget={budget:g}", kernel, prices)

    def calibrated_prices(self, metric: str = "kl") -> Prices:
        """What thresholds were found with; where fast memory counts, one that is simulated."""
        return read_prices(named(self.config.calibration.get(metric, {}).get("prices", Uniform().describe())))

    def at_threshold(self, threshold: float, kernel: str = "auto", prices: Prices | None = None) -> "ThresholdPolicy":
        """The policy with one threshold (nats) for every batch size, calibrated or not."""
        return ThresholdPolicy(self, {1: threshold}, f"tau={threshold:.3g}", kernel, prices)

    def save_pretrained(self, folder: str | os.PathLike[str], files: dict[str, str] | None = None) -> None:
        """Write config and weights, and `files` (name -> text) beside them; other files already there stay.

        All files are written first and then put in place, so an interrupted save leaves the old state.
        """
        with staged(Path(folder)) as part:
            save_file({k: v.contiguous().cpu() for k, v in self.state_dict().items()}, part / WEIGHTS)
            for name, text in {CONFIG: self.config.to_json(), **(files or {})}.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], revision: str | None = None) -> "LynxSelector":
        """Load a selector from a folder or a Hub repository.

        Raises:
            SelectorError: the folder is missing, incomplete, damaged, or of another format.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = _download(str(name), revision)
        config = SelectorConfig.read(folder / CONFIG)
        if config.scorer not in SCORERS:
            raise SelectorError(
                f"{folder / CONFIG} names the scorer {config.scorer!r}: expected one of {', '.join(SCORERS)}"
            )
        try:
            check_header(folder / WEIGHTS, config)
            selector = cls(config)
            tensors = load_file(folder / WEIGHTS)
            selector.load_state_dict(tensors, strict=True)
            for own in selector.layers:
                own.surrogates.check()  # type: ignore[union-attr,operator]
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SelectorError(
                f"{folder / WEIGHTS} cannot be loaded ({reason}): copy or train the selector again"
            ) from None
        for key, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise SelectorError(
                    f"{folder / WEIGHTS} holds values that are not finite in {key}: train the selector again"
                )
        return selector

    def push_to_hub(self, repo_id: str, private: bool = False, folder: str | os.PathLike[str] | None = None) -> str:
        """Upload to the Hub, with card and metrics if `folder` (where it was trained) is given; returns the address."""
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as scratch:
            if folder is not None:
                shutil.copytree(folder, scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns("logs"))
            self.save_pretrained(scratch)
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=scratch))

    def with_formula(self) -> "LynxSelector":
        """The same surrogates and sensitivities with the two-factor formula as scorer: what its learned part adds to."""
        other = LynxSelector(replace(self.config, scorer="formula"))
        wanted = other.state_dict()
        other.load_state_dict({key: value for key, value in self.state_dict().items() if key in wanted})
        return other

    def with_config(self, **changes: object) -> "LynxSelector":
        """The same selector with another configuration, e.g. new thresholds."""
        other = LynxSelector(replace(self.config, **changes))  # type: ignore[arg-type]
        other.load_state_dict(self.state_dict())
        return other


def check_header(path: Path, config: SelectorConfig) -> None:
    """Compare the sizes that a configuration speaks of with what the file says it holds, before memory is asked for.

    Raises:
        RuntimeError: they differ.
    """
    try:
        with torch.device("meta"):
            wanted = {key: tuple(value.shape) for key, value in LynxSelector(config).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError):  # torch cannot even count the values
        raise RuntimeError(f"{CONFIG} wants sizes that no file can hold") from None
    with safe_open(path, "pt") as file:
        held = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    for key in sorted(wanted.keys() | held.keys()):
        if wanted.get(key) != held.get(key):
            raise RuntimeError(f"{key} is {held.get(key, 'missing')}, {CONFIG} wants {wanted.get(key, 'none')}")


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG, WEIGHTS, METRICS, CARD]))
    except HFValidationError:
        raise SelectorError(
            f"selector {name!r} is not there: there is no such folder, and the Hub has no such names; `lynx-learn train` "
            "makes one"
        ) from None
    except Exception as error:  # the hub raises many kinds; to the user they are one
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SelectorError(
            f"selector {name!r} is neither a folder nor a Hub repository that can be read ({reason})"
        ) from None


class ThresholdPolicy:
    """A selector with a threshold (nats) for each of some decode batch sizes.

    The threshold of a step goes by its number of active tokens, see `by_active`.

    `kernel` says what computes one decode batch's decision: "torch", "triton" or "numba" (whatever their kernels support)
    or "auto": triton on CUDA devices where it takes less time, which is found out once for each layer shape and batch
    size; numba on CPUs where it is installed. All give the same decision but for rounding of the costs.

    `prices` says what reading each expert costs, see `prices`; without any each has the price 1.
    """

    name = "learned"

    def __init__(
        self,
        selector: LynxSelector,
        thresholds: dict[int, float],
        setting: str,
        kernel: str = "auto",
        prices: Prices | None = None,
    ) -> None:
        if kernel not in KERNELS:
            raise OptionError(f"kernel {kernel!r} is unknown: expected one of {', '.join(KERNELS)}")
        self.selector, self.setting, self.kernel = selector, setting, kernel
        self.prices = prices or Uniform()
        self.thresholds = thresholds
        self.ready: dict[int, Ready] = {}
        self.compiled: dict[int, Compiled] = {}
        self.fused: dict[int, Fused] = {}
        self.plain: set[int] = set()
        """Layers whose last decode batch was decided in PyTorch; kernels read no surrogate that does not answer."""

    @property
    def skips(self) -> bool:
        """Whether any batch size skips at all."""
        return any(tau > 0 for tau in self.thresholds.values())

    def bind(self, layers: Sequence[Layer]) -> None:
        self.selector.check(layers)
        self.prices.bind(layers)
        thresholds = torch.tensor(by_active(self.thresholds))
        for layer, own in zip(layers, self.selector.layers, strict=True):
            self.ready[layer.index] = Ready.on(layer, own, thresholds)  # type: ignore[arg-type]
        on_cuda = any(layer.device.type == "cuda" for layer in layers)
        # Only here, and only if needed: triton is not installed everywhere, and takes time to import.
        if self.kernel == "triton" or (self.kernel == "auto" and on_cuda and find_spec("triton")):
            self.fused = _fused(self.ready, on_cuda)
        if self.kernel == "numba" or (self.kernel == "auto" and find_spec("numba")):
            self.compiled = _compiled(self.ready, forced=self.kernel == "numba")

    def decide(self, layer: Layer, routing: Routing, scale: Tensor | None = None) -> Decision:
        """Rewrite one layer's assignments, of any number of decode batches, in PyTorch.

        Args:
            layer: one of those it is bound to.
            routing: what the layer is about to do.
            scale: `(G, T)`, float32, above 0: how many times each token's costs count. Infinite for tokens that keep all
                their experts; these do not count for the threshold either, as if the batch were so much smaller. None:
                1 for all.
        """
        ready = self.ready[layer.index]
        return ready.selector.answer(routing, ready.rewrite(routing, scale, self.prices.of(layer)))

    def decide_one(self, layer: Layer, routing: Routing, scale: Tensor | None = None) -> Decision:
        """As `decide`, for one decode batch without a leading dimension: in compiled code or kernels where these can."""
        index, price = layer.index, self.prices.of(layer)
        if price is None or isinstance(price, Price):
            compiled, fused = self.compiled.get(index), self.fused.get(index)
            if compiled is not None and compiled.takes(routing):
                return compiled.decide(routing, scale, price)
            if fused is not None and fused.takes(routing):
                plain = partial(self._decide_in_pytorch, layer)
                if self.kernel == "triton" or fused.is_faster(routing, plain):
                    self.plain.discard(index)
                    return fused.decide(routing, scale, price)
        self.plain.add(index)
        return self._decide_in_pytorch(layer, routing, scale)

    def in_place(self, layer: Layer, factor: float, adds: bool) -> "InPlace | None":
        """What decides over what an engine's router has chosen; None where kernels do not, or experts have prices.

        Arguments as in `InPlace`.
        """
        fused = self.fused.get(layer.index)
        if fused is None or self.prices.of(layer) is not None:
            return None
        from .kernels.in_place import InPlace

        return InPlace(fused, factor, adds)

    def _decide_in_pytorch(self, layer: Layer, routing: Routing, scale: Tensor | None = None) -> Decision:
        rows = None if scale is None else scale.unsqueeze(0)
        decision = self.decide(layer, each_tensor(lambda part: part.unsqueeze(0), routing), rows)
        return each_tensor(lambda part: part.squeeze(0), decision)

    def own_bytes(self, layer: Layer, skipped: Tensor, batches: int) -> float:
        ready = self.ready[layer.index]
        surrogates = ready.selector.surrogates
        # Simulated decode, which takes many batches at once in PyTorch, counts what a real one would read.
        form = "picked" if layer.index in self.fused.keys() - self.plain else None
        return ready.folded.bytes * batches + surrogates.bytes_read(skipped, batches, form)


def _fused(ready: dict[int, Ready], on_cuda: bool) -> "dict[int, Fused]":
    """What decides on CUDA devices."""
    if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise OptionError("kernel 'triton' is not usable: the model is on no CUDA device; take 'auto'")
    try:
        from .kernels.triton import Fused
    except ImportError as error:
        raise OptionError(f"kernel 'triton' is not usable: triton cannot be imported ({error}); take 'auto'") from None
    return {
        index: Fused(own.folded, own.selector.surrogates, own.thresholds, own.selector.keep_top1)
        for index, own in ready.items()
    }


def _compiled(ready: dict[int, Ready], forced: bool) -> "dict[int, Compiled]":
    """What decides on the CPU, for the layers that are there."""
    try:
        from ..moe.kernels.arithmetic import compiling
        from .kernels.compiled import Compiled
    except ImportError as error:
        if not forced:  # a model must run where only numba does not
            return {}
        raise OptionError(
            f"kernel 'numba' is not usable: numba cannot be imported ({error}); pip install 'lynx-learn[cpu]', or take 'auto'"
        ) from None
    able = {index: own for index, own in ready.items() if Compiled.is_for(own.folded, own.selector.surrogates)}
    if forced and len(able) < len(ready):
        raise OptionError(
            "kernel 'numba' is not usable: it decides for layers on a CPU, in float32 or bfloat16; take 'auto'"
        )
    with compiling():
        return {
            index: Compiled(own.folded, own.selector.surrogates, own.thresholds, own.selector.keep_top1)
            for index, own in able.items()
        }
