"""`lynx-learn bench --offload`: decode a model whose experts lie on disk, by this package and by accelerate's disk offload.

All decode the same text, fed to them, so that losses are those of the same predictions.
"""

import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ...decode.runtime import Skipping
from ...decode.simulate import Reference
from ...decode.timing import with_threads
from ...errors import OptionError
from ...files import check_writable, write_json
from ...moe.families import moe_blocks
from ...moe.loading import environment, load_tokenizer, model_path
from ...selector.prices import RESIDENT, Uniform
from ...selector.selector import LynxSelector
from ...show.progress import track
from ...traces import corpus as corpora
from ...traces.groups import decode_groups
from ..offload import Offloading, offload_experts


@dataclass(frozen=True)
class OffloadBenchOptions:
    """Time decode steps of a model whose experts are read from disk."""

    out: str
    """folder for offload.json"""
    offload: str = "disk"
    """where experts lie; only disk"""
    model: str = "reference-moe"
    """folder or Hub id, or reference-moe"""
    shares: list[float] = field(default_factory=lambda: [0.25, 0.5])
    """shares of the experts that fast memory holds"""
    selector: str | None = None
    """folder or Hub id; without one, nothing is skipped"""
    thresholds: list[float] = field(default_factory=lambda: [0.01, 0.03, 0.1])
    """thresholds (nats) of the selector, each with prices uniform and residency"""
    batch_size: int = 16
    """sequences that decode together"""
    prompt: int = 32
    """tokens of prefill"""
    steps: int = 24
    """decode steps"""
    readers: int = 4
    """threads that read from disk"""
    threads: int = 1
    """threads of torch, as in bench"""
    accelerate: bool = True
    """also time accelerate's disk offload, where it is installed; it writes a second copy of the experts beside --out"""
    corpus: str = corpora.BUILT_IN
    """text to decode, as in bench"""
    seed: int = 0
    """seed of the text's grouping"""

    def __post_init__(self) -> None:
        if self.offload != "disk":
            raise OptionError(f"--offload {self.offload} is not usable: expected disk")
        for name in ("batch_size", "prompt", "steps", "readers", "threads"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)} is not usable: expected 1 or more")
        for share in self.shares:
            if not 0 < share <= 1:
                raise OptionError(f"--shares {share:g} is not usable: expected above 0, at most 1")
        if not self.shares:
            raise OptionError("--shares is empty: expected one number or more")


@torch.no_grad()
def bench_offload(options: OffloadBenchOptions) -> dict[str, Any]:
    """Decode in every way; writes and returns the report.

    Raises:
        ModelError, SelectorError, OptionError: what was asked for cannot be timed; nothing is written.
    """
    out = Path(options.out)
    check_writable(out)
    selector = None if options.selector is None else LynxSelector.from_pretrained(options.selector)
    rows: list[dict[str, Any]] = []
    reference: Reference | None = None
    ways = [("untouched", 0.0), *((p, tau) for p in ("uniform", "residency") for tau in options.thresholds if selector)]
    with with_threads(options.threads):
        first = offload_experts(options.model, 1.0)
        tokens = _text(options, first.model)
        for share in track(options.shares, "bench", len(options.shares), unit="shares"):
            with Offloading(first.model, first.checkpoint, share, None, options.readers) as offloaded:
                for prices, threshold in ways:
                    row = {"way": prices, "share": share, "threshold": threshold}
                    policy = None
                    if selector is not None and prices != "untouched":
                        own = RESIDENT[offloaded.layers[0].experts] if prices == "residency" else Uniform()
                        policy = selector.at_threshold(threshold, prices=own)
                    with nullcontext() if policy is None else Skipping(offloaded.model, policy) as acting:
                        logits, seconds = _decode(offloaded.model, tokens, options.prompt, offloaded)
                    reference = reference or Reference(logits[:, :-1], tokens[:, options.prompt + 1 :])
                    losses = reference.losses(logits[:, :-1])
                    same = torch.equal(reference.logits, logits[:, :-1])  # whose KL would be rounding
                    row["kl"] = 0.0 if same else float(losses.sums[:, 0].sum() / losses.tokens.sum())
                    row |= _read(offloaded, tokens.shape[0] * options.steps, options.steps)
                    row["tokens_per_s"] = tokens.shape[0] * options.steps / seconds
                    row["experts"] = None if acting is None else sum(acting.stats.experts_after) / len(offloaded.layers)
                    rows.append(row)
        if options.accelerate and find_spec("accelerate") is not None:
            rows.append(_accelerate(options, first, tokens, out))
    report = {"options": asdict(options), "environment": environment(), "rows": rows}
    write_json(out / "offload.json", report)
    return report


def _text(options: OffloadBenchOptions, model: nn.Module) -> Tensor:
    """Tokens `(sequences, positions)`."""
    length = options.prompt + options.steps
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    tokenizer = load_tokenizer(options.model, rows)
    groups = decode_groups(options.corpus, tokenizer, "test", options.batch_size, length, 1, options.seed + 1, fewest=1)
    return groups[0][0]


def _decode(model: Any, tokens: Tensor, prompt: int, offloaded: Offloading | None) -> tuple[Tensor, float]:
    """Logits `(sequences, steps, vocabulary)` of decode steps fed with the text, and their seconds; reads of the prompt are not
    counted."""
    cache = model(input_ids=tokens[:, :prompt], use_cache=True).past_key_values
    if offloaded is not None:
        offloaded.reset()
    found, start = [], perf_counter()
    for position in range(prompt, tokens.shape[1]):
        output = model(input_ids=tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        found.append(output.logits)
    return torch.cat(found, dim=1), perf_counter() - start


def _read(offloaded: Offloading, tokens: int, steps: int) -> dict[str, float]:
    stats = offloaded.stats
    return {
        "bytes_per_token": stats.bytes_read / tokens,
        "hits": stats.hits / max(stats.wanted, 1),
        "wait_ms_per_layer": 1e3 * sum(stats.wait_seconds) / (steps * len(stats.wait_seconds)),
    }


def _accelerate(options: OffloadBenchOptions, first: Offloading, tokens: Tensor, out: Path) -> dict[str, Any]:
    """accelerate's disk offload of the experts: all of a layer are read when it runs, through the page cache."""
    from transformers import AutoModelForCausalLM

    names = [f"{name}.experts" for name, _, _ in moe_blocks(first.model)]
    places: dict[str, str] = dict.fromkeys(names, "disk")
    for name, module in first.model.named_modules():
        own = list(module.parameters(recurse=False)) + list(module.buffers(recurse=False))
        if own and not any(name == part or name.startswith(f"{part}.") for part in names):
            places[name] = "cpu"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_path(options.model),
            dtype=first.layers[0].dtype,
            device_map=places,
            offload_folder=folder,
            trust_remote_code=False,
        )
        _, seconds = _decode(model.eval(), tokens, options.prompt, None)
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    experts = sum(layer.num_experts * layer.expert_bytes for layer in first.layers)
    return {
        "way": "accelerate",
        "share": 0.0,
        "threshold": 0.0,
        "kl": 0.0,
        "bytes_per_token": experts * options.steps / (tokens.shape[0] * options.steps),
        "hits": 0.0,
        "wait_ms_per_layer": None,
        "tokens_per_s": tokens.shape[0] * options.steps / seconds,
        "experts": None,
        "bytes_written": written,
    }
