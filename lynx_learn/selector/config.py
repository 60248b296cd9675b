"""What a selector directory says of itself, read strictly."""

import json
import math
from bisect import bisect_right
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import OptionError, SelectorError
from ..files import compact_json
from ..moe.identity import Identity, is_identity

CONFIG, WEIGHTS, METRICS, CARD, RUN = "config.json", "selector.safetensors", "metrics.json", "README.md", "run.yaml"

FORMAT_VERSION = 3
# metric -> budget (as text) -> decode batch size (as text) -> threshold; 0 means that bucket skips nothing.
Thresholds = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class SelectorConfig:
    """The base model a selector belongs to, its shape, and its calibrated thresholds.

    Attributes:
        base_model, base_revision: where the model came from, for people.
        identity: what attaching compares the model with (`moe.identity`).
        layers: names of the MoE blocks, in order.
        scorer, rank: kind of scorer, mean rank of the surrogates (0: none).
        keep_top1: every token keeps its first expert.
        thresholds: see `Thresholds`.
        calibration: metric -> for what text its thresholds hold, as the `sources` with their shares, and with what
            `confidence`; and with how many drafts behind each token of a step (`speculative_tokens`). What was measured at them stands in `metrics.json`.
    """

    base_model: str
    base_revision: str
    model_type: str
    identity: Identity
    layers: tuple[str, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    expert_bytes: int
    scorer: str
    rank: int
    keep_top1: bool = False
    thresholds: Thresholds = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return compact_json(asdict(self)) + "\n"

    @classmethod
    def read(cls, path: Path) -> "SelectorConfig":
        """Read `config.json`; refuses unknown or missing keys and other format versions.

        Raises:
            SelectorError: with what is wrong.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise SelectorError(
                f"{path.parent} is no selector: it has no {path.name}; `lynx-learn train` writes one"
            ) from None
        except (OSError, ValueError) as error:
            raise _unreadable(str(path), error) from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, path: str) -> "SelectorConfig":
        """As `read`, from the text of the file `path`."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, error) from None
        if not isinstance(values, dict):
            raise SelectorError(f"{path} holds no JSON object: expected the one that `lynx-learn train` writes")
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise SelectorError(
                f"{path} has format version {version}, this package reads {FORMAT_VERSION}: train again"
            )
        known = {f.name for f in fields(cls)}
        optional = {"keep_top1", "thresholds", "calibration"}
        if unknown := sorted(values.keys() - known):
            raise SelectorError(f"{path} has unknown keys {', '.join(unknown)}: remove them or update lynx-learn")
        if missing := sorted(known - optional - values.keys()):
            raise SelectorError(f"{path} lacks {', '.join(missing)}: train again")
        if wrong := _unusable(values):
            raise SelectorError(f"{path} has values that cannot be used for {', '.join(wrong)}: train again")
        values["layers"] = tuple(values["layers"])
        return cls(**values)

    def calibrated(self, budget: float, metric: str = "kl") -> dict[int, float]:
        """Decode batch size -> calibrated threshold (nats) for a budget (nats of KL, or the unit of `metric`).

        Raises:
            OptionError: the budget is negative, or the selector was not calibrated for it.
        """
        if not budget >= 0:
            raise OptionError(f"budget {budget:g} is not usable: expected 0 or more")
        if budget == 0:
            return {1: 0.0}
        table = self.thresholds.get(metric)
        if not table:
            known = ", ".join(self.thresholds) or "none"
            raise OptionError(
                f"the selector is not calibrated for metric {metric!r} (calibrated: {known}): run `lynx-learn calibrate` first"
            )
        for text, buckets in table.items():
            if float(text) == budget:
                return {int(n): tau for n, tau in buckets.items()}
        raise OptionError(
            f"the selector is not calibrated for a budget of {budget:g} (calibrated: {', '.join(table)}): calibrate it or take one of these"
        )


def outside(limits: dict[str, Any], use: dict[str, Any]) -> list[str]:
    """What of a use no budget is certified for, in words.

    Args:
        limits: what `SelectorConfig.calibration` says of a metric.
        use: what is known of `temperature`, `top_p`, `length` and `speculative_tokens`, by these names.
    """
    found = []
    for name, value in use.items():
        own = limits.get(name)
        if own is not None and (value > own if name == "length" else value != own):
            found.append(f"{name} {value} (certified: {'up to ' if name == 'length' else ''}{own})")
    return found


def by_active(thresholds: dict[int, float]) -> list[float]:
    """The threshold (nats) for 0, 1, 2, … active tokens; the last one holds for any number beyond, too.

    Between two calibrated sizes it is read off the straight line of log threshold over log size, since thresholds follow a
    power of the size. Where the smaller one skips nothing, nor do sizes up to the larger one; below the smallest size
    nothing is skipped.
    """
    sizes = sorted(thresholds)
    return [_between(thresholds, sizes, active) for active in range(max(sizes, default=0) + 1)]


def _between(thresholds: dict[int, float], sizes: list[int], active: int) -> float:
    place = bisect_right(sizes, active)
    if not place:
        return 0.0
    low, tau = sizes[place - 1], thresholds[sizes[place - 1]]
    if low == active or place == len(sizes) or not tau:
        return tau
    high = sizes[place]
    if not thresholds[high] > tau:
        return min(tau, thresholds[high])
    return float(tau * (thresholds[high] / tau) ** (math.log(active / low) / math.log(high / low)))


def _unreadable(path: str, error: Exception) -> SelectorError:
    return SelectorError(f"{path} cannot be read ({error}): expected the JSON that `lynx-learn train` writes")


def _unusable(values: dict[str, Any]) -> list[str]:
    """Keys whose values have another type or range than `lynx-learn train` writes."""
    lowest = {"num_experts": 1, "top_k": 1, "hidden_size": 1, "expert_bytes": 1, "rank": 0}
    wrong = [key for key, low in lowest.items() if type(values[key]) is not int or values[key] < low]
    texts = ("base_model", "base_revision", "model_type", "scorer")
    wrong += [key for key in texts if not isinstance(values[key], str)]
    layers = values["layers"]
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        wrong.append("layers")
    limits = values.get("calibration", {})
    if not isinstance(limits, dict) or not all(map(_is_limit, limits.values())):
        wrong.append("calibration")
    if not is_identity(values["identity"]):
        wrong.append("identity")
    try:
        budgets = [entry for table in values.get("thresholds", {}).values() for entry in table.items()]
        sizes = [(float(budget), *entry) for budget, buckets in budgets for entry in buckets.items()]
        usable = all(budget >= 0 and int(size) > 0 and float(tau) >= 0 for budget, size, tau in sizes)
    except (AttributeError, TypeError, ValueError):
        usable = False
    return wrong if usable else [*wrong, "thresholds"]


def _is_limit(value: Any) -> bool:
    """Whether it can be what thresholds of a metric hold for."""
    prices = value.get("prices", {"source": ""}) if isinstance(value, dict) else None
    if not isinstance(prices, dict) or not isinstance(prices.get("source"), str):
        return False
    return all(type(prices.get(name, 1)) in (int, float) for name in ("share", "devices"))
