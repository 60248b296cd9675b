"""Load a transformers model from a folder or the Hub, safely."""

import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ModelError
from .fp8.scaled import cast_rest, quantizer_of, refuse_broken_blocks, stays_fp8

REFERENCE, REFERENCE_50M = "reference-moe", "reference-moe-50m"
COMMIT = re.compile("[0-9a-f]{40}")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """A model for inference, its tokenizer and the revision that was loaded."""

    model: nn.Module
    tokenizer: Any
    revision: str

    @property
    def input_device(self) -> torch.device:
        return device_of(self.model.get_input_embeddings())  # type: ignore[operator]


def reference_moe() -> str:
    """Folder of the small trained MoE that ships with this package."""
    return str(files("lynx_learn") / "reference_moe")


def in_repository(folder: str) -> Path | None:
    """A folder of this package's repository, where that is at hand: beside the package or where the command runs."""
    roots = (Path(str(files("lynx_learn"))).parent, Path.cwd())
    return next((root / folder for root in roots if (root / folder / "config.json").is_file()), None)


def reference_moe_50m() -> str:
    """Folder of the larger trained MoE, which lies in the repository and not in the package.

    Raises:
        ModelError: no clone of the repository is at hand.
    """
    if (found := in_repository(f"data/{REFERENCE_50M}")) is None:
        raise ModelError(
            f"model {REFERENCE_50M!r} is in lynx-learn's repository, not in the package: run this in a clone of it, or give "
            f"the path of its folder data/{REFERENCE_50M}"
        )
    return str(found)


@contextmanager
def in_memory(module: nn.Module, recurse: bool = True) -> Iterator[None]:
    """While open, weights that accelerate keeps elsewhere (on disk, or in other memory) are where the module runs."""
    with ExitStack() as stack:
        for part in module.modules() if recurse else [module]:
            if getattr(getattr(part, "_hf_hook", None), "offload", False):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(part))
        yield


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs, also when its weights lie elsewhere until then."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if getattr(hook, "offload", False) and getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)  # type: ignore[union-attr]
    return next(module.parameters()).device


def pick_device(name: str) -> torch.device:
    """A torch device by name, or for `auto` the first GPU, or the CPU where there is none.

    Raises:
        ModelError: there is no such device.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise ModelError(f"--device {name!r} is not usable: expected auto, cpu, or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"--device {name} is not usable: no GPU is visible to torch; take cpu")
    return device


def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16; elsewhere such products are emulated, several times slower than float32.

    On x86 torch must also be using AVX-512 (`ATEN_CPU_CAPABILITY` can hold it back).
    """
    found = torch.cpu.get_capabilities()
    if found.get("architecture") == "x86_64" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return any(bool(value) for name, value in found.items() if name.endswith("bf16"))


def fast_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What `auto` means: the stored type, but float32 where a CPU would have to emulate 16-bit products."""
    slow = device.type == "cpu" and stored.itemsize == 2 and not has_native_bfloat16()
    return torch.float32 if slow else stored


def pick_dtype(name: str, dtype: str, device: torch.device, commit: str | None = None) -> str:
    """The type to load the model `name` in; says so in one line where that is not its checkpoint's own.

    Raises:
        ModelError: there is no such type, or the model's configuration cannot be read.
    """
    from transformers import AutoConfig

    if dtype not in DTYPES:
        raise ModelError(f"--dtype {dtype!r} is not usable: expected one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    try:
        stored = AutoConfig.from_pretrained(model_path(name), trust_remote_code=False, revision=commit or "main").dtype
    except Exception as error:  # transformers and the hub raise many kinds; to the user they are one
        raise _not_loaded(name, error) from error
    if not isinstance(stored, torch.dtype) or (fast := fast_dtype(stored, device)) == stored:
        return "auto"
    kind, stored_kind = (str(part).removeprefix("torch.") for part in (fast, stored))
    print(
        f"{name} runs in {kind}: this CPU has no native bfloat16 (stored: {stored_kind}; --dtype {stored_kind} keeps it)",
        file=sys.stderr,
    )
    return kind


def _not_loaded(name: str, error: Exception) -> ModelError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "ignore_mismatched_sizes" in reason:  # which names a report that is not shown
        reason = "its weights have other shapes than its config.json says"
    return ModelError(f"model {name!r} cannot be loaded ({reason}): give a folder or Hub id of a causal language model")


def model_path(name: str) -> str:
    """What transformers and vLLM are given for the name of a model."""
    ours = {REFERENCE: reference_moe, REFERENCE_50M: reference_moe_50m}
    return ours[name]() if name in ours else name


def load_model(
    name: str, device: str = "auto", dtype: str = "auto", tokenizer: bool = True, revision: str | None = None
) -> LoadedModel:
    """Load model and tokenizer; safetensors weights only, no code from the repository.

    Args:
        name: folder, Hub id, `reference-moe` for the one in this package, or `reference-moe-50m` in its repository.
        device: a torch device, or `auto`: the CPU where there is no GPU, one GPU, or spread over several.
        dtype: one of DTYPES; `auto` as `fast_dtype` of what the checkpoint holds.
        tokenizer: whether one is needed; without it None takes its place.
        revision: commit, branch or tag of a model from the Hub; by default its main branch.

    Raises:
        ModelError: the model cannot be loaded, or its tokenizer is not one for it; with the reason.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = model_path(name)
    placement: dict[str, Any] = {}
    commit = hub_commit(path, revision)
    if device == "auto" and torch.cuda.device_count() > 1:
        placement["device_map"] = "auto"
    try:
        target = pick_device(device)
        dtype = pick_dtype(name, dtype, target, commit)
        # Said in so many words: left out, transformers asks on the terminal whether to run the repository's code.
        safe: dict[str, Any] = {"trust_remote_code": False, "revision": commit or "main"}
        quantizer = quantizer_of(AutoConfig.from_pretrained(path, **safe))
        if quantizer is not None and not stays_fp8(quantizer, target):
            placement["quantization_config"] = _dequantized(name, quantizer.quantization_config, commit)
        with _in_turn(target.type == "cpu" and dtype != "auto"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, use_safetensors=True, output_loading_info=True, **safe, **placement
            )
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise ModelError(
                f"model {name!r} lacks {len(missing)} weights ({missing[0]}, …), which would be random: its files are "
                "not whole or not of this kind of model"
            )
        if "quantization_config" in placement:
            cast_rest(model, model.config.dtype if dtype == "auto" else getattr(torch, dtype))
        if "device_map" not in placement:
            model = model.to(target)
    except ModelError:
        raise
    except Exception as error:  # transformers, the hub and torch raise many kinds; to the user they are one
        raise _not_loaded(name, error) from error
    rows = model.get_input_embeddings().weight.shape[0]
    encoder = load_tokenizer(name, rows, commit) if tokenizer else None
    return LoadedModel(model.eval(), encoder, commit or folder_revision(Path(path)))


@contextmanager
def _in_turn(wanted: bool) -> Iterator[None]:
    """A context in which transformers reads one tensor after the other, where that is wanted.

    It reads ahead otherwise, and tensors that it casts to another type, which cannot stay mapped from their file, then take
    as much memory once more as the model.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    if wanted:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if wanted:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def _dequantized(name: str, settings: Any, commit: str | None) -> Any:
    """The settings of a checkpoint in float8, which is then dequantized while it is loaded; says so in one line.

    Raises:
        ModelError: transformers cannot.
    """
    folder = Path(model_path(name))
    if commit:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(folder), revision=commit, allow_patterns=["model*.safetensors", "*.json"]))
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            shapes |= {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    refuse_broken_blocks(shapes, shapes, settings.weight_block_size, f"model {name!r}")
    print(
        f"{name} keeps weights in float8, in which this device does not multiply: they are dequantized", file=sys.stderr
    )
    settings.dequantize = True
    return settings


def load_base(
    asked: str | None, base: str, revision: str, device: str, dtype: str, tokenizer: bool = True
) -> LoadedModel:
    """The model that is asked for, or else the one that a trace or a selector names, at its commit if it came from the Hub.

    Raises:
        ModelError: as `load_model`.
    """
    if asked:
        return load_model(asked, device, dtype, tokenizer)
    return load_model(base, device, dtype, tokenizer, revision if COMMIT.fullmatch(revision) else None)


def hub_commit(path: str, revision: str | None = None) -> str | None:
    """The commit of a model on the Hub that a revision (by default its main branch) stands for now; None of a folder.

    All files are then loaded by it, so that none is of another commit.
    """
    if Path(path).exists():
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        file = Path(hf_hub_download(path, "config.json", revision=revision))
    except HFValidationError:
        raise ModelError(
            f"model {path!r} is not there: there is no such folder, and the Hub has no such names; give a folder or Hub id "
            "of a causal language model"
        ) from None
    except Exception as error:
        raise _not_loaded(path, error) from error
    return file.parent.name


def load_tokenizer(name: str, rows: int, commit: str | None = None) -> Any:
    """The tokenizer of the model `name`, whose embedding has `rows` rows.

    Raises:
        ModelError: there is none, or it is not for this model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(name), trust_remote_code=False, revision=commit or "main")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the tokenizer of model {name!r} cannot be loaded ({reason}): put it beside the model with tokenizer.save_pretrained"
        ) from error
    check_tokenizer(name, tokenizer, rows)
    return tokenizer


def check_tokenizer(name: str, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer without words, which is what transformers makes up where a folder has none, or with other ones.

    Raises:
        ModelError: it is not for a model whose embedding has `rows` rows.
    """
    known = tokenizer.get_vocab()
    if len(known) <= len(set(tokenizer.all_special_tokens)):
        raise ModelError(
            f"model {name!r} has no tokenizer (one without any word was found): put it beside the model with tokenizer.save_pretrained"
        )
    if (highest := max(known.values())) >= rows:
        raise ModelError(
            f"the tokenizer of model {name!r} is another model's: it has tokens up to {highest}, the model knows {rows}: "
            "put the model's own beside it"
        )


@torch.no_grad()
def generate_plainly(model: Any, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
    """What `model.generate` gives with these settings, `(sequences, positions)`.

    Of the model's own generation config, whose settings it would take for all that are not given, only the ids of
    special tokens count.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    plain = {name: getattr(own, name, None) for name in kept}
    model.generation_config = GenerationConfig(**plain)
    try:
        wanted = GenerationConfig(**plain, **settings)
        return model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=wanted)
    finally:
        model.generation_config = own


def folder_revision(path: Path) -> str:
    """A local folder has no revision, but a commit of the Hub's cache its name; one of the reference recipe says when it was trained."""
    if COMMIT.fullmatch(path.resolve().name) and path.resolve().parent.name == "snapshots":
        return path.resolve().name
    training = path / "training.json"
    try:
        return f"{json.loads(training.read_text())['tokens_seen']} tokens"
    except (OSError, ValueError, KeyError, TypeError):  # none, or somebody else's
        return "local"


def versions() -> dict[str, str]:
    """Of what computes."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = gpu or f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return {"machine": machine, **versions()}
