"""Which calls of a transformers model are decode steps, and which of their sequences still run."""

from typing import Any, NamedTuple

from torch import Tensor, nn


class DecodeCall(NamedTuple):
    """A call of the model that decodes one token per sequence."""

    active: Tensor | None
    """(sequences,) True where a sequence still runs; None: all do."""


def read_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DecodeCall | None:
    """Tell a decode step from anything else (prefill, training, chunks), and which of its sequences still run.

    A decode step brings one token per sequence and a cache that already holds some. A sequence has ended when its
    token is the padding token; without one, the first end token, which `generate` then pads with. Rows whose attention
    mask ends in 0 do not run either.
    """
    ids = kwargs.get("input_ids", args[0] if args else None)
    tokens = ids if isinstance(ids, Tensor) else kwargs.get("inputs_embeds")
    cache = kwargs.get("past_key_values")
    if not isinstance(tokens, Tensor) or tokens.shape[1] != 1 or cache is None or not _holds_tokens(cache):
        return None
    active: Tensor | None = None
    generation = getattr(model, "generation_config", None)
    pad = getattr(generation, "pad_token_id", None)
    if pad is None:
        ends = getattr(generation, "eos_token_id", None)
        pad = ends[0] if isinstance(ends, list) and ends else ends
    if isinstance(ids, Tensor) and isinstance(pad, int):
        active = ids[:, -1] != pad
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        present = mask[:, -1].bool()
        active = present if active is None else active & present
    return DecodeCall(active)


def _holds_tokens(cache: Any) -> bool:
    """Whether any layer has seen tokens: those of linear attention, which may come first, do not count them."""
    layers = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length")]
    return any(map(_is_filled, layers or [cache]))


def _is_filled(part: Any) -> bool:
    length = part.get_seq_length()
    # Static caches count on the device, and asking would wait for it; they are laid out when the first tokens come.
    return bool(part.is_initialized) if isinstance(length, Tensor) else length > 0
