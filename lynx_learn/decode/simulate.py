"""Teacher-forced decode of many sequences side by side, several groups or policies in one pass.

The tokens at one position of B sequences form one decode batch of size B; with `together` > 1, as where drafts are
verified, those at so many positions in a row. All layers skip at once, and later positions see the keys and values of
earlier ones that skipped, as in a real decode. The first positions stand for the prompt: they run untouched and are not
scored.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..moe.decision import Decision, Policy, Routing
from ..moe.experts import experts_by_distinct
from ..moe.families import MoeLayer
from ..moe.hooks import intercept
from .runtime import act
from .tally import Stats, Tally

METRICS = ("kl", "nll", "agreement")
# Parts, of equal length, that the scored positions are split into to see whether losses grow along a decode.
PARTS = 4
# Rows of logits compared at a time, so that float32 copies of a large vocabulary stay small.
ROWS_AT_A_TIME = 512
# Tokens of a pass, unless one group has more: fewer leave products small, more no longer fit a CPU's caches.
TOKENS_AT_A_TIME = 2048
# Untouched predictions that are kept for whoever measures the same groups again; beyond that they are made again.
KEPT_BYTES = 2**28
# How many times as much of both on a GPU, which waits for launches where a pass is small.
GPU_FACTOR = 16


class Run(NamedTuple):
    """One group of sequences that decode together, and what decides for it; None: the untouched model."""

    tokens: Tensor
    """`(sequences, positions)`, without padding."""
    policy: Policy | None


def simulated_logits(
    model: nn.Module, layers: list[MoeLayer], tokens: Tensor, policy: Policy | None, prompt: int
) -> tuple[Tensor, Stats]:
    """Logits `(sequences, positions - prompt, vocabulary)` of a simulated decode, and what skipping did.

    Args:
        tokens: `(sequences, positions)`; the sequences of one decode batch, without padding.
        policy: what decides; None for the untouched model.
        prompt: leading positions that are prefill.
    """
    (found,) = stacked_logits(model, layers, [Run(tokens, policy)], prompt)
    return found


def stacked_logits(
    model: nn.Module, layers: list[MoeLayer], runs: Sequence[Run], prompt: int, together: int = 1
) -> list[tuple[Tensor, Stats]]:
    """As `simulated_logits` of several runs, whose sequences have one length, in one pass of the model.

    No decode batch holds tokens of two runs: each run's policy sees what it would see in a pass without the others.

    Args:
        together: positions of a sequence in one decode batch; those behind the prompt are a multiple of it.
    """
    positions = runs[0].tokens.shape[1]
    sizes = [len(run.tokens) for run in runs]
    tallies = [Tally(layers, run.policy) for run in runs]
    skipping = any(run.policy is not None for run in runs)

    def on_layer(layer: MoeLayer, routing: Routing) -> Decision | None:
        def by_run(part: Tensor) -> tuple[Tensor, ...]:
            return part.unflatten(0, (-1, positions)).split(sizes)

        def steps(part: Tensor) -> Tensor:
            """From `(sequences, positions, …)` to `(steps, tokens, …)`."""
            decoded = part.transpose(0, 1)[prompt:]
            return decoded if together == 1 else decoded.unflatten(0, (-1, together)).flatten(1, 2)

        def put_back(whole: Tensor, parts: list[Tensor | None]) -> Tensor:
            rows = []
            for own, part in zip(by_run(whole), parts, strict=True):
                changed = own[:, prompt:]
                if part is not None:
                    changed = part.unflatten(1, (together, -1)).flatten(0, 1).transpose(0, 1).to(own.dtype)
                rows.append(torch.cat([own[:, :prompt], changed], dim=1))
            return torch.cat(rows).flatten(0, 1)

        done = [
            act(run.policy, layer, Routing(*map(steps, parts)), tally)
            for run, tally, *parts in zip(runs, tallies, *map(by_run, routing), strict=True)
        ]
        if not skipping:
            return None
        names = ("indices", "weights", "addition", "factor")
        indices, weights, added, factors = ([getattr(d, name) for d in done] for name in names)

        def unless_none(parts: list[Tensor | None], otherwise: float) -> Tensor | None:
            if all(part is None for part in parts):
                return None
            return put_back(torch.full_like(routing.hidden, otherwise), parts)

        return Decision(
            put_back(routing.indices, indices),
            put_back(routing.weights, weights),
            addition=unless_none(added, 0.0),
            factor=unless_none(factors, 1.0),
        )

    tokens = runs[0].tokens if len(runs) == 1 else torch.cat([run.tokens for run in runs])
    # As at decode; where a gradient is wanted, it may be that of an expert whose weight is 0.
    leaner = skipping and not torch.is_grad_enabled()
    with intercept(model, layers, on_layer), experts_by_distinct(layers) if leaner else nullcontext():
        logits = model(input_ids=tokens, use_cache=False, **_last(model, positions - prompt)).logits
    parts = logits[:, prompt - positions :].split(sizes)
    return [(part, tally.stats()) for part, tally in zip(parts, tallies, strict=True)]


def _last(model: nn.Module, positions: int) -> dict[str, Any]:
    """So that the prompt's logits, a row of the vocabulary for each of its tokens, are not computed where that is known."""
    return {"logits_to_keep": positions} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def scored_positions(tokens: Tensor, prompt: int, ends: Collection[int] = ()) -> Tensor:
    """Which predictions of a decode count `(sequences, positions - prompt - 1)`: those up to the first end-of-text token.

    What a row holds after it stands for the next request in its place: it votes, and its loss is another request's.

    Args:
        tokens: `(sequences, positions)`.
        prompt: leading positions that are prefill.
        ends: tokens that end a sequence; none: every prediction counts.
    """
    targets = tokens[:, prompt + 1 :]
    ended = torch.isin(tokens[:, prompt:-1], torch.tensor(list(ends), dtype=tokens.dtype, device=tokens.device))
    return (ended.cumsum(1) == 0) & torch.ones_like(targets, dtype=torch.bool)


class Losses(NamedTuple):
    """Sums over the scored positions of one group, in the order of METRICS: nats, nats, changed greedy choices."""

    sums: Tensor
    """(sequences, 3)."""
    tokens: Tensor
    """(sequences,), how many positions these are."""
    part_sums: Tensor
    """(PARTS, 3), along the decode."""
    part_tokens: Tensor
    """(PARTS,)."""


class Reference:
    """The untouched model's predictions of one group, against which others are measured.

    Its logits are kept as the model gave them, and are turned into probabilities a part at a time: of a large vocabulary
    they are the most that measuring holds.

    Args:
        logits: `(sequences, positions, vocabulary)`.
        targets: next tokens `(sequences, positions)`.
        scored: which of them count `(sequences, positions)`; None: all.
    """

    @torch.no_grad()
    def __init__(self, logits: Tensor, targets: Tensor, scored: Tensor | None = None) -> None:
        self.logits, self.targets = logits, targets.to(logits.device)
        self.scored = torch.ones_like(targets, dtype=torch.bool) if scored is None else scored.to(logits.device)
        self.negative_entropy, self.target_log = torch.empty(2, *targets.shape, device=logits.device)
        self.greedy = torch.empty(targets.shape, dtype=torch.int64, device=logits.device)
        for part in self._parts():
            log = functional.log_softmax(logits[part].float(), -1)
            self.negative_entropy[part] = (self._probabilities(part) * log).sum(-1)
            self.target_log[part] = log.gather(-1, self.targets[part].unsqueeze(-1)).squeeze(-1)
            self.greedy[part] = log.argmax(-1)

    def _parts(self) -> Iterator[tuple[int, slice]]:
        """Places of some of one sequence's positions at a time: float32 of all of them would not fit."""
        sequences, positions = self.targets.shape
        for row in range(sequences):
            for start in range(0, positions, ROWS_AT_A_TIME):
                yield row, slice(start, start + ROWS_AT_A_TIME)

    def _probabilities(self, part: tuple[int, slice]) -> Tensor:
        return functional.softmax(self.logits[part].float(), -1)

    @property
    def bytes(self) -> int:
        """Of what it holds, about."""
        return self.logits.numel() * self.logits.element_size()

    @torch.no_grad()
    def losses(self, logits: Tensor) -> Losses:
        """KL(untouched, other), the rise of the negative log-likelihood, and whether the greedy choice changed."""
        values = torch.empty(*self.targets.shape, len(METRICS), device=logits.device)
        for part in self._parts():
            other = logits[part].float()
            partition = other.logsumexp(-1)
            kl = self.negative_entropy[part] - torch.linalg.vecdot(self._probabilities(part), other) + partition
            chosen = other.gather(-1, self.targets[part].unsqueeze(-1)).squeeze(-1)
            rise = self.target_log[part] - chosen + partition
            values[part] = torch.stack([kl, rise, (other.argmax(-1) != self.greedy[part]).float()], dim=-1)
        return self.losses_of(values)

    def losses_of(self, values: Tensor) -> Losses:
        """Sums of losses `(sequences, positions, 3)` over what is scored."""
        scored = self.scored.cpu()
        values = torch.where(scored.unsqueeze(-1), values.double().cpu(), 0.0)
        parts = [part.sum((0, 1)) for part in values.tensor_split(PARTS, dim=1)]
        counts = [part.sum() for part in scored.tensor_split(PARTS, dim=1)]
        return Losses(values.sum(1), scored.sum(1), torch.stack(parts), torch.stack(counts))


def per_token(sums: Tensor, counts: Tensor) -> Tensor:
    """One value per group whose mean is the loss per token of all groups: sums and counts `(groups,)`.

    Groups may hold different numbers of tokens; the linearised ratio (Cochran 1977, section 6) spreads as the ratio does.
    With equal counts these are the groups' own means. Groups without a token say nothing and are left out.
    """
    sums, counts = sums[counts > 0].double(), counts[counts > 0].double()
    if not len(counts):
        return sums
    rate = sums.sum() / counts.sum()
    return rate + (sums - rate * counts) / counts.mean()


@dataclass
class Comparison:
    """Losses of one policy against the untouched model over groups of sequences decoded together.

    All are sums over scored tokens, in the order of METRICS, with the number of tokens beside them.
    """

    name: str
    setting: str
    sums: Tensor
    """(groups, sequences, 3)."""
    counts: Tensor
    """(groups, sequences)."""
    part_sums: Tensor
    """(groups, PARTS, 3), along the decode."""
    part_counts: Tensor
    """(groups, PARTS)."""
    stats: list[Stats]
    sources: list[list[str]]
    """Of each sequence `[groups][sequences]`."""

    @property
    def tokens(self) -> int:
        """Decode tokens scored."""
        return int(self.counts.sum())

    def group_means(self, metric: str) -> Tensor:
        """One value per group, which is the unit of independence, see `per_token`."""
        return per_token(self.sums[:, :, METRICS.index(metric)].sum(1), self.counts.sum(1))

    def last_part(self, metric: str) -> Tensor:
        """The same of the last part of the positions."""
        return per_token(self.part_sums[:, -1, METRICS.index(metric)], self.part_counts[:, -1])

    def source_means(self, metric: str) -> dict[str, Tensor]:
        """The same of each source's sequences."""
        sums, found = self.sums[:, :, METRICS.index(metric)], {}
        for source in sorted({name for names in self.sources for name in names}):
            own = torch.tensor([[name == source for name in names] for names in self.sources])
            found[source] = per_token((sums * own).sum(1), (self.counts * own).sum(1))
        return found

    def mean(self, metric: str) -> float:
        return float(self.sums[:, :, METRICS.index(metric)].sum() / self.counts.sum())

    def by_source(self, metric: str) -> dict[str, float]:
        return {source: float(values.mean()) for source, values in self.source_means(metric).items() if len(values)}

    def by_part(self, metric: str) -> list[float]:
        """Loss per token in each part of the positions, along the decode."""
        sums = self.part_sums[:, :, METRICS.index(metric)].sum(0)
        return (sums / self.part_counts.sum(0).clamp_min(1)).tolist()

    def mean_stats(self) -> dict[str, float]:
        """Mean distinct experts per layer before and after, bytes relative to untouched, share answered."""
        count = len(self.stats)

        def average(pick: Callable[[Stats], float]) -> float:
            return sum(pick(s) for s in self.stats) / count

        return {
            "experts_before": average(lambda s: sum(s.experts_before) / len(s.experts_before)),
            "experts": average(lambda s: sum(s.experts_after) / len(s.experts_after)),
            "bytes": average(lambda s: s.bytes_ratio),
            "answered": average(lambda s: s.answered_share),
        }


def comparison(policy: Policy, losses: list[Losses], stats: list[Stats], sources: list[list[str]]) -> Comparison:
    """What was measured of one policy, group by group."""
    sums, tokens, part_sums, part_tokens = map(torch.stack, zip(*losses, strict=True))
    return Comparison(policy.name, policy.setting, sums, tokens, part_sums, part_tokens, stats, sources)


class Simulation:
    """Measures policies against the untouched model, whose predictions for the last groups are kept.

    Args:
        prompt: leading positions of each sequence that are prefill.
        ends: see `scored_positions`.
        together: see `stacked_logits`.
    """

    def __init__(
        self, model: nn.Module, layers: list[MoeLayer], prompt: int, ends: Collection[int] = (), together: int = 1
    ) -> None:
        self.model, self.layers, self.prompt, self.ends, self.together = model, layers, prompt, ends, together
        self.kept: OrderedDict[bytes, tuple[Reference, Stats]] = OrderedDict()

    def untouched(self, tokens: Tensor) -> Stats:
        """What the untouched model loads for one group."""
        return self._untouched([tokens])[0][1]

    def nothing(self, tokens: Tensor) -> Losses:
        """What is lost on one group where nothing is skipped."""
        reference = self._untouched([tokens])[0][0]
        return reference.losses_of(torch.zeros(*reference.targets.shape, len(METRICS)))

    @torch.no_grad()
    def losses(self, runs: Iterable[Run]) -> Iterator[tuple[Losses, Stats]]:
        """Losses as `Reference.losses` gives them, and what skipping did, of each run in turn.

        Runs are drawn, and measured, as their results are asked for: as many at a time as make a full pass.

        Args:
            runs: their policies are bound already.
        """
        for stack in stacks(runs):
            references = [reference for reference, _ in self._untouched([run.tokens for run in stack])]
            found = stacked_logits(self.model, self.layers, stack, self.prompt, self.together)
            for reference, (logits, stats) in zip(references, found, strict=True):
                yield reference.losses(logits[:, :-1]), stats

    def compare(
        self,
        groups: Sequence[tuple[Tensor, list[str]]],
        policies: Sequence[Policy],
        progress: Callable[[Iterable[int]], Iterable[int]] = lambda steps: steps,
    ) -> list["Comparison"]:
        """Measure all policies on the same groups.

        Args:
            groups: token rows `(sequences, positions)` and the source of each sequence.
        """
        for policy in policies:
            policy.bind(self.layers)
        found: list[list[tuple[Losses, Stats]]] = [[] for _ in policies]

        def measured() -> Iterator[int]:
            # Groups of one pass with all policies, then those of the next: their predictions are not made twice.
            for part in stacks(Run(tokens, None) for tokens, _ in groups):
                runs = [Run(run.tokens, policy) for policy in policies for run in part]
                for place, result in enumerate(self.losses(runs)):
                    found[place // len(part)].append(result)
                yield from range(len(part))

        for _ in progress(measured()):
            pass
        sources = [names for _, names in groups]
        return [
            comparison(p, [own for own, _ in rows], [s for _, s in rows], sources)
            for p, rows in zip(policies, found, strict=True)
        ]

    @torch.no_grad()
    def _untouched(self, groups: list[Tensor]) -> list[tuple[Reference, Stats]]:
        """Predictions and statistics of each group, from what is kept or made now; groups are no more than a pass."""
        wanted = {key(tokens): tokens for tokens in groups}
        if missing := {name: tokens for name, tokens in wanted.items() if name not in self.kept}:
            runs = [Run(tokens, None) for tokens in missing.values()]
            made = stacked_logits(self.model, self.layers, runs, self.prompt, self.together)
            for (name, tokens), (logits, stats) in zip(missing.items(), made, strict=True):
                scored = scored_positions(tokens, self.prompt, self.ends)
                self.kept[name] = Reference(logits[:, :-1], tokens[:, self.prompt + 1 :], scored), stats
        for name in wanted:
            self.kept.move_to_end(name)
        most = KEPT_BYTES * factor(groups[0].device)
        while len(self.kept) > len(wanted) and sum(reference.bytes for reference, _ in self.kept.values()) > most:
            self.kept.popitem(last=False)
        return [self.kept[key(tokens)] for tokens in groups]


def key(tokens: Tensor) -> bytes:
    """What tells a group from others."""
    return repr(tuple(tokens.shape)).encode() + tokens.cpu().numpy().tobytes()


def factor(device: torch.device) -> int:
    """How many times what a CPU takes at a time a device does."""
    return 1 if device.type == "cpu" else GPU_FACTOR


def stacks(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Runs that share a pass: sequences of one length, TOKENS_AT_A_TIME tokens (more on a GPU) or a single run."""
    stack: list[Run] = []
    for run in runs:
        if stack and stack[0].tokens.shape[1] != run.tokens.shape[1]:
            yield stack
            stack = []
        stack.append(run)
        most = TOKENS_AT_A_TIME * factor(run.tokens.device)
        if sum(other.tokens.numel() for other in stack) + run.tokens.numel() > most:
            yield stack
            stack = []
    if stack:
        yield stack


def compare(
    model: nn.Module,
    layers: list[MoeLayer],
    groups: Sequence[tuple[Tensor, list[str]]],
    policies: Sequence[Policy],
    prompt: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda steps: steps,
    ends: Collection[int] = (),
) -> list[Comparison]:
    """Measure policies on the same groups, as `Simulation.compare`; nothing is kept.

    Args:
        ends: see `scored_positions`.
    """
    return Simulation(model, layers, prompt, ends).compare(groups, policies, progress)
