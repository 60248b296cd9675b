"""The text that losses are measured on: what the model writes when it is served, or the text of a corpus itself."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..errors import OptionError
from ..moe.decision import Policy
from ..moe.experts import experts_by_distinct
from ..moe.families import find_moe_layers
from ..moe.loading import LoadedModel
from ..show.progress import track
from ..traces.corpus import Bos
from ..traces.documents import Split
from ..traces.groups import Batches, Group, Unit, check_groups, enough_units, group_units, read_units
from ..traces.sampling import Sampling, continue_rows
from .runtime import Skipping

Mode = Literal["generate", "skipping", "teacher"]
# Sequences that an untouched model continues at a time; they do not depend on each other.
ROWS_AT_A_TIME = 128


@dataclass(frozen=True)
class ServedText:
    """What text is measured on, of one command.

    Attributes:
        corpus, splits: where prompts, or the text itself, come from.
        mode: `generate`: continuations of prompts, sampled by the untouched model; `skipping`: sampled while it skips;
            `teacher`: the text of the corpus itself.
        length, prompt: tokens of a sequence, and how many of them stand for the prompt and are not scored.
        sampling: of the continuations.
        ignore_eos: whether what follows an end-of-text token is scored too.
        mix: share of the sequences by source; by default equal ones.
    """

    corpus: str
    splits: tuple[Split, ...]
    mode: Mode
    length: int
    prompt: int
    sampling: Sampling
    ignore_eos: bool
    mix: dict[str, float] | None
    bos: Bos
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.prompt < self.length - 1:
            raise OptionError(f"--prompt {self.prompt} is not usable: expected 1 to --length - 2 ({self.length - 2})")

    @property
    def stored(self) -> int:
        """Tokens of a sequence that come from the corpus."""
        return self.length if self.mode == "teacher" else self.prompt

    @property
    def name(self) -> str:
        return f"corpus {self.corpus!r} ({', '.join(self.splits)} split)"

    def ends(self, loaded: LoadedModel) -> tuple[int, ...]:
        """Tokens after which a sequence is not scored."""
        if self.mode == "teacher" or self.ignore_eos:
            return ()
        generation = getattr(loaded.model, "generation_config", None)
        own = getattr(generation, "eos_token_id", None)
        own = loaded.tokenizer.eos_token_id if own is None else own
        return tuple(own) if isinstance(own, list | tuple) else () if own is None else (own,)

    def check(self, model: nn.Module) -> None:
        """Refuse more positions than the model has, and continuations of one that cannot write any.

        Raises:
            OptionError: with what to take instead.
        """
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr,operator]
        if isinstance(most, int) and self.length > most:
            raise OptionError(
                f"--length {self.length} is not usable: the model has {most} positions; expected at most that"
            )
        if self.mode != "teacher" and not getattr(model, "can_generate", lambda: False)():
            raise OptionError(f"--mode {self.mode} is not usable: this model generates no text; take --mode teacher")

    def units(
        self,
        loaded: LoadedModel,
        cells: Sequence[tuple[int, int]],
        only: Iterable[str] | None = None,
        batches: Batches = "mixed",
    ) -> list[Unit]:
        """Documents' sequences in full, for cells of (size, groups) or all there are; continued by the untouched model."""
        self.check(loaded.model)
        block = max(size for size, _ in cells) if batches == "single" else 1
        text, seed = (self.corpus, loaded.tokenizer, self.splits, self.stored), self.seed
        units = enough_units(
            lambda count: read_units(*text, count, seed, self.mix, self.bos, only, block), cells, batches
        )
        if self.mode == "teacher" or not units:
            return units
        prompts = [row for unit in units for row in unit.rows]
        rows = iter(self._continue(loaded, prompts))
        return [Unit([next(rows) for _ in unit.rows], unit.source) for unit in units]

    def _continue(self, loaded: LoadedModel, prompts: list[list[int]]) -> list[list[int]]:
        rows: list[list[int]] = []
        starts = range(0, len(prompts), ROWS_AT_A_TIME)
        with experts_by_distinct(find_moe_layers(loaded.model)):
            for start in track(starts, "text of the untouched model", len(starts), unit="batches"):
                part = torch.tensor(prompts[start : start + ROWS_AT_A_TIME]).to(loaded.input_device)
                seed = self.seed * 1_000_003 + start
                rows += continue_rows(loaded.model, part, self.length, self.sampling, seed).tolist()
        return rows

    def groups(
        self,
        loaded: LoadedModel,
        units: list[Unit],
        size: int,
        most: int,
        fewest: int,
        batches: Batches = "mixed",
    ) -> list[Group]:
        """Groups of `size` sequences on the model's device.

        Raises:
            CorpusError: there are fewer than `fewest`.
        """
        groups = group_units(units, size, most, batches)
        check_groups(groups, units, fewest, size, self.name, self.stored, batches)
        return [(tokens.to(loaded.input_device), names) for tokens, names in groups]

    def while_skipping(self, loaded: LoadedModel, groups: list[Group], policy: Policy) -> list[Group]:
        """The same prompts, continued by each group together while the policy skips experts."""
        found = []
        for number, (tokens, names) in enumerate(groups):
            seed = self.seed * 1_000_003 + number
            with Skipping(loaded.model, policy):
                rows = continue_rows(loaded.model, tokens[:, : self.prompt], self.length, self.sampling, seed)
            found.append((rows, names))
        return found

    def describe(self, loaded: LoadedModel) -> dict[str, Any]:
        """What a budget on this text is certified for, as config.json keeps it."""
        sampled = self.mode != "teacher"
        return {
            "corpus": self.corpus,
            "split": list(self.splits),
            "mode": self.mode,
            "temperature": self.sampling.temperature if sampled else None,
            "top_p": self.sampling.top_p if sampled else None,
            "ignore_eos": self.ignore_eos if sampled else None,
            "prompt": self.prompt,
            "length": self.length,
            "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
            "device": loaded.input_device.type,
        }
