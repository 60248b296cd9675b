"""One MoE block at a time, straight from a checkpoint's safetensors, and of its experts one at a time where they lie apart.

The model is built without weights (on torch's meta device). Which of the checkpoint's tensors a block needs is told by the
names that transformers gives them, and they go through the conversions that transformers applies when it loads a whole
model: experts in one tensor each are stacked, tensors of older checkpoints renamed, gate and up projections joined, weights in
float8 multiplied with the scales of their blocks. Experts are left in the files until one of them is run; only those in another
layout are all read with their block.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ModelError
from ..moe.experts import run_expert, runs_alone
from ..moe.families import MoeLayer, check_structure, find_moe_layers, moe_blocks, read_block
from ..moe.fp8.scaled import cast_rest, is_fp8, quantizer_of, refuse_broken_blocks, stays_fp8
from ..moe.loading import COMMIT, LoadedModel, hub_commit, model_path, pick_device, pick_dtype
from .disk import Disk
from .experts import OneExpert, Part, parts_of
from .stored import Checkpoint, sources


class Layers(Protocol):
    """The MoE layers of a model, each there while it is needed."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the blocks, in order."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what enters and leaves experts."""

    @property
    def trainable(self) -> bool:
        """Whether gradients go through the model as `load_model` loads it."""

    def layer(self, index: int) -> Any:
        """A context in which the layer's weights are there; gives a `MoeLayer`."""


@dataclass(frozen=True)
class StoredLayer(MoeLayer):
    """One whose experts are in files; the module `experts` has their shapes, and no weights."""

    stored: OneExpert = field(kw_only=True, repr=False)

    def expert_weights(self) -> Iterator[tuple[str, Any]]:
        return self.stored.samples()

    @torch.no_grad()
    def expert_output(self, expert: int, hidden: Tensor) -> Tensor:
        """As of any layer. Whoever asks for one expert after the other has each read once.

        Raises:
            ModelError: it cannot be read.
        """
        return run_expert(self.experts, self.stored.weights(expert), hidden)


class LoadedLayers:
    """Those of a model that is loaded."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.layers = find_moe_layers(loaded.model)
        self.names, self.dtype = tuple(layer.name for layer in self.layers), self.layers[0].dtype
        self.trainable = not any(is_fp8(layer.experts) for layer in self.layers)

    @contextmanager
    def layer(self, index: int) -> Iterator[MoeLayer]:
        yield self.layers[index]


def open_layers(asked: str | None, base: str, revision: str, device: str, dtype: str) -> "StoredLayers":
    """The layers of the model that is asked for, or else of the one that a trace names; arguments as of `load_base`.

    Raises:
        ModelError: as `StoredLayers`.
    """
    if asked:
        return StoredLayers(asked, device, dtype)
    return StoredLayers(base, device, dtype, revision if COMMIT.fullmatch(revision) else None)


class StoredLayers:
    """Those of a model in a folder or on the Hub, read one by one.

    Raises:
        ModelError: it cannot be read so; with the reason.
    """

    def __init__(self, name: str, device: str = "auto", dtype: str = "auto", revision: str | None = None) -> None:
        from transformers import AutoConfig
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.name, self.device = name, pick_device(device)
        commit = hub_commit(model_path(name), revision)
        checkpoint = Checkpoint.open(name, commit)
        kind = pick_dtype(name, dtype, self.device, commit)
        try:
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
            self.quantizer = quantizer_of(config)
            self.trainable = self.quantizer is None or not stays_fp8(self.quantizer, self.device)
            if self.quantizer is not None:  # whatever runs the model
                self.quantizer.quantization_config.dequantize = True
                for part in (config, config.get_text_config(decoder=True)):
                    vars(part).pop("quantization_config", None)
            elif getattr(config, "quantization_config", None) is not None:
                raise ModelError(f"{name} is quantized: its layers cannot be read one by one; load it dequantized")
            self.dtype = (config.dtype or torch.float32) if kind == "auto" else getattr(torch, kind)
            self.model = without_weights(config, self.dtype)
        except ModelError:
            raise
        except Exception as error:  # transformers raises many kinds; to the user they are one
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"model {name!r} cannot be built from its configuration ({reason})") from error
        check_structure(self.model)
        self.blocks = list(moe_blocks(self.model))
        self.names = tuple(name for name, _, _ in self.blocks)
        self.conversions = lambda: get_model_conversion_mapping(self.model, hf_quantizer=self.quantizer)
        self.checkpoint, known = checkpoint, sources(self.model, checkpoint, self.quantizer)
        self.places = {module: name for name, module in self.model.named_modules()}
        self.parts = {experts: parts for _, _, experts in self.blocks if (parts := self._parts(experts, known))}
        self.keys = self._keys(known)

    @contextmanager
    def layer(self, index: int) -> Iterator[MoeLayer]:
        """A context in which the layer's weights are on the device, but those of experts that can be read one by one.

        Raises:
            ModelError: the checkpoint lacks some of them, or the block cannot be acted on.
        """
        name, block, experts = self.blocks[index]
        parts = self.parts.get(experts)
        apart = set() if parts is None else {id(value) for value in experts.parameters(recurse=False)}
        with ExitStack() as stack:
            stack.callback(block.to, "meta")
            self._load(self.keys[name])
            held = [*block.named_parameters(), *block.named_buffers()]
            if missing := sorted(key for key, value in held if value.is_meta and id(value) not in apart):
                raise ModelError(f"model {self.name!r} lacks {len(missing)} weights of {name} ({missing[0]}, …)")
            if self.quantizer is not None:
                cast_rest(block, self.dtype)
            layer = read_block(self.model.eval(), index, name, block, experts)
            if parts is not None:
                disk = Disk(self.checkpoint.files)
                stack.callback(disk.close)
                layer = StoredLayer(**vars(layer), stored=OneExpert(parts, disk, layer.dtype, layer.device))
            yield layer

    def _parts(self, experts: nn.Module, known: Mapping[str, dict[Any, list[str]]]) -> list[Part] | None:
        """Where each expert of a block lies; None where all are read together."""
        if runs_alone(experts):
            with suppress(ModelError):  # another layout, or what is refused when all are read
                return parts_of(self.places[experts], experts, known, self.checkpoint)
        return None

    def _keys(self, known: Mapping[str, dict[Any, list[str]]]) -> dict[str, dict[str, Path]]:
        """For each block the checkpoint's names of its tensors, and the files that hold them, without experts read one by one."""
        checkpoint = self.checkpoint
        apart = {f"{self.places[experts]}.{part.name}" for experts, parts in self.parts.items() for part in parts}
        owner = {key: name for name, block, _ in self.blocks for key in (f"{name}.{own}" for own in block.state_dict())}
        found: dict[str, dict[str, Path]] = {name: {} for name in self.names}
        shapes = {key: (tensor.dtype, tensor.shape) for key, tensor in checkpoint.tensors.items()}
        for parameter, places in known.items():
            if parameter in owner:
                keys = [key for part in places.values() for key in part]
                if self.quantizer is not None:
                    refuse_broken_blocks(shapes, keys, self.quantizer.quantization_config.weight_block_size, self.name)
                if parameter not in apart:
                    found[owner[parameter]] |= {
                        key: checkpoint.files[checkpoint.tensors[key].span.file] for key in keys
                    }
        return found

    def _load(self, keys: dict[str, Path]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        how = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            hf_quantizer=self.quantizer,
            weight_mapping=self.conversions(),  # type: ignore[no-untyped-call,arg-type]
        )
        shown = logging.is_progress_bar_enabled()
        with ExitStack() as stack:
            logging.disable_progress_bar()
            if shown:
                stack.callback(logging.enable_progress_bar)
            try:
                files = {path: stack.enter_context(safe_open(path, "pt")) for path in set(keys.values())}
                slices = {key: files[path].get_slice(key) for key, path in keys.items()}
                report, _ = convert_and_load_state_dict_in_model(self.model, slices, how)
            except (OSError, SafetensorError, RuntimeError, ValueError) as error:
                raise ModelError(f"model {self.name!r} cannot be read ({str(error).splitlines()[0]})") from error
        if report.conversion_errors or report.mismatched_keys:
            first = next(iter([*report.conversion_errors, *report.mismatched_keys]))
            raise ModelError(f"model {self.name!r}: {first} does not have the shape of its configuration")


def without_weights(config: Any, dtype: torch.dtype) -> Any:
    """The model of a configuration, its weights on torch's meta device, where they take no memory."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
