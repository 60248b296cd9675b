"""`lynx-learn plan`: what each command takes on a model, from its configuration alone.

Sizes on disk are exact. Memory is what is held at the worst moment, without what libraries take for themselves; floating
point operations count products of matrices.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .checkpoint.blocks import without_weights
from .decode.real import COPIED_BYTES
from .errors import ModelError, OptionError
from .fit.layer import BYTES_OF_A_NUMBER, CHECK, FEW_TOKENS, MOST_TOKENS, ROWS_BYTES
from .fit.low_rank import MORE, NARROW, PENALTIES
from .fit.low_rank import ROWS_AT_A_TIME as ROWS_IN_DOUBLE
from .fit.train import TrainOptions
from .measure.calibrate import CalibrateOptions
from .moe.families import check_structure, moe_blocks
from .moe.loading import DTYPES, model_path
from .rules.oracle import ROWS_AT_A_TIME
from .selector.features import NAMES
from .selector.surrogates import MOST_RANKS, rank_for
from .show.tables import Table, show
from .traces.format import bytes_per_token
from .traces.packing import HiddenDtype, hidden_bytes
from .traces.target import fewest_tokens

# By which names configurations say how many experts a token goes to.
TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
# Operations of a full decomposition, in cubes of its side.
DECOMPOSITION = 9
# The same of one that gives some of the vectors only.
SOME_VECTORS = 4
# The same of outputs' products, in terms of what inputs' decomposition gives.
TURNED = 4
# Steps of subspace iteration that a fit takes, about: the first penalty more, the later ones fewer.
STEPS = 6
# Passes over the calibration text: sampled, predicted untouched, and at the thresholds that are tested.
PASSES = 2 + 12
# Tokens of a pass of the model that is measured, at least.
PASS_TOKENS = 2048
# Tokens of a layer's busiest expert over the mean: 1.3 to 1.8 in the reference MoEs (their `training.json`), more with random routers.
HEAVIEST = 2.0


@dataclass(frozen=True)
class PlanOptions:
    """Show what each command takes on a model: disk, memory, operations, hours, and how many processes can share it."""

    model: str
    """folder, Hub id or file of a configuration, or reference-moe; no weights are read"""
    tokens: int | None = None
    """number of tokens to collect; by default 100000, or what --tokens_per_expert needs, whose limit it is otherwise"""
    tokens_per_expert: int = 0
    """tokens that every expert shall have, counted as if all were as busy as the rarest: routing that is uneven needs more"""
    length: int = 256
    """tokens of a collected sequence"""
    batch_size: int = 16
    """collected sequences that run together and are stored in one shard"""
    dtype: str = "auto"
    """type of the weights while commands run; auto is the stored one, as on a GPU"""
    hidden_dtype: HiddenDtype = "auto"
    """what collect stores hidden states in"""
    surrogate_share: float = TrainOptions.surrogate_share
    """size of the surrogates, as in train"""
    memory: float = 80.0
    """memory of a process's device, in GB"""
    rate: float = 1e14
    """floating point operations a second that a process really does, such as 1e14 for a GPU, 5e10 for two CPU cores"""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("tokens_per_expert", 0), ("length", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"--{name} {value} is not usable: expected {least} or more")
        if self.dtype not in DTYPES:
            raise OptionError(f"--dtype {self.dtype!r} is not usable: expected one of {', '.join(DTYPES)}")
        for name in ("memory", "rate"):
            if not getattr(self, name) > 0:
                raise OptionError(f"--{name} {getattr(self, name):g} is not usable: expected a number above 0")
        if not 0 <= self.surrogate_share < 1:
            raise OptionError(f"--surrogate_share {self.surrogate_share:g} is not usable: expected 0 or more, below 1")

    def collected(self, shape: "Shape") -> int:
        """Tokens that are collected, at least."""
        return fewest_tokens(self.tokens, self.tokens_per_expert, shape.experts, shape.top_k)


class Shape(NamedTuple):
    """What the cost of every command depends on."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    expert_numbers: int
    """Numbers of one expert's weights."""
    rest: int
    """Numbers of all weights that are no routed expert's."""
    vocabulary: int
    itemsize: int

    @property
    def bytes(self) -> int:
        """Of the whole model."""
        return (self.layers * self.experts * self.expert_numbers + self.rest) * self.itemsize

    @property
    def active(self) -> int:
        """Numbers that one token's pass multiplies with."""
        return self.rest + self.layers * self.top_k * self.expert_numbers

    @property
    def twin(self) -> int:
        """Bytes of the copy in another precision that `calibrate` takes the noise floor with, where it is small enough."""
        size = self.bytes // self.itemsize * (2 if self.itemsize == 4 else 4)
        return size if size <= COPIED_BYTES else 0

    def rank(self, share: float) -> int:
        return rank_for(share, self.expert_numbers, self.hidden)

    def selector(self, share: float) -> int:
        """Numbers of a selector's surrogates."""
        rank = self.rank(share)
        return self.layers * self.experts * (2 * rank + 1) * self.hidden if rank else 0


class Cost(NamedTuple):
    """What one command takes."""

    command: str
    disk: float
    """Bytes that are written and stay."""
    memory: float
    """Bytes in one process."""
    operations: float
    """Of all processes together."""
    processes: int
    """That can share it."""


def plan(options: PlanOptions) -> list[Cost]:
    """Print, and return, what each command takes."""
    shape = read_shape(options.model, options.dtype)
    found = costs(shape, options)
    rows = [
        [
            cost.command,
            size(cost.disk),
            size(cost.memory) + ("" if cost.memory <= options.memory * 1e9 else " !"),
            f"{cost.operations:.1e}",
            f"{cost.operations / options.rate / 3600:.2g}",
            f"{cost.processes}",
        ]
        for cost in found
    ]
    head = ["command", "disk", "memory", "FLOP", "hours", "most processes"]
    show(
        Table(f"{options.model}: {options.collected(shape):,} tokens at {options.rate:.0e} FLOP/s", head, rows),
        f"{shape.layers} MoE layers of {shape.experts} experts, {shape.top_k} for each token, width {shape.hidden}; "
        f"{size(shape.bytes)} of weights, surrogates of mean rank {shape.rank(options.surrogate_share)}",
        f"hours are those of one process; ! is more than --memory {options.memory:g} GB: such a model is spread over devices",
    )
    return found


def read_shape(name: str, dtype: str = "auto") -> Shape:
    """The shape of a model, from its configuration.

    Args:
        dtype: of its weights, one of DTYPES; `auto` is the stored one.

    Raises:
        ModelError: there is none that can be read, or it has no MoE layers of a known shape.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_path(name), trust_remote_code=False)
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
        if hasattr(config, "quantization_config"):  # which says how weights are stored, not how many there are
            del config.quantization_config
        model = without_weights(config, stored)
    except Exception as error:  # transformers and the hub raise many kinds; to the user they are one
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{name!r} gives no configuration of a causal language model ({reason}): give a folder, a Hub id or a config.json"
        ) from error
    check_structure(model)
    text = config.get_text_config()
    top_k = next((value for key in TOP_K if isinstance(value := getattr(text, key, None), int)), None)
    blocks = list(moe_blocks(model))
    _, block, experts = blocks[0]
    router = getattr(block, "gate", None) or getattr(block, "router", None)
    weight = next((p for p in router.parameters() if p.ndim == 2), None) if router is not None else None
    stacked = [p for p in experts.parameters() if p.ndim == 3]
    if top_k is None or weight is None or not stacked:
        raise ModelError(
            f"{name!r} does not say how many experts a token goes to, or keeps its experts in an unknown way"
        )
    count = min(p.shape[0] for p in stacked)
    routed = sum(p.numel() for _, _, experts in blocks for p in experts.parameters())
    return Shape(
        layers=len(blocks),
        experts=count,
        top_k=top_k,
        hidden=weight.shape[1],
        expert_numbers=routed // (len(blocks) * count),
        rest=sum(p.numel() for p in model.parameters()) - routed,
        vocabulary=text.vocab_size,
        itemsize=(stored if dtype == "auto" else getattr(torch, dtype)).itemsize,
    )


def costs(shape: Shape, options: PlanOptions, calibrate: CalibrateOptions | None = None) -> list[Cost]:
    """What each command takes on a model of this shape; `calibrate` by default with its own options' defaults."""
    sequences = -(-options.collected(shape) // options.length)
    tokens, shards = sequences * options.length, -(-sequences // options.batch_size)
    hidden = hidden_bytes(shape.hidden, shape.itemsize, options.hidden_dtype)
    token = bytes_per_token(shape.layers, hidden, shape.experts, shape.top_k)
    selector = shape.selector(options.surrogate_share)
    together = options.batch_size * options.length
    shard = together * token
    calibrate = calibrate or CalibrateOptions("")
    sizes = calibrate.batch_sizes
    measured = sum(size * calibrate.length * calibrate.most_groups(size) for size in sizes)
    largest = max(PASS_TOKENS, max(sizes) * calibrate.length)
    # Of the untouched model and of a policy; in tuning also as logarithms of both, and a gradient.
    logits = largest * shape.vocabulary * 2 * shape.itemsize
    tuned = PASS_TOKENS * shape.vocabulary * (2 * shape.itemsize + 3 * 4)
    fitted = fit_cost(shape, options, tokens)
    return [
        Cost(
            "collect",
            tokens * token,
            shape.bytes + 2 * shard + in_a_pass(shape, together),
            2.0 * shape.active * tokens,
            shards,
        ),
        Cost("train, layer by layer", 4 * selector, *fitted, shape.layers),
        # Sensitivities and tuning: weights, gradients and two moments of what is tuned; forwards and a backward.
        Cost(
            "train, through the model",
            4 * selector,
            shape.bytes + 16 * selector + tuned + PASS_TOKENS * shape.layers * kept_for_gradients(shape, options),
            2.0 * shape.active * PASS_TOKENS * (shape.layers * 2 + 4 * TrainOptions.tune_steps),
            1,
        ),
        Cost(
            "calibrate",
            0,
            shape.bytes + (4 + shape.itemsize) * selector + max(shape.twin, logits + in_a_pass(shape, largest)),
            2.0 * shape.active * measured * PASSES,
            len(sizes),
        ),
    ]


def in_a_pass(shape: Shape, tokens: int) -> float:
    """Bytes of what so many tokens hold in one layer while they go through it: some vectors, and of each of their experts what
    enters and leaves, and four times its inner width (gate, up, activation, product)."""
    inner = shape.expert_numbers / shape.hidden / 3
    return tokens * (4 * shape.hidden + shape.top_k * (2 * shape.hidden + 4 * inner)) * shape.itemsize


def kept_for_gradients(shape: Shape, options: PlanOptions) -> float:
    """Bytes that tuning keeps of a token in a layer until it has gone back through it, where attention stores no scores: some
    more vectors of norms and attention, and of all surrogates the inner vectors, twice."""
    surrogates = 2 * shape.experts * shape.rank(options.surrogate_share)
    return in_a_pass(shape, 1) + (8 * shape.hidden + surrogates) * shape.itemsize


def fit_cost(shape: Shape, options: PlanOptions, tokens: int) -> tuple[float, float]:
    """Memory of the fit of one layer, and operations of that of all."""
    # Of an expert; it is fitted on those that are neither held out nor checked on.
    assigned = tokens * shape.top_k / shape.experts
    rows = assigned * CHECK / 10
    rank = shape.rank(options.surrogate_share)
    # The layer's surrogates, and one expert at a time, as it is stored and as it runs.
    held = (2 * shape.expert_numbers + shape.selector(options.surrogate_share) / shape.layers) * shape.itemsize
    inputs = (
        min(ROWS_BYTES / BYTES_OF_A_NUMBER, (CHECK + 1) / 10 * tokens * shape.top_k * shape.hidden) * shape.itemsize
    )
    # Of the expert with most tokens: outputs; and inputs or outputs in float32, and centred. Where tokens are no fewer than width,
    # both are held at once, and some in float64. Then the Gram matrix with what is made of it: of tokens, more.
    most = HEAVIEST * assigned
    by_tokens = rows < shape.hidden
    copies = most * (shape.itemsize + 2 * 4) if by_tokens else most * 6 * 4 + 2 * 8 * min(most, ROWS_IN_DOUBLE)
    solved = copies * shape.hidden + (8 if by_tokens else 4) * 8 * min(HEAVIEST * rows, shape.hidden) ** 2
    kept = min(tokens, MOST_TOKENS)
    scored = kept * (shape.hidden * shape.itemsize + shape.top_k * (4 * len(NAMES) + 12))
    # Of experts run on what is scored: inputs, outputs, and answers of up to three surrogates with their errors.
    run_on = (shape.itemsize + 7 * 4) * min(HEAVIEST * assigned, ROWS_AT_A_TIME) * shape.hidden
    memory = held + max(inputs + solved, scored + run_on)
    run = 2 * (tokens + kept) * shape.top_k * shape.expert_numbers
    solve = solving(shape, rows, rank)
    if assigned < FEW_TOKENS * shape.hidden:
        solve += 2 * solving(shape, rows / 2, rank, multiplied=by_tokens)
    return memory, shape.layers * (run + (shape.experts * solve if rank else 0))


def solving(shape: Shape, rows: float, rank: int, multiplied: bool = False) -> float:
    """Operations of the fit of one surrogate on so many tokens; `multiplied` where their inner products are there."""
    widths = len(PENALTIES) * (rank + MORE) + MOST_RANKS * rank + MORE
    if rows < shape.hidden:
        products = 0.0 if multiplied else 4 * rows**2 * shape.hidden
        decomposed = (DECOMPOSITION + TURNED + (len(PENALTIES) + 1) * SOME_VECTORS) * rows**3
        return products + decomposed + 4 * rows**2 * widths + 4 * rows * shape.hidden * MOST_RANKS * rank
    applied = 4 * shape.hidden**2
    solve = 4 * rows * shape.hidden**2 + (len(PENALTIES) + 1) * 4 / 3 * shape.hidden**3
    if shape.hidden > NARROW:
        return solve + STEPS * widths * applied
    return solve + (len(PENALTIES) + 1) * (shape.hidden * applied + DECOMPOSITION * shape.hidden**3)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
