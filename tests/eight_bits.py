"""Checkpoints in float8 with block scales, as DeepSeek-V3 and Qwen3-FP8 ship them, and what stands for a GPU's kernels.

A tiny model is rounded block by block and written as such a checkpoint: one tensor and one grid of scales for each matrix of
each expert, `quantization_config` in config.json. The checkpoint beside it has what that stands for, in float32.

On a CPU transformers dequantizes such a checkpoint. `native` loads it as on a GPU, with transformers' own FP8 modules, and puts
products in plain PyTorch in the place of the Triton kernels that it would load from the Hub.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

MOST = torch.finfo(torch.float8_e4m3fn).max
Rounding = Callable[[Tensor, int], Tensor]


def in_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """A matrix in float8, and the scales of its blocks; the last blocks may be smaller."""
    rows, columns = weight.shape
    padded = functional.pad(weight.float(), (0, -columns % block, 0, -rows % block))
    parts = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scale = parts.abs().amax((1, 3)).clamp_min(1e-12) / MOST
    codes = (parts / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return codes.to(torch.float8_e4m3fn).contiguous(), scale


def multiplied_out(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    """What float8 values and the scales of their blocks stand for, `(rows, columns)` in float32."""
    spread = scale.float().repeat_interleave(block, 0).repeat_interleave(block, 1)
    return codes.float() * spread[: codes.shape[0], : codes.shape[1]]


def save_fp8(model: PreTrainedModel, folder: Path, plain: Path, block: int, **settings: Any) -> None:
    """A float8 checkpoint of a model, and one in float32 with what its values stand for.

    In float8 are the projections, as those who ship such models have it; the rest is in bfloat16.
    """
    model.save_pretrained(folder)
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if value.ndim == 2 and ("_proj" in name or name.endswith(("w1.weight", "w2.weight", "w3.weight"))):
            codes, scale = in_blocks(value, block)
            stored |= {name: codes, f"{name}_scale_inv": scale}
            meant[name] = multiplied_out(codes, scale, block)
        else:
            stored[name] = value.bfloat16()
            meant[name] = stored[name].float()
    model.save_pretrained(plain)
    for where, tensors in ((folder, stored), (plain, meant)):
        save_file(tensors, where / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [block, block],
    }
    config |= {"dtype": "bfloat16", "quantization_config": quantization | settings}
    (folder / "config.json").write_text(json.dumps(config))


def as_they_are(x: Tensor, block: int) -> Tensor:
    return x.float()


def in_float8(x: Tensor, block: int) -> Tensor:
    """What enters a product, rounded as the kernels do: each row's values in groups of a block's width, with a scale each."""
    groups = functional.pad(x.float(), (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / MOST
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)[..., : x.shape[-1]]


class Products:
    """The three products that transformers takes from its kernel, with the arguments that it gives them; counts them."""

    def __init__(self, enters: Rounding) -> None:
        self.enters = enters
        self.calls: list[str] = []

    def matmul(
        self, x: Tensor, weight: Tensor, scale: Tensor, block_size: Any, dtype: Any, activation_scale: Any = None
    ) -> Tensor:
        assert activation_scale is None
        self.calls.append("matmul")
        return self._product(x, weight, scale, block_size[0]).to(dtype)

    def batched_matmul(
        self, x: Tensor, weight: Tensor, scale: Tensor, *, block_size: Any, expert_ids: Tensor
    ) -> Tensor:
        self.calls.append("batched")
        rows = zip(x, expert_ids.tolist(), strict=True)
        return torch.stack([self._product(row, weight[e], scale[e], block_size[0]) for row, e in rows]).to(x.dtype)

    def grouped_matmul(
        self, x: Tensor, weight: Tensor, scale: Tensor, *, offsets: Tensor, tokens_per_expert: Tensor, block_size: Any
    ) -> Tensor:
        """Rows behind the last group are not written, which NaN stands for."""
        self.calls.append("grouped")
        assert offsets.dtype == torch.int32
        assert tokens_per_expert.cumsum(0).tolist() == offsets.tolist()
        output = torch.full((len(x), weight.shape[1]), float("nan"))
        start = 0
        for expert, end in enumerate(offsets.tolist()):
            if end > start:
                output[start:end] = self._product(x[start:end], weight[expert], scale[expert], block_size[0])
            start = end
        return output.to(x.dtype)

    def _product(self, x: Tensor, weight: Tensor, scale: Tensor, block: int) -> Tensor:
        return self.enters(x, block) @ multiplied_out(weight, scale, block).T


@contextmanager
def native(folder: Path, enters: Rounding = as_they_are, dtype: Any = torch.float32) -> Iterator[PreTrainedModel]:
    """The model of a float8 checkpoint with transformers' FP8 modules, on a machine without a GPU."""
    from transformers.integrations import finegrained_fp8
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    products = Products(enters)
    kernel = finegrained_fp8.FineGrainedFP8(products.matmul, products.batched_matmul, products.grouped_matmul)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
        patch.setattr(finegrained_fp8, "_FINEGRAINED_FP8", kernel)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        model.products = products
        yield model
