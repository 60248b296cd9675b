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
from ..traces.corpus import BUILT_IN, Bos
from ..traces.documents import Split
from ..traces.groups import Batches, Group, Unit, check_groups, enough_units, group_units, read_units, used_rows
from ..traces.sampling import Sampling, continue_rows
from .runtime import Skipping

Mode = Literal["generate", "skipping", "teacher"]
# Sequences that an untouched model continues at a time; they do not depend on each other.
ROWS_AT_A_TIME = 128


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The options of every command that measures losses: the model, and the text that it is measured on."""

    model: str | None = None
    """folder or Hub id; by default the model that the selector names"""
    corpus: str = BUILT_IN
    """text to measure on; must not be text that the selector was fitted on"""
    mix: dict[str, float] | None = None
    """share of each source, such as code=0.4 math=0.6; by default equal ones"""
    mode: Mode = "generate"
    """text to measure on: generate, what the model writes after prompts from the corpus; skipping, what it writes while
    it skips; teacher, the text of the corpus itself"""
    temperature: float = 1.0
    """temperature of the sampling, as it is served; 0 is greedy"""
    top_p: float = 1.0
    """share of the probability that is sampled from, as it is served"""
    ignore_eos: bool = False
    """score what follows an end-of-text token, too"""
    length: int = 128
    """tokens of a sequence"""
    prompt: int = 32
    """tokens at the start of a sequence that stand for the prompt and are not scored"""
    bos: Bos = "auto"
    """begin every sequence with the BOS token: auto as the tokenizer begins a text, yes, or no"""
    device: str = "auto"
    """where the model runs: cpu, cuda, cuda:1, …; auto takes a GPU where there is one"""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: what the checkpoint holds, but float32 on a CPU without native bfloat16"""
    seed: int = 0
    """seed of the documents and the sampling"""

    def served(self, *splits: Split) -> "ServedText":
        """The text of these parts of the corpus.

        Raises:
            OptionError: it cannot be sampled so, or `prompt` leaves nothing of `length`.
        """
        if not 0 < self.prompt < self.length - 1:
            raise OptionError(f"--prompt {self.prompt} is not usable: expected 1 to --length - 2 ({self.length - 2})")
        return ServedText(self, splits, Sampling(self.temperature, self.top_p))


@dataclass(frozen=True)
class ServedText:
    """What text is measured on, of one command.

    Attributes:
        splits: parts of the corpus that prompts, or the text itself, come from.
        sampling: of the continuations.
    """

    options: TextOptions
    splits: tuple[Split, ...]
    sampling: Sampling

    @property
    def stored(self) -> int:
        """Tokens of a sequence that come from the corpus."""
        return self.options.length if self.options.mode == "teacher" else self.options.prompt

    @property
    def name(self) -> str:
        return f"corpus {self.options.corpus!r} ({', '.join(self.splits)} split)"

    def ends(self, loaded: LoadedModel) -> tuple[int, ...]:
        """Tokens after which a sequence is not scored."""
        if self.options.mode == "teacher" or self.options.ignore_eos:
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
        if isinstance(most, int) and self.options.length > most:
            raise OptionError(
                f"--length {self.options.length} is not usable: the model has {most} positions; expected at most that"
            )
        if self.options.mode != "teacher" and not getattr(model, "can_generate", lambda: False)():
            raise OptionError(
                f"--mode {self.options.mode} is not usable: this model generates no text; take --mode teacher"
            )

    def units(
        self,
        loaded: LoadedModel,
        cells: Sequence[tuple[int, int]],
        only: Iterable[str] | None = None,
        batches: Batches = "mixed",
    ) -> list[Unit]:
        """Documents' sequences for cells of (size, groups), or all there are; continued by the untouched model.

        What no group of these cells holds is left at its prompt.
        """
        self.check(loaded.model)
        block = max(size for size, _ in cells) if batches == "single" else 1
        text, seed = (self.options.corpus, loaded.tokenizer, self.splits, self.stored), self.options.seed
        units = enough_units(
            lambda count: read_units(*text, count, seed, self.options.mix, self.options.bos, only, block),
            cells,
            batches,
        )
        if self.options.mode == "teacher" or not units:
            return units
        units = [Unit(list(unit.rows), unit.source) for unit in units]
        used = used_rows(units, cells, batches)
        continued = self._continue(loaded, [units[unit].rows[row] for unit, row in used])
        for (unit, row), tokens in zip(used, continued, strict=True):
            units[unit].rows[row] = tokens
        return units

    def _continue(self, loaded: LoadedModel, prompts: list[list[int]]) -> list[list[int]]:
        rows: list[list[int]] = []
        starts = range(0, len(prompts), ROWS_AT_A_TIME)
        with experts_by_distinct(find_moe_layers(loaded.model)):
            for start in track(starts, "text of the untouched model", len(starts), unit="batches"):
                part = torch.tensor(prompts[start : start + ROWS_AT_A_TIME]).to(loaded.input_device)
                seed = self.options.seed * 1_000_003 + start
                rows += continue_rows(loaded.model, part, self.options.length, self.sampling, seed).tolist()
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
            seed = self.options.seed * 1_000_003 + number
            with Skipping(loaded.model, policy):
                rows = continue_rows(
                    loaded.model, tokens[:, : self.options.prompt], self.options.length, self.sampling, seed
                )
            found.append((rows, names))
        return found

    def describe(self, loaded: LoadedModel) -> dict[str, Any]:
        """What a budget on this text is certified for, as config.json keeps it."""
        sampled = self.options.mode != "teacher"
        return {
            "corpus": self.options.corpus,
            "split": list(self.splits),
            "mode": self.options.mode,
            "temperature": self.sampling.temperature if sampled else None,
            "top_p": self.sampling.top_p if sampled else None,
            "ignore_eos": self.options.ignore_eos if sampled else None,
            "prompt": self.options.prompt,
            "length": self.options.length,
            "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
            "device": loaded.input_device.type,
        }
