"""Whether a model is the one that something was made for: its routing rule, routers, experts and all other weights.

Weights are compared by sketches: eight fixed random projections of a fixed sample of their values, scaled so that the
mean squared distance of two sketches is an estimate of the mean squared distance of the weights (Johnson and
Lindenstrauss 1984). Unlike a hash that tolerates rounding: loading bfloat16 weights as float16 or float32 moves them by
less than 0.001%, loading float32 ones as bfloat16 by 0.12%, rounding to 8 bits by 2 to 3%, a short fine-tuning by 0.5%
or more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # an exported graph is served without torch, and reads identities too
    from torch import Tensor, nn

    from .families import Layer, MoeLayer
    from .fp8.scaled import Scaled

# Numbers of modules that matter in training only.
FOR_TRAINING = re.compile("dropout|jitter|noise|coef|norm_type")
PROJECTIONS = 8
# Values looked at of one tensor.
SAMPLE = 2**14
# Relative distance (root of the mean square) up to which weights count as the same.
SAME = 0.003
# Ends the name of what a configuration sets, beside the weights.
SET = " (as configured)"
Sketch = list[float]
"""Root mean square of the values, then the projections."""
Identity = dict[str, Any]
"""JSON: `rules` [text by layer], `routers` and `experts` [{name: sketch} by layer], `rest` {name: sketch}; what an engine cannot see of its model is left out."""


def identify(layers: Sequence[Layer], model: nn.Module | None = None) -> Identity:
    """What is compared of a model; without `model` not the weights outside of its MoE layers."""
    from .families import MoeLayer
    from .fp8.scaled import weights_of
    from .loading import in_memory

    found: Identity = {"routers": [{} for _ in layers]}
    for layer, own in zip(layers, found["routers"], strict=True):
        with in_memory(layer.router):
            state = weights_of(layer.router.state_dict(), getattr(layer.router, "block_size", None))
            own |= {key: sketch([value]) for key, value in state}
    whole = [layer for layer in layers if isinstance(layer, MoeLayer)]
    if len(whole) < len(layers):
        return found
    found |= {"rules": [describe(layer) for layer in whole], "experts": [{} for _ in whole]}
    for layer, routers, experts in zip(whole, found["routers"], found["experts"], strict=True):
        parts = {"choice bias": layer.rule.bias, "expert scale": layer.rule.expert_scale}
        routers |= {name: sketch([value]) for name, value in parts.items() if value is not None}
        with in_memory(layer.experts):
            experts |= {name: sketch([value]) for name, value in layer.expert_weights()}
    if model is not None:
        found["rest"] = dict(_rest(model, whole))
    return found


def part_of(identity: Identity, layer: int) -> Identity:
    """What is compared of one MoE layer, as `identify` gives it of that layer alone."""
    return {name: identity[name][layer : layer + 1] for name in ("rules", "routers", "experts") if name in identity}


def describe(layer: MoeLayer) -> str:
    """What a layer does with its logits and its experts' products, as far as it is no matter of weights."""
    import torch

    activation = getattr(layer.experts, "act_fn", None)
    numbers = {name: value for name, value in vars(layer.experts).items() if isinstance(value, float)}
    parts = [f"top-{layer.top_k}", layer.rule.describe()]
    parts += [f"near {layer.rule.nearness:g}"] if layer.rule.nearness else []
    if callable(activation):  # by what it does: its name is a matter of versions
        parts.append(
            "activation of 1 and -1 " + ", ".join(f"{x:.3g}" for x in activation(torch.tensor([1.0, -1.0])).tolist())
        )
    return ", ".join([*parts, *(f"{name} {value:g}" for name, value in sorted(numbers.items()))])


def _rest(model: nn.Module, layers: Sequence[MoeLayer]) -> Iterator[tuple[str, Sketch]]:
    """Sketches of all other floating-point weights, and of what a configuration sets beside them: the frequencies of
    rotary embeddings, scales, what norms add. Those of one name in all layers are taken together."""
    import torch

    from .fp8.scaled import Scaled, weights_of
    from .loading import in_memory

    taken = {id(p) for layer in layers for part in (layer.router, layer.experts) for p in part.parameters()}
    taken |= set(_of_adapters(model))
    alike: dict[str, list[Tensor]] = {}

    def add(name: str, value: Tensor | Scaled) -> None:
        plain = name.replace(".base_layer.", ".").removeprefix("base_model.model.")
        alike.setdefault(re.sub(r"\b\d+\b", "*", plain), []).append(_sample(value))

    for path, module in model.named_modules():
        for name, number in vars(module).items():
            if isinstance(number, float) and math.isfinite(number) and not FOR_TRAINING.search(name):
                add(f"{path}.{name}{SET}", torch.tensor([number]))
        for name, value in module.named_buffers(path, recurse=False):
            # Others than the original frequencies may change as texts grow.
            if name.endswith("original_inv_freq") and not value.is_meta:
                add(f"{name}{SET}", value)
        own = [name for name, p in module.named_parameters(path, recurse=False) if id(p) not in taken]
        if not own:
            continue
        taken |= {id(p) for p in module.parameters(recurse=False)}  # embeddings that are the head too
        with in_memory(module, recurse=False):
            block = getattr(module, "block_size", None)
            for name, value in weights_of(dict(module.named_parameters(path, recurse=False)), block):
                plain = isinstance(value, Scaled) or (value.is_floating_point() and value.itemsize > 1)
                if name in own and plain:
                    add(name, value)
    for name, parts in sorted(alike.items()):
        yield name, sketch(parts)


def _of_adapters(model: nn.Module) -> Iterator[int]:
    """Ids of weights that adapters have put beside a layer's own; active ones are refused elsewhere."""
    for module in model.modules():
        if (base := getattr(module, "base_layer", None)) is not None:
            plain = {id(p) for p in base.parameters()}
            yield from (id(p) for p in module.parameters() if id(p) not in plain)


# One expert's weights in a checkpoint, and where they are in the tensor of all experts: its name, its part, of how many.
EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.weight")
ALL_EXPERTS = re.compile(r"(.+)\.experts\.([a-z]\w*)")
PARTS = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
    "w1": ("gate_up_proj", 0, 2),
    "w3": ("gate_up_proj", 1, 2),
    "w2": ("down_proj", 0, 1),
}


class Passing:
    """Sketches a checkpoint's weights while an engine reads them, which then packs, splits or quantizes them.

    Args:
        num_experts: of each MoE layer.
        depth: layers that the model has; a checkpoint may have more behind them, to speculate with.
        block: rows and columns of a block of float8 weights that has a scale; None: there are no such weights.
    """

    def __init__(self, num_experts: int, depth: int, block: Any = None) -> None:
        self.num_experts, self.depth = num_experts, depth
        self.block = tuple(block) if block else None
        self.waiting: dict[str, Tensor] = {}
        self.rest: dict[str, dict[tuple[int, ...], Tensor]] = {}
        self.experts: dict[str, dict[str, tuple[Any, Any]]] = {}

    def see(self, name: str, value: Tensor) -> None:
        """One tensor, under the name that it has in the checkpoint."""
        numbers = tuple(int(number) for number in re.findall(r"\b\d+\b", name))
        if not value.is_floating_point() or (numbers and numbers[0] >= self.depth):
            return
        if (whole := self._with_scale(name, value)) is None:
            return
        name, found_value = whole
        if (found := EXPERT.fullmatch(name)) and found[3] in PARTS:
            self._expert(found[1], int(found[2]), found_value, *PARTS[found[3]])
        elif found := ALL_EXPERTS.fullmatch(name):
            self.experts.setdefault(found[1], {})[found[2]] = (_sample(found_value), np.ones(1, bool))
        else:
            self.rest.setdefault(re.sub(r"\b\d+\b", "*", name), {})[numbers] = _sample(found_value)

    def _with_scale(self, name: str, value: Tensor) -> tuple[str, Tensor | Scaled] | None:
        """A tensor that can be looked at: one in float8 once its scale has passed too; None: not yet, or never."""
        from .fp8.scaled import KIND, SCALE, Scaled

        plain = name.removesuffix(SCALE)
        if self.block is None or (plain == name and value.dtype != KIND):
            return (name, value) if value.itemsize > 1 else None
        other = self.waiting.pop(plain, None)
        if other is None:
            self.waiting[plain] = value
            return None
        return plain, Scaled(*((value, other) if plain == name else (other, value)), self.block)

    def _expert(self, block: str, expert: int, value: Tensor | Scaled, name: str, part: int, parts: int) -> None:
        """Sampled at the places that it has among all experts, where it lies in one piece."""
        import torch

        size = value.numel()
        total = self.num_experts * parts * size
        places = _places(total) if total > SAMPLE else np.arange(total)
        start = (expert * parts + part) * size
        inside = slice(*np.searchsorted(places, [start, start + size]))
        sample, seen = self.experts.setdefault(block, {}).setdefault(
            name, (torch.zeros(len(places)), np.zeros(len(places), bool))
        )
        if len(sample) == len(places):  # otherwise experts differ in shape
            sample[inside] = _at(value, places[inside] - start)
            seen[inside] = True

    def identity(self) -> Identity:
        """What was seen as a whole, layers in order; routers are not among it, as their weights are there to be read."""
        blocks = sorted(self.experts, key=lambda block: [int(number) for number in re.findall(r"\b\d+\b", block)])
        return {
            "routers": [],
            "experts": [
                {name: sketch([sample]) for name, (sample, seen) in self.experts[block].items() if seen.all()}
                for block in blocks
            ],
            "rest": {name: sketch([part for _, part in sorted(parts.items())]) for name, parts in self.rest.items()},
        }


def sketch(values: Sequence[Tensor | Scaled]) -> Sketch:
    """Of one or several tensors as one."""
    import torch

    sample = torch.cat([_sample(value) for value in values]).double().cpu().numpy()
    if not len(sample):
        return [0.0] * (PROJECTIONS + 1)
    with np.errstate(invalid="ignore"):
        projected = sample @ _signs(len(sample)) / math.sqrt(len(sample))
    numbers = [float(np.sqrt(np.mean(sample**2))), *projected.tolist()]
    return [float(f"{number:.6g}") for number in numbers]


def _sample(value: Tensor | Scaled) -> Tensor:
    """At most `SAMPLE` values, always at the same places of a shape; of packed and scaled ones what they stand for."""
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach()
        if type(value) not in (torch.Tensor, torch.nn.Parameter) and hasattr(value, "qdata"):  # of torchao
            value = value.dequantize()
        if value.numel() <= SAMPLE:
            return value.reshape(-1).float()
    return _at(value, _places(value.numel()) if value.numel() > SAMPLE else np.arange(value.numel()))


def _at(value: Tensor | Scaled, places: Any) -> Tensor:
    """At places in the flattened values, `(places,)`."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value.at(places)
    index = np.unravel_index(places, tuple(value.shape))
    return value.detach()[tuple(torch.from_numpy(axis).to(value.device) for axis in index)].float()


# numpy promises that RandomState gives the same numbers in every version.
@lru_cache(maxsize=4)
def _places(count: int) -> Any:
    return np.sort(np.random.RandomState(1).randint(0, count, SAMPLE, dtype=np.int64))


@lru_cache(maxsize=4)
def _signs(count: int) -> Any:
    return np.random.RandomState(2).randint(0, 2, (count, PROJECTIONS)).astype(np.int8) * np.int8(2) - np.int8(1)


def distance(a: Sketch, b: Sketch) -> float:
    """Relative distance of the weights behind two sketches."""
    scale = max(a[0], b[0])
    if not scale:
        return 0.0
    squares = [(x - y) ** 2 for x, y in zip(a[1:], b[1:], strict=True)]
    return max(math.sqrt(sum(squares) / PROJECTIONS), abs(a[0] - b[0])) / scale


def differences(stored: Identity, found: Identity) -> list[str]:
    """What of a model is not as `stored` says, for people; what only one of the two knows is not
    compared, but that weights are new."""
    said = []
    for there, here in zip(stored.get("rules", ()), found.get("rules", ()), strict=False):
        if there != here:
            said.append(f"its routing rule ({here}; expected {there})")
            break
    for part in ("routers", "experts"):
        pairs = list(zip(stored.get(part, ()), found.get(part, ()), strict=False))
        if far := _farthest(pairs):
            said.append(f"its {part} ({far})")
        elif any(there and here and not there.keys() & here.keys() for there, here in pairs):
            said.append(f"its {part} (other tensors)")
    known, rest = stored.get("rest", {}), found.get("rest", {})
    new = sorted(name for name in rest.keys() - known.keys() if not name.endswith(SET))
    if far := _farthest([(known, rest)]):
        said.append(f"other weights ({far})")
    elif known and new and "rules" in stored and "rules" in found:  # both of transformers, where names are the same
        said.append(f"other weights ({new[0]} is new)")
    return said


def _farthest(pairs: Iterable[tuple[dict[str, Sketch], dict[str, Sketch]]]) -> str:
    """The largest distance of what both know, if it is one, and where."""
    pairs = list(pairs)
    all_found = [
        (distance(there[name], here[name]), name, place)
        for place, (there, here) in enumerate(pairs)
        for name in there.keys() & here.keys()
    ]
    # What is not finite is not compared: it is told where it is run.
    far, name, place = max((found for found in all_found if math.isfinite(found[0])), default=(0.0, "", 0))
    if not far > SAME:
        return ""
    where = f"{name} of MoE layer {place}" if len(pairs) > 1 else name
    return f"by {far:.1%}, {where}"


def is_identity(value: object) -> bool:
    """Whether JSON has the shape of an `Identity`."""

    def sketches(part: object) -> bool:
        return isinstance(part, dict) and all(
            isinstance(key, str)
            and isinstance(numbers, list)
            and len(numbers) == PROJECTIONS + 1
            and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
            for key, numbers in part.items()
        )

    if not isinstance(value, dict) or "routers" not in value or value.keys() - {"rules", "routers", "experts", "rest"}:
        return False
    lists = [value[key] for key in ("rules", "routers", "experts") if key in value]
    if not all(isinstance(part, list) for part in lists):
        return False
    return (
        all(isinstance(rule, str) for rule in value.get("rules", ()))
        and all(sketches(part) for key in ("routers", "experts") for part in value.get(key, ()))
        and sketches(value.get("rest", {}))
    )
