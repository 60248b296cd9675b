"""Hidden states in fewer bits than the model has: what a trace stores, and what is read from it.

Eight bits (float8_e4m3fn: 4 of exponent, 3 of mantissa) come with a scale for each token, so that its largest value is the
largest of the format. What rounding costs is then relative to each value, at most 1/16 of it, and not to the token's
largest one: a dimension whose values are a thousand times those of the others (Dettmers et al. 2022, arXiv 2208.07339)
takes nothing from them, since the format holds nearly 2^15 between its largest and its smallest normal value.
"""

from typing import Literal

import torch
from torch import Tensor

HiddenDtype = Literal["auto", "bfloat16", "float8_e4m3fn"]
# Stored with a scale for each token, under this name.
SCALED, SCALE = ("float8_e4m3fn",), "hidden_scale"


def hidden_bytes(width: int, itemsize: int, stored: str) -> int:
    """Bytes of one token's hidden state in one layer.

    Args:
        itemsize: of the model's dtype.
        stored: `hidden_dtype` of the trace.
    """
    size = itemsize if stored == "auto" else getattr(torch, stored).itemsize
    return width * size + (4 if stored in SCALED else 0)


def pack(tensors: dict[str, Tensor], stored: str) -> dict[str, Tensor]:
    """A layer's tensors as they are stored; `hidden` is `(tokens, width)`. Values that are not finite stay so."""
    if stored == "auto":
        return tensors
    hidden, dtype = tensors["hidden"], getattr(torch, stored)
    if stored not in SCALED:
        return {**tensors, "hidden": hidden.to(dtype)}
    largest = hidden.float().abs().amax(-1)
    scale = (largest / torch.finfo(dtype).max).clamp_min(torch.finfo(torch.float32).tiny)
    return {**tensors, "hidden": (hidden.float() / scale.unsqueeze(-1)).to(dtype), SCALE: scale}


def unpack(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's tensors as the model had them, `hidden` in `dtype`, but for what rounding took."""
    rest = {name: value for name, value in tensors.items() if name != SCALE}
    if SCALE in tensors:
        return {**rest, "hidden": (tensors["hidden"].float() * tensors[SCALE].unsqueeze(-1)).to(dtype)}
    return {**rest, "hidden": tensors["hidden"].to(dtype)}
