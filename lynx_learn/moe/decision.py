"""What decides at decode: the small interface that a selector and every published rule share."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .families import MoeLayer


class Routing(NamedTuple):
    """What one MoE layer is about to do with G decode batches of T tokens each (at decode G is 1; a simulation has many)."""

    hidden: Tensor
    """(G, T, hidden), entering the block."""
    logits: Tensor
    """(G, T, experts), before the activation."""
    indices: Tensor
    """(G, T, top_k), int64."""
    weights: Tensor
    """(G, T, top_k)."""
    active: Tensor
    """(G, T) False for padding and ended sequences, which do not vote, and run on experts that others load."""


# Where a vector of counts has the decode batches, their active tokens, the assignments of these that surrogates answer, and
# from where on the batches that loaded each expert, as routed and then as run.
BATCHES, TOKENS, ANSWERED, LOADS = range(4)


class Sums(IntEnum):
    """Where a vector has what an engine's layer sums over the steps that it acts on, int64."""

    ROUTED = 0
    """Distinct experts as routed."""
    LOADED = 1
    """Distinct experts as run."""
    ASSIGNMENTS = 2
    """Of active tokens."""
    ANSWERED = 3
    """Those of them that surrogates answer."""
    CHECK = 4
    """The sum of what was decided less that of what was run: 0."""


class Decision(NamedTuple):
    """What it shall do instead.

    An assignment that is left out points at an expert that is kept, with weight 0: no expert is loaded for it, and no
    experts implementation needs to know of it.
    """

    indices: Tensor
    """(G, T, top_k)."""
    weights: Tensor
    """(G, T, top_k)."""
    addition: Tensor | None = None
    """(G, T, hidden), what surrogates answer; None: nothing."""
    answered: Tensor | None = None
    """(G, T, top_k) True where a surrogate answers."""
    loads: tuple[Tensor, Tensor] | None = None
    """Experts that active tokens load as routed and as run, both (G, experts), from a policy that has kept the others to the latter itself."""
    factor: Tensor | None = None
    """(G, T, hidden), what the experts' output is multiplied with before the addition; None: 1."""
    counts: Tensor | None = None
    """(LOADS + 2 · experts,), int64: what is to be counted of one decode batch, from what has counted it already."""


Parts = TypeVar("Parts", Routing, Decision)


class Policy(Protocol):
    """Decides which experts each decode batch keeps. No host synchronisation, no shapes that depend on values."""

    @property
    def name(self) -> str:
        """Of the method, for tables."""

    @property
    def setting(self) -> str:
        """Its parameters, for tables."""

    def bind(self, layers: list[MoeLayer]) -> None:
        """Check that it fits these layers and move what it holds to their devices."""

    def decide(self, layer: MoeLayer, routing: Routing) -> Decision:
        """Rewrite one layer's assignments."""

    def own_bytes(self, layer: MoeLayer, skipped: Tensor, batches: int) -> float:
        """Bytes that it reads itself, such as scorer and surrogates, for decode batches of a layer that left out `skipped` experts in all."""


def each_tensor(change: Callable[[Tensor], Tensor], parts: Parts) -> Parts:
    """A routing or decision with every tensor that it holds changed, such as by one dimension more or less."""

    def changed(part: Tensor | tuple[Tensor, ...] | None) -> Any:
        if part is None or isinstance(part, Tensor):
            return None if part is None else change(part)
        return tuple(map(change, part))

    return type(parts)(*map(changed, parts))


def used_experts(indices: Tensor, active: Tensor, experts: int) -> Tensor:
    """Which experts the active tokens' assignments load: `(G, experts)`, bool."""
    # Those of other tokens go to one place more, which is cut off.
    places = torch.where(active.unsqueeze(-1), indices, experts).flatten(-2)
    used = torch.zeros(*indices.shape[:-2], experts + 1, dtype=torch.bool, device=indices.device)
    return used.scatter(-1, places, True)[..., :experts]


def usable_experts(used: Tensor) -> Tensor:
    """Which experts a batch may run `(G, experts)`: those that active tokens load, `used`; any where none is active.

    A token that is not active loads nothing for itself, but runs with its own weights on what is there: should it be
    taken for ended wrongly, little is lost. Where every token is taken so, nothing is there, and all run.
    """
    return used | ~used.any(-1, keepdim=True)


def confine(decision: Decision, active: Tensor, experts: int) -> Decision:
    """Point assignments of tokens that are not active at an expert that is loaded anyway, with weight 0, unless theirs is."""
    used = used_experts(decision.indices, active, experts)
    usable = usable_experts(used)
    flat = decision.indices.flatten(-2)
    stays = usable.gather(-1, flat).view_as(decision.indices)
    anchor = used.to(torch.int8).argmax(-1)
    indices = torch.where(stays, decision.indices, anchor[:, None, None])
    return decision._replace(indices=indices, weights=decision.weights * stays)
