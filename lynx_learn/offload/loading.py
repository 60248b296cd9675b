"""Load a model without its experts: these stay in the checkpoint, and their parameters are of the device `meta`."""

import re
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..checkpoint.stored import Checkpoint
from ..errors import ModelError
from ..moe.loading import LoadedModel, folder_revision, hub_commit, load_tokenizer, model_path, pick_device, pick_dtype

# Names of experts' weights, in checkpoints and in models. What matches and is none after all is not missed.
EXPERTS = re.compile(r"\.experts\.(\d+\.|[a-z_]+$)")


class Absent(Tensor):
    """A tensor with a shape and no data, whatever device it is sent to."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            kwargs.pop("device", None)
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def load_without_experts(
    name: str, device: str = "auto", dtype: str = "auto", tokenizer: bool = True, revision: str | None = None
) -> tuple[LoadedModel, Checkpoint]:
    """As `moe.loading.load_model`, but no expert is read: what is loaded has room for the rest only.

    Raises:
        ModelError: the model cannot be loaded, or has no safetensors files.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    path, commit = model_path(name), hub_commit(model_path(name), revision)
    checkpoint = Checkpoint.open(name, revision)
    target = pick_device(device)
    dtype = pick_dtype(name, dtype, target, commit)
    safe: dict[str, Any] = {"trust_remote_code": False, "revision": commit or "main"}
    try:
        config = AutoConfig.from_pretrained(path, **safe)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(
                f"{name} is quantized: experts are read from disk as they are; load a checkpoint that is not"
            )
        with torch.device("meta"):
            kind: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        precision = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(file, "pt")) for file in checkpoint.files]
            state = {
                key: absent(stored.shape, precision) if EXPERTS.search(key) else files[stored.span.file].get_slice(key)
                for key, stored in checkpoint.tensors.items()
            }
            loaded: Any = kind.from_pretrained(
                None, config=config, state_dict=state, dtype=precision, output_loading_info=True
            )
        model, report = loaded
        if (checkpoint.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path, revision=commit or "main")
    except ModelError:
        raise
    except Exception as error:  # transformers and torch raise many kinds; to the user they are one
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"model {name!r} cannot be loaded without its experts ({reason})") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"model {name!r} lacks {len(missing)} weights ({missing[0]}, …), which would be random: its files are not whole "
            "or not of this kind of model"
        )
    model.name_or_path = model.config.name_or_path = path
    make_plain(model)
    model._apply(lambda value: value if value.is_meta else value.to(target))
    encoder = load_tokenizer(name, model.get_input_embeddings().weight.shape[0], commit) if tokenizer else None
    return LoadedModel(model.eval(), encoder, commit or folder_revision(checkpoint.folder)), checkpoint


def absent(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").as_subclass(Absent)


def make_plain(model: nn.Module) -> None:
    """Parameters without data become plain ones of the device `meta`."""
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if isinstance(value.data, Absent) or isinstance(value, Absent):
                plain = torch.empty(value.shape, dtype=value.dtype, device="meta")
                module._parameters[name] = nn.Parameter(plain, requires_grad=False)
