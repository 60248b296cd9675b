"""Finding the model inside what is wrapped around it, and making compiled code look at hooks."""

import sys
from typing import Any

from torch import nn

from ..errors import ModelError
from ..moe.families import moe_blocks

# Wrappers that run copies or pieces of the model, which hooks on the model itself do not reach.
_SPLIT = ("FullyShardedDataParallel", "DeepSpeedEngine")


def unwrapped(model: Any) -> nn.Module:
    """The transformers model that holds the MoE blocks: `model`, or what torch.compile, PEFT or the like wraps.

    Raises:
        ModelError: it is no model, or in a wrapper that skipping cannot act in; named, with what to do.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a {type(model).__name__} is no model: pass the transformers model (of a pipeline, its .model)"
        )
    wanted = {experts for _, _, experts in moe_blocks(model)}
    for part in model.modules():
        kind = type(part).__name__
        if kind in _SPLIT or (isinstance(part, nn.DataParallel) and len(part.device_ids) > 1):
            raise ModelError(f"{kind} runs copies or pieces of the model: attach before wrapping, on one device each")
        if isinstance(part, PreTrainedModel) and wanted <= set(part.modules()):
            return part
    return model


def forget_compiled() -> None:
    """Let torch compile anew what it has compiled: its code has the hooks in it that were there then, and no others."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]["total"]:
        dynamo.reset()
