"""Weights in float8 with a scale for each block of their rows and columns.

What a weight `NAME` stands for is each value times the value of `NAME_scale_inv` for its block (DeepSeek-V3 technical report,
arXiv 2412.19437, section 3.3). transformers multiplies with such weights as they are on GPUs of compute capability 8.9 or
higher, where it rounds what enters a product to float8 as well; elsewhere it dequantizes them when it loads a model.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ModelError

KIND = torch.float8_e4m3fn
SCALE = "_scale_inv"
# Ends the name of a fixed scale of what enters a product.
ACTIVATION_SCALE = "activation_scale"


class Scaled(NamedTuple):
    """A weight `(..., rows, columns)` and the scales of its blocks `(..., rows of blocks, columns of blocks)`, or one scale."""

    values: Tensor
    scale: Tensor
    block: tuple[int, int] | None
    """Rows and columns of a block; None: as many as make the grid."""

    def numel(self) -> int:
        return self.values.numel()

    def at(self, places: Any) -> Tensor:
        """What it stands for at places in its flattened values, `(places,)`, float32."""
        values, scale = self.values.detach(), self.scale.detach()
        index = np.unravel_index(places, tuple(values.shape))
        picked = values[tuple(_tensor(axis, values) for axis in index)].float()
        if scale.ndim < 2:
            return picked * scale.float()
        sides = [self._side(axis) for axis in (-2, -1)]
        inside = (*index[:-2], index[-2] // sides[0], index[-1] // sides[1])
        return picked * scale[tuple(_tensor(axis, scale) for axis in inside)].float()

    def _side(self, axis: int) -> int:
        """Of a block; where gate and up projections are less than one, joined ones have blocks of their own."""
        size, blocks = self.values.shape[axis], self.scale.shape[axis]
        side = self.block[axis] if self.block else 0
        return side if side and -(-size // side) == blocks else -(-size // blocks)


def _tensor(index: Any, like: Tensor) -> Tensor:
    return torch.from_numpy(index).to(like.device)


def weights_of(named: Mapping[str, Tensor], block: Any = None) -> Iterator[tuple[str, Tensor | Scaled]]:
    """A module's own tensors by name, each with the scales of its blocks, which are not given for themselves.

    Args:
        named: parameters or the state of one module.
        block: its `block_size`.
    """
    scaled = {name for name in named if f"{name}{SCALE}" in named}
    for name, value in named.items():
        if name in scaled:
            yield name, Scaled(value, named[f"{name}{SCALE}"], tuple(block) if block else None)
        elif name.removesuffix(SCALE) not in scaled and not (scaled and name.endswith(ACTIVATION_SCALE)):
            yield name, value


def is_fp8(experts: nn.Module) -> bool:
    """Whether these are transformers' own experts in float8, with block scales."""
    stacked = {name: value for name, value in experts.named_parameters(recurse=False) if not name.endswith(SCALE)}
    matrices = [name for name, value in stacked.items() if value.ndim == 3]
    return bool(matrices) and all(
        stacked[name].dtype == KIND and getattr(experts, f"{name}{SCALE}", None) is not None for name in matrices
    )


def computed_in(experts: nn.Module) -> torch.dtype:
    """The type of what enters and leaves experts: that of their weights, unless these are in 8 bits.

    Raises:
        ModelError: they are, and their model's configuration does not say it.
    """
    own = next(experts.parameters()).dtype
    if own.itemsize > 1:
        return own
    kind = getattr(getattr(experts, "config", None), "dtype", None)
    if not isinstance(kind, torch.dtype):
        raise ModelError(
            "keeps its experts in 8 bits, and its configuration has no dtype: load it with from_pretrained"
        )
    return kind


def refuse_other_small(experts: nn.Module) -> None:
    """Refuse experts in fewer than 16 bits, but for transformers' own in float8.

    Raises:
        ModelError: with the reason.
    """
    small = sorted({str(p.dtype).removeprefix("torch.") for p in experts.parameters() if p.itemsize < 2})
    if not small:
        return
    if not is_fp8(experts):
        raise ModelError(
            f"keeps its experts in {small[0]}; what is known in fewer than 16 bits is float8_e4m3fn with a scale for each "
            "block: load the model with its weights dequantized"
        )
    if (scheme := getattr(experts, "activation_scheme", "dynamic")) != "dynamic":
        raise ModelError(
            f"rounds what enters its experts by fixed scales (activation scheme {scheme!r}), which was never tried: load the "
            "model with its weights dequantized"
        )
    computed_in(experts)


def quantizer_of(config: Any) -> Any:
    """transformers' quantizer of a configuration whose checkpoint is in float8 with block scales, else None.

    Raises:
        ModelError: this transformers is one that cannot load such a checkpoint.
    """
    own = getattr(config, "quantization_config", None)
    own = own or getattr(config.get_text_config(decoder=True), "quantization_config", None) or {}
    kind = own.get("quant_method") if isinstance(own, dict) else own.quant_method
    if kind != "fp8":
        return None
    import transformers
    from transformers.quantizers.auto import AutoHfQuantizer

    version = transformers.__version__
    if version.startswith("5.16."):  # its plans for parallel experts end in an AttributeError
        raise ModelError(f"transformers {version} loads no checkpoint with experts in float8: install 5.17 or newer")
    return AutoHfQuantizer.from_config(own, pre_quantized=True)


def stays_fp8(quantizer: Any, device: torch.device) -> bool:
    """Whether transformers multiplies on this device with the weights as they are."""
    if device.type == "cpu":
        return False
    quantizer.validate_environment(device_map=str(device))
    return not quantizer.quantization_config.dequantize


def cast_rest(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring into the type that was asked for what a dequantizing loader has left in the checkpoint's: tensors that it renames.

    What is in float32 stays: models ask for that themselves.
    """
    for value in [*module.parameters(), *module.buffers()]:
        if value.is_floating_point() and value.dtype not in (dtype, torch.float32):
            value.data = value.data.to(dtype)


def refuse_broken_blocks(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]], keys: Iterable[str], block: Any, what: str
) -> None:
    """Refuse weights that transformers cannot dequantize, or would with blocks of another size.

    It takes the sides of a weight to be multiples of the numbers of its blocks; a last block that is smaller ends in an
    error, or in other values (transformers 5.19).

    Args:
        shapes: of the tensors of a checkpoint, by name: type, as safetensors calls it, and shape.
        keys: those that are looked at.
        block: rows and columns of a block; None: one scale for a whole weight.
        what: of which checkpoint, for people.

    Raises:
        ModelError: with the first one.
    """
    for key in sorted(keys):
        kind, shape = shapes[key]
        scales = shapes.get(f"{key}{SCALE}")
        if scales is None:
            continue
        if kind != "F8_E4M3":
            raise ModelError(f"{what} keeps {key} as {kind} with block scales: expected F8_E4M3; load it dequantized")
        grid = scales[1]
        if block and len(grid) > 1 and any(size % side for size, side in zip(shape[-2:], block, strict=True)):
            raise ModelError(
                f"{what} keeps {key} {shape} in blocks of {block[0]} × {block[1]}, and transformers dequantizes whole blocks "
                "only: run it on a GPU that multiplies in float8, or convert the checkpoint to bfloat16"
            )
