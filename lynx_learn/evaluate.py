"""`lynx-learn evaluate`: what methods lose and save on test text, side by side."""

import itertools
import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from . import corpus as corpora
from .baselines import Random, XShare
from .card import run_record, write_card
from .errors import OptionError
from .families import MoeLayer, find_moe_layers
from .models import load_model
from .policies import Decision, Groups, Policy
from .progress import track
from .selector import LynxSelector, read_metrics
from .simulate import METRICS, Comparison, compare
from .traces import write_atomically

# The learned method's sweep: thresholds between and around the calibrated ones, so that its curve can be read off.
SWEEP_FACTORS = (0.3, 3.0)

Method = Literal["random", "xshare", "gate_sum", "learned"]


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `lynx-learn evaluate`.

    Attributes:
        selector: selector directory or Hub id.
        out: folder for `report.json`.
        model: folder or Hub id; by default the selector's base model.
        corpus, split: test text; must be used for nothing else.
        methods: which to measure; `untouched` is always there.
        kept_shares: shares of the experts that a rule with a fixed number of them is swept over.
        batch_sizes: decode batch sizes.
        groups: groups of sequences decoded together, for each batch size.
        length, prompt: tokens of a sequence, and how many of them stand for the prompt and are not scored.
        card: also put the figures into the selector's card.
        device, dtype: of the model, as in `collect`.
        seed: of the grouping and of the random rule.
    """

    selector: str
    out: str
    model: str | None = None
    corpus: str = corpora.BUILT_IN
    split: corpora.Split = "test"
    methods: list[Method] = field(default_factory=lambda: ["random", "xshare", "gate_sum", "learned"])
    kept_shares: list[float] = field(default_factory=lambda: [0.25, 0.3125, 0.375, 0.4375, 0.5, 0.5625, 0.625, 0.75])
    batch_sizes: list[int] = field(default_factory=lambda: [16])
    groups: int = 24
    length: int = 128
    prompt: int = 32
    card: bool = False
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 2

    def __post_init__(self) -> None:
        for name in ("methods", "batch_sizes"):
            if not getattr(self, name):
                raise OptionError(f"--{name} is empty: expected one value or more")
        if self.groups < 2:
            raise OptionError(f"--groups {self.groups} is not usable: expected 2 or more, an interval needs them")
        if not 0 < self.prompt < self.length - 1:
            raise OptionError(f"--prompt {self.prompt} is not usable: expected 1 to --length - 2 ({self.length - 2})")
        for share in self.kept_shares:
            if not 0 < share <= 1:
                raise OptionError(f"--kept_shares {share:g} is not usable: expected above 0 and at most 1")
        for size in self.batch_sizes:
            if size < 1:
                raise OptionError(f"--batch_sizes {size} is not usable: expected 1 or more")


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Measure, write `report.json`, and return it."""
    metrics = read_metrics(options.selector) if options.card else {}
    selector = LynxSelector.from_pretrained(options.selector)
    loaded = load_model(options.model or selector.config.base_model, options.device, options.dtype)
    layers = find_moe_layers(loaded.model)
    selector.check(layers)
    points: list[dict[str, Any]] = []
    sources: set[str] = set()
    for size in options.batch_sizes:
        groups = corpora.decode_groups(
            options.corpus, loaded.tokenizer, options.split, size, options.length, options.groups, options.seed
        )
        groups = [(tokens.to(loaded.input_device), names) for tokens, names in groups]
        sources.update(name for _, names in groups for name in names)
        title = f"evaluate, batch {size}"
        results = compare(
            loaded.model,
            layers,
            groups,
            [Untouched(), *policies(options, selector, layers, size)],
            options.prompt,
            lambda steps, t=title: track(steps, t, options.groups, unit="groups"),  # type: ignore[misc]
        )
        plain = untouched(results[0], size)
        points += [plain, *(point(result, size, plain["experts"]) for result in results[1:])]
    report = {
        "environment": environment(),
        "options": asdict(options),
        "base_model": selector.config.base_model,
        "sources": sorted(sources),
        "points": points,
        "matched": matched(points, [float(b) for b in selector.config.thresholds.get("kl", {})]),
    }
    write_atomically(Path(options.out) / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    if options.card:
        folder = Path(options.selector)
        write_card(
            folder,
            LynxSelector.from_pretrained(folder),  # what ran has been rounded to the model's precision
            {**metrics, "evaluate": report},
            {"run-evaluate.yaml": run_record("evaluate", asdict(options))},
        )
    return report


def policies(options: EvaluateOptions, selector: LynxSelector, layers: list[MoeLayer], size: int) -> list[Policy]:
    """Every method at every setting of its sweep."""
    kept = sorted({max(layers[0].top_k, round(share * layers[0].num_experts)) for share in options.kept_shares})
    found: list[Policy] = []
    if "random" in options.methods:
        found += [Random(m, options.seed) for m in kept]
    if "xshare" in options.methods:
        found += [XShare(m) for m in kept]
    if "gate_sum" in options.methods:
        found += [XShare(m, warm_up=False) for m in kept]
    if "learned" in options.methods:
        table = selector.config.thresholds.get("kl", {})
        budgeted = [selector.policy(float(budget)) for budget in table]
        found += budgeted
        taus = sorted({float(p.thresholds[(torch.tensor(size) >= p.sizes).sum()]) for p in budgeted} - {0.0})
        if taus:
            between = [math.sqrt(a * b) for a, b in itertools.pairwise(taus)]
            found += [
                selector.at_threshold(tau)
                for tau in (taus[0] * SWEEP_FACTORS[0], *between, taus[-1] * SWEEP_FACTORS[1])
            ]
    if not found:
        raise OptionError(
            "nothing to evaluate: the selector is not calibrated; run `lynx-learn calibrate` or add other --methods"
        )
    return found


def margin(values: torch.Tensor) -> float:
    """Half the width of the 95% interval of the mean of independent `values`, by Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1) * values.std() / math.sqrt(len(values)))


def point(result: Comparison, size: int, untouched_experts: float) -> dict[str, Any]:
    """One row of the report; bytes are relative to what the untouched model loads on the same text."""
    by_source = {metric: result.by_source(metric) for metric in METRICS}
    stats = result.mean_stats()
    worst = max(by_source["kl"], key=by_source["kl"].__getitem__)
    return {
        "method": result.name,
        "setting": result.setting,
        "batch_size": size,
        "groups": len(result.stats),
        "tokens": result.tokens,
        **stats,
        "bytes": stats["bytes"] * stats["experts_before"] / untouched_experts,
        **{metric: result.mean(metric) for metric in METRICS},
        **{f"{metric}_margin": margin(result.group_means(metric)) for metric in METRICS},
        "by_source": by_source,
        "worst_source": worst,
    }


class Untouched:
    """Leaves every assignment as routed. Other policies change what later layers route, so it counts by itself."""

    name, setting = "untouched", ""

    def bind(self, layers: list[MoeLayer]) -> None:
        pass

    def decide(self, layer: MoeLayer, groups: Groups) -> Decision:
        return Decision(groups.indices, groups.weights)

    def surrogate_bytes(self, layer: MoeLayer) -> int:
        return 0


def untouched(result: Comparison, size: int) -> dict[str, Any]:
    """The row of the untouched model, which loses nothing by definition."""
    before = result.mean_stats()["experts_before"]
    zeros = {key: 0.0 for metric in METRICS for key in (metric, f"{metric}_margin")}
    row = {
        "method": "untouched",
        "setting": "",
        "batch_size": size,
        "groups": len(result.stats),
        "tokens": result.tokens,
    }
    return {**row, "experts_before": before, "experts": before, "bytes": 1.0, "answered": 0.0, **zeros}


def matched(points: list[dict[str, Any]], levels: list[float]) -> list[dict[str, Any]]:
    """Experts and bytes of each method at equal KL and equal ΔNLL, interpolated on its curve, never beyond it.

    Levels are the calibrated budgets and, in `kl`, what the learned method measured at each of them.
    """
    rows = []
    for size in sorted({p["batch_size"] for p in points}):
        own = [p for p in points if p["batch_size"] == size]
        for metric in ("kl", "nll"):
            budgeted = [p for p in own if p["method"] == "learned" and p["setting"].startswith("budget")]
            reached = [p[metric] for p in budgeted if metric == "kl" and p[metric] > 0]
            for level in sorted({*levels, *reached}):
                for method in dict.fromkeys(p["method"] for p in own if p["method"] != "untouched"):
                    curve = sorted(
                        (p[metric], p["experts"], p["bytes"]) for p in own if p["method"] == method and p[metric] > 0
                    )
                    experts, size_ratio = interpolate(curve, level)
                    rows.append(
                        {
                            "batch_size": size,
                            "metric": metric,
                            "level": level,
                            "method": method,
                            "experts": experts,
                            "bytes": size_ratio,
                        }
                    )
    return rows


def interpolate(curve: list[tuple[float, float, float]], level: float) -> tuple[float | None, float | None]:
    """Experts and bytes where the curve (loss, experts, bytes) reaches `level`, on the loss's logarithm; None outside."""
    for (l0, e0, b0), (l1, e1, b1) in itertools.pairwise(curve):
        if l0 <= level <= l1:
            low, high = math.log(l0), math.log(l1)  # equal for neighbouring floats, too
            share = 0.0 if low == high else (math.log(level) - low) / (high - low)
            return e0 + share * (e1 - e0), b0 + share * (b1 - b0)
    return None, None


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = gpu or f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return {
        "machine": machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
