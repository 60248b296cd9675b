"""Time decode steps of several policies in turns, each with a cache of its own, through the same text."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import StaticCache

from ..errors import OptionError
from ..moe.decision import Policy
from ..moe.loading import generate_plainly
from .runtime import Skipping
from .tally import Stats

GENERATE_TURNS = 3


@dataclass(frozen=True)
class Steps:
    """Decode steps of one policy: milliseconds of each, and what skipping did (None: the untouched model)."""

    ms: list[float]
    stats: Stats | None

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


def paired_ratio(first: Steps, second: Steps) -> float:
    """Median of first / second over steps taken in the same turn; above 1: the second is faster."""
    return statistics.median(a / b for a, b in zip(first.ms, second.ms, strict=True))


def clock(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """While open, torch computes with so many threads on the CPU; two make single steps stall at random."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Stepping(Protocol):
    """One decode of a batch with a cache of its own, fed with given tokens."""

    def step(self, tokens: Tensor) -> float:
        """Milliseconds of one step with `(sequences, 1)` tokens."""


class Called:
    """Steps by calling the model, as `generate` does.

    `skipping` is what attaches a policy to the model while a step of it runs; not counted in its time.
    """

    def __init__(
        self, model: nn.Module, tokens: Tensor, prompt: int, skipping: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.model, self.skipping = model, skipping
        self.cache = self.model(input_ids=tokens[:, :prompt], use_cache=True).past_key_values

    def step(self, tokens: Tensor) -> float:
        with self.skipping():
            start = clock(tokens.device)
            self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True)
            return 1e3 * (clock(tokens.device) - start)


class Graphed:
    """Steps by replaying a CUDA graph of one, captured with the policy attached; timed by CUDA events."""

    def __init__(
        self, model: nn.Module, tokens: Tensor, prompt: int, skipping: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        # Kept as long as the graph, which writes where it lay at the capture.
        self.cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 4)  # type: ignore[arg-type]
        model(input_ids=tokens[:, :prompt], past_key_values=self.cache, use_cache=True)
        self.ids = tokens[:, prompt : prompt + 1].clone()
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with skipping():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up outside of a capture
                for _ in range(3):
                    model(input_ids=self.ids, past_key_values=self.cache, use_cache=True)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph):
                model(input_ids=self.ids, past_key_values=self.cache, use_cache=True)

    def step(self, tokens: Tensor) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.ids.copy_(tokens)
        start.record()
        self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


@torch.no_grad()
def take_turns(
    model: nn.Module,
    policies: Mapping[str, Policy | None],
    tokens: Tensor,
    prompt: int,
    warm_up: int = 4,
    threads: int = 1,
    stepping: Callable[..., Stepping] = Called,
) -> dict[str, Steps]:
    """Decode the same text once for each policy, side by side: a step of every one, then the next step of every one.

    Who goes first changes from step to step, so that nobody always profits from what another left in the caches.

    Args:
        policies: what to time, by name; None is the untouched model, without hooks.
        tokens: `(sequences, positions)`; the first `prompt` are prefilled, each further one is a step.
        warm_up: leading steps that are not counted.
        threads: of torch.
        stepping: how steps are run, `Called` or `Graphed`.

    Raises:
        OptionError: no step would be left to count.
    """
    if tokens.shape[1] - prompt <= warm_up:
        raise OptionError(f"{tokens.shape[1] - prompt} decode steps are too few: expected more than {warm_up}")
    skipping = {name: None if policy is None else Skipping(model, policy) for name, policy in policies.items()}
    names, times = list(policies), {name: list[float]() for name in policies}
    with with_threads(threads):
        decoders = {
            name: stepping(model, tokens, prompt, lambda acted=acted: acted or nullcontext())
            for name, acted in skipping.items()
        }
        for position in range(prompt, tokens.shape[1]):
            first = position % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(decoders[name].step(tokens[:, position : position + 1]))
    return {
        name: Steps(times[name][warm_up:], None if acted is None else acted.stats) for name, acted in skipping.items()
    }


@torch.no_grad()
def take_turns_generating(model: nn.Module, policy: Policy, prompt: Tensor, new_tokens: int) -> dict[str, Any]:
    """Whole greedy `generate` calls, untouched and skipping in turns; the first turn is not counted.

    Args:
        prompt: `(sequences, positions)`, without padding.
        new_tokens: of every sequence.

    Returns:
        Tokens per second of both, the median of the ratios of turns (above 1: skipping is faster), and the share of
        tokens that are the same.
    """
    seconds: dict[bool, list[float]] = {False: [], True: []}
    found: dict[bool, Tensor] = {}
    skipping = Skipping(model, policy)
    for turn in range(GENERATE_TURNS + 1):
        for skips in (False, True) if turn % 2 else (True, False):
            start = clock(prompt.device)
            with skipping if skips else nullcontext():
                found[skips] = generate_plainly(
                    model,
                    prompt,
                    torch.ones_like(prompt),
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                )
            seconds[skips].append(clock(prompt.device) - start)
    off, on = seconds[False][1:], seconds[True][1:]
    tokens = new_tokens * len(prompt)
    return {
        "tokens_per_s_off": tokens / statistics.median(off),
        "tokens_per_s_on": tokens / statistics.median(on),
        "ratio": statistics.median(a / b for a, b in zip(off, on, strict=True)),
        "same_tokens": float((found[False] == found[True])[:, prompt.shape[1] :].float().mean()),
    }
