"""Which calls of a transformers model are decode steps, and which of their rows still run."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .hooks import foreign

# What is put on a model while its `generate` is watched.
WATCHED = ("generate", "_get_stopping_criteria")
# Why a call that brings a cache, or should, is no decode step that can be acted on.
DRAFTS = "assisted decoding or prompt lookup checks several drafts at once"
SEVERAL = "several tokens at once on a filled cache: a chunk of a prompt, or drafts to check"
NO_CACHE = "use_cache=False runs the whole text again at each step"
PADDED = "continuous batching with CUDA graphs or compilation pads its batches"
PROMPTS = "continuous batching ran prompts in the same call"
# What is as it should be: prompts always run untouched.
EXPECTED = (PROMPTS,)


class Generation:
    """One call of `generate`."""

    def __init__(self) -> None:
        self.prompt_is_behind = False
        self.drafts = False
        """Whether several drafts are checked at once, by assisted decoding or prompt lookup."""
        self.running: Tensor | None = None
        """(sequences,) as `generate` keeps them; None before it has drawn a token."""

    def drawn(self, done: Tensor) -> None:
        """A token has been drawn for each sequence `(sequences,)`, and for some it was the last."""
        self.prompt_is_behind = True
        self.running = ~done if self.running is None or self.running.shape != done.shape else self.running & ~done

    def running_of(self, rows: int) -> Tensor | None:
        """Which rows of a call run; None where these are no sequences of which `generate` keeps count, as in beams."""
        return self.running if self.running is not None and len(self.running) == rows else None


class Generations(threading.local):
    """The calls of `generate` under way in each thread, the innermost last."""

    def __init__(self) -> None:
        self.open: list[Generation | None] = []

    @property
    def innermost(self) -> Generation | None:
        return self.open[-1] if self.open else None


class DecodeCall(NamedTuple):
    """A call of the model that decodes one token per sequence."""

    active: Tensor | None
    """(sequences,) True where a sequence still runs; None: all do."""
    prompts: Tensor | None = None
    """(sequences,) True where the token is a prompt of its own, which runs as routed; None: nowhere."""


def read_call(arguments: dict[str, Any], generation: Generation | None, pad: int | None) -> DecodeCall | str | None:
    """Tell a decode step from anything else, and which of its sequences still run.

    A decode step brings one token per sequence, and the prompts are behind: in `generate` once it has drawn a token,
    elsewhere where the cache already holds some. Who has ended is what `generate` keeps count of; elsewhere, whose
    token is padding. Rows whose attention mask ends in 0 do not run either.

    Args:
        arguments: of the call, by name.
        generation: the `generate` that makes the call, if any.
        pad: the padding token, if no text can hold it.

    Returns:
        the decode step; or why it cannot be acted on; or None for prefill, training, scoring.
    """
    if arguments.get("cu_seq_lens_q") is not None and arguments.get("write_index") is not None:
        return _packed(arguments)
    ids = arguments.get("input_ids")
    tokens = ids if isinstance(ids, Tensor) else arguments.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or (generation is not None and not generation.prompt_is_behind):
        return None
    cache = arguments.get("past_key_values", arguments.get("cache_params"))
    if generation is not None and generation.drafts:
        return DRAFTS
    if cache is None:
        return NO_CACHE if generation is not None and arguments.get("use_cache") is False else None
    if not _holds_tokens(cache):
        return None
    if tokens.shape[1] != 1:
        return SEVERAL
    active = None
    if generation is not None:
        active = generation.running_of(len(tokens))
    elif isinstance(ids, Tensor) and pad is not None:
        active = ids[:, -1] != pad
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        present = mask[:, -1].bool()
        active = present if active is None else active & present.to(active.device)
    return DecodeCall(active)


def _packed(arguments: dict[str, Any]) -> DecodeCall | str:
    """A call of transformers' continuous batching: the tokens of all requests in one row, and where each begins."""
    tokens, starts = arguments["input_ids"].shape[1], arguments["cu_seq_lens_q"]
    # One token each; with a block table it is a decode step and says 1, too. Rows of padding come last.
    if arguments.get("max_length_q") == 1:
        place = torch.arange(tokens, device=starts.device)
        return DecodeCall(place < starts[-1], arguments["position_ids"][0] == 0)
    # Padded ones say that the longest request is as long as all of them together.
    return PADDED if arguments.get("max_length_q") == tokens and len(starts) > 2 else PROMPTS


def padding_token(model: nn.Module) -> int | None:
    """The token that `generate` feeds to sequences that have ended, unless it may also be one that a text holds."""
    generation = getattr(model, "generation_config", None)
    pad, ends = (getattr(generation, name, None) for name in ("pad_token_id", "eos_token_id"))
    return pad if isinstance(pad, int) and pad not in (ends if isinstance(ends, list) else [ends]) else None


def _holds_tokens(cache: Any) -> bool:
    """Whether any layer has seen tokens: those of linear attention, which may come first, do not count them."""
    layers = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length")]
    return any(map(_is_filled, layers or [cache]))


def _is_filled(part: Any) -> bool:
    if not hasattr(part, "get_seq_length"):
        return True  # of a kind that does not count; whoever brings it has filled it
    length = part.get_seq_length()
    if not isinstance(length, Tensor):
        return bool(length > 0)
    if not part.is_initialized or torch.compiler.is_compiling() or length.device.type != "cpu":
        # Static caches count on the device, and asking would wait for it; they are laid out when the first tokens come.
        return bool(part.is_initialized)
    return bool(length > 0)


@contextmanager
def watch_generate(model: nn.Module) -> Iterator[Generations]:
    """While open, what the model's calls of `generate` know of their sequences.

    Nobody is guessed to have ended: `generate` asks a list of criteria which sequences have after each token, whatever
    configuration, tokens, stop strings or criteria of the caller's own it was given, and that list is the place to listen.
    """
    generations = Generations()
    if not all(hasattr(model, name) for name in WATCHED):
        yield generations
        return
    generate, criteria_of = (getattr(model, name) for name in WATCHED)

    @functools.wraps(generate)
    def watched(*args: Any, **kwargs: Any) -> Any:
        # A loop of the caller's own may keep count in another way.
        own = kwargs.get("custom_generate") is not None
        generation = None if own else Generation()
        if generation is not None:
            generation.drafts = kwargs.get("assistant_model") is not None
        generations.open.append(generation)
        try:
            return generate(*args, **kwargs)
        finally:
            generations.open.pop()

    @functools.wraps(criteria_of)
    def heard(generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        criteria = criteria_of(generation_config, *args, **kwargs)
        generation = generations.innermost
        if generation is None:
            return criteria
        generation.drafts = generation.drafts or "assisted" in generation_config.get_generation_mode().value
        return _listened_to(criteria, generation)

    before = {name: vars(model).get(name) for name in WATCHED}
    for name, instead in zip(WATCHED, (watched, heard), strict=True):
        vars(model)[name] = foreign(instead, before[name])
    try:
        yield generations
    finally:
        for name in WATCHED:
            del vars(model)[name]
        vars(model).update((name, own) for name, own in before.items() if own is not None)


def _listened_to(criteria: Any, generation: Generation) -> Any:
    """The same criteria, whose answers `generation` hears."""
    from transformers import StoppingCriteriaList

    class Listened(StoppingCriteriaList):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            done = super().__call__(*args, **kwargs)
            generation.drawn(done)
            return done

    return Listened(criteria)
