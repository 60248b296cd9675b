"""Time decode steps with skipping on and off, in turns."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .policies import Policy
from .runtime import Skipping, Stats


@dataclass(frozen=True)
class StepTimes:
    """Medians over decode steps timed in turns, in milliseconds, and the median of the ratios off / on step by step.

    A ratio above 1 means that skipping is faster.
    """

    off_ms: float
    on_ms: float
    ratio: float
    steps: int
    stats: Stats


class _Decoder:
    """One decode of a batch with a cache of its own, fed with given tokens."""

    def __init__(self, model: nn.Module, prompts: Tensor) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)  # type: ignore[arg-type]
        self.model(input_ids=prompts, past_key_values=self.cache, use_cache=True)

    def step(self, tokens: Tensor) -> float:
        """Milliseconds of one step with `(sequences, 1)` tokens."""
        _wait(tokens.device)
        start = time.perf_counter()
        self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True)
        _wait(tokens.device)
        return 1e3 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def time_steps(model: nn.Module, policy: Policy, tokens: Tensor, prompt: int, warm_up: int = 4) -> StepTimes:
    """Decode the same text twice side by side, one step untouched, one step skipping, and so on.

    Args:
        tokens: `(sequences, positions)`; the first `prompt` are prefilled, each further one is a step.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads make single steps on a CPU stall at random
    skipping = Skipping(model, policy)
    try:
        off, on = _Decoder(model, tokens[:, :prompt]), _Decoder(model, tokens[:, :prompt])
        times: list[tuple[float, float]] = []
        for position in range(prompt, tokens.shape[1]):
            column = tokens[:, position : position + 1]

            def skipped(column: Tensor = column) -> float:
                with skipping:
                    return on.step(column)

            # Each goes first every second time, so that neither profits from what the other left in the caches.
            pair = (off.step(column), skipped()) if position % 2 else (skipped(), off.step(column))[::-1]
            times.append(pair)
    finally:
        torch.set_num_threads(threads)
    times = times[warm_up:]
    return StepTimes(
        statistics.median(t[0] for t in times),
        statistics.median(t[1] for t in times),
        statistics.median(t[0] / t[1] for t in times),
        len(times),
        skipping.stats,
    )
