"""`lynx-learn quickstart`: the whole flow on the reference MoE and text that every Python carries."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .decode.runtime import skip_experts
from .decode.served import Mode
from .decode.timing import paired_ratio, take_turns, take_turns_generating, with_threads
from .errors import OptionError
from .files import check_empty, write_json
from .fit.train import TrainOptions, train
from .measure.calibrate import CalibrateOptions, calibrate
from .measure.evaluate import EvaluateOptions, evaluate
from .moe.loading import REFERENCE, REFERENCE_50M, LoadedModel, generate_plainly, in_repository, load_model
from .selector.saving import read_metrics
from .selector.selector import LynxSelector
from .show.quality import calibration_lines, matched_table, training_table
from .show.tables import Table, show
from .traces import corpus as corpora
from .traces.collect import CollectOptions, collect
from .traces.groups import decode_groups

BATCH = 16
# Of the sequences, in tokens.
LENGTH = 128
# Less than the commands take by default, for the sake of time.
TUNE_STEPS = 16
EPOCHS = 6
SENSITIVITY_GROUPS = 2
# Of `calibrate`, the fewest that it takes.
GROUPS = 12
PROMPT = "def read_lines(path):\n"
# Of the larger model where its selector is not calibrated for the budget that was asked for.
LARGER_BUDGET = 0.01
# Tokens of prefill, decode steps, and new tokens of a call of generate that are timed.
PREFILL, STEPS, NEW_TOKENS = 64, 64, 32


@dataclass(frozen=True)
class QuickstartOptions:
    """The whole flow on a small trained MoE: collect, train, calibrate, evaluate, and a timing."""

    out: str = "lynx-quickstart"
    """folder for the trace, the selector and the report; must be new or empty"""
    model: str = REFERENCE
    """folder or Hub id; by default the reference MoE in this package"""
    corpus: str = corpora.BUILT_IN
    """text; fitted, calibrated and tested on disjoint documents of it"""
    tokens: int = 40_000
    """number of tokens to collect"""
    test_tokens: int = 8_000
    """decode tokens that the test scores for each point, at least"""
    larger: bool = True
    """also decode with reference-moe-50m and its selector, where a clone of the repository is at hand"""
    budget: float = 0.01
    """nats of KL per token for the closing table"""
    mode: Mode = "generate"
    """text to calibrate and test on, as in calibrate"""
    device: str = "auto"
    """where the model runs: cpu, cuda, cuda:1, …; auto takes a GPU where there is one"""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: what the checkpoint holds, but float32 on a CPU without native bfloat16"""

    def __post_init__(self) -> None:
        if not (self.budget > 0 and math.isfinite(self.budget)):
            raise OptionError(f"--budget {self.budget:g} is not usable: expected a number above 0")
        for name in ("tokens", "test_tokens"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)} is not usable: expected 1 or more")


def quickstart(options: QuickstartOptions) -> dict[str, Any]:
    """Run collect, train, calibrate, evaluate and a paired timing; prints and returns the closing figures."""
    out = Path(options.out)
    check_empty(out)
    corpora.check_corpus(options.corpus)
    device, dtype = options.device, options.dtype
    trace, selector_folder = str(out / "trace"), str(out / "selector")
    show(f"1/6 collect router traces of {options.model} on {options.corpus}")
    loaded = load_model(options.model, device, dtype)
    traced = collect(
        CollectOptions(
            options.model,
            trace,
            options.corpus,
            tokens=options.tokens,
            device=device,
            dtype=dtype,
            world_size=1,  # here and below: one process, whatever a launcher's variables say
        ),
        loaded,
    )
    show("2/6 train surrogates and scorers")
    train(
        TrainOptions(
            trace,
            selector_folder,
            reference=False,  # a column of the table, for a tenth of the training's time
            epochs=EPOCHS,
            batch=2 * TrainOptions.batch,
            sensitivity_groups=SENSITIVITY_GROUPS,
            tune_steps=TUNE_STEPS,
            tune_batch_sizes=[BATCH],
            device=device,
            dtype=dtype,
            world_size=1,
        ),
        loaded,
        traced,
    )
    show(training_table(read_metrics(selector_folder)["train"]["layers"]))
    show("3/6 calibrate thresholds on other documents")
    budgets = sorted({options.budget, 3 * options.budget})
    selector = calibrate(
        CalibrateOptions(
            selector_folder,
            corpus=options.corpus,
            budgets=budgets,
            batch_sizes=[BATCH],
            groups=GROUPS,
            mode=options.mode,
            length=LENGTH,
            device=device,
            dtype=dtype,
            world_size=1,
        ),
        loaded,
    )
    show(*calibration_lines(read_metrics(selector_folder)["calibrate"]))
    show("4/6 evaluate on documents used for nothing else")
    report = _evaluate(options, loaded, selector_folder, out / "report", ["xshare", "learned"], card=True)
    show(matched_table(report))
    show("5/6 time decode steps and whole calls of generate, skipping on and off in turns")
    small = Part(options.model, report, options.budget, _time(loaded, selector, options.budget, options))
    lines, parts = _continue(loaded, selector, options), [small]
    show("6/6 decode with the larger trained model that lies in the repository, and with its selector")
    if (why_not := _no_larger(options)) is None:
        parts.append(_larger(options, out))
    else:
        show(why_not)
    summary = {part.model: part.figures for part in parts}
    show(closing_table(parts), *notes(parts), *lines)
    write_json(out / "quickstart.json", summary)
    return summary


@dataclass(frozen=True)
class Part:
    """What the closing table says of one model: the test's report, and times at the budget."""

    model: str
    report: dict[str, Any]
    budget: float
    times: dict[str, Any]

    @property
    def figures(self) -> dict[str, Any]:
        """For `quickstart.json`: the untouched point and that of the budget, and the times."""
        untouched = [p for p in self.report["points"] if p["method"] == "untouched"]
        own = [p for p in self.report["points"] if p["setting"] == f"budget={self.budget:g}"]
        return {"points": untouched + own, **self.times}


def _evaluate(
    options: QuickstartOptions, loaded: LoadedModel, selector: str, out: Path, methods: list[str], card: bool
) -> dict[str, Any]:
    budgets = sorted({options.budget, 3 * options.budget})
    return evaluate(
        EvaluateOptions(
            selector,
            str(out),
            corpus=options.corpus,
            methods=methods,
            batch_sizes=[BATCH],
            tokens=options.test_tokens,
            levels=budgets,
            mode=options.mode,
            length=LENGTH,
            card=card,
            device=options.device,
            dtype=options.dtype,
            world_size=1,
        ),
        loaded,
    )


def _no_larger(options: QuickstartOptions) -> str | None:
    """Why the larger model is left out, or None."""
    if not options.larger:
        return "left out: --larger false"
    if not (in_repository(f"data/{REFERENCE_50M}") and in_repository(f"selectors/{REFERENCE_50M}")):
        return "left out: it is in lynx-learn's repository and not in the package; run quickstart in a clone to see it"
    return None


def _larger(options: QuickstartOptions, out: Path) -> Part:
    folder = str(in_repository(f"selectors/{REFERENCE_50M}"))
    selector = LynxSelector.from_pretrained(folder)
    calibrated = map(float, selector.config.thresholds.get("kl", {}))
    budget = options.budget if options.budget in calibrated else LARGER_BUDGET
    loaded = load_model(REFERENCE_50M, options.device, options.dtype)
    report = _evaluate(options, loaded, folder, out / "report-50m", [], card=False)
    return Part(REFERENCE_50M, report, budget, _time(loaded, selector, budget, options))


def _time(
    loaded: LoadedModel, selector: LynxSelector, budget: float, options: QuickstartOptions
) -> dict[str, dict[str, float]]:
    rows, _ = decode_groups(options.corpus, loaded.tokenizer, "test", BATCH, PREFILL + STEPS, 1, 3, fewest=1)[0]
    rows, policy = rows.to(loaded.input_device), selector.policy(budget)
    steps = take_turns(loaded.model, {"off": None, "on": policy}, rows, PREFILL)
    off, on = steps["off"], steps["on"]
    step = {"off_ms": off.median, "on_ms": on.median, "ratio": paired_ratio(off, on), "steps": len(off.ms)}
    with with_threads(1):
        generate = take_turns_generating(loaded.model, policy, rows[:, :PREFILL], NEW_TOKENS)
    return {"decode_step": step, "generate": generate}


def closing_table(parts: list[Part]) -> Table:
    """Experts, bytes, loss and time of every model, untouched and skipping."""
    rows = []
    for part in parts:
        step, generate = part.times["decode_step"], part.times["generate"]
        for p in part.report["points"]:
            if p["method"] == "untouched":
                times = [f"{step['off_ms']:.1f}", f"{generate['tokens_per_s_off']:.0f}"]
                rows.append([f"{part.model}, untouched", f"{p['experts']:.1f}", "100%", "", "", *times])
            elif p["setting"].startswith("budget="):
                budget = p["setting"].removeprefix("budget=")
                times = [
                    f"{step['on_ms']:.1f} ({step['ratio']:.2f}×)",
                    f"{generate['tokens_per_s_on']:.0f} ({generate['ratio']:.2f}×)",
                ]
                row = [f"{p['experts']:.1f}", f"{p['bytes']:.0%}", f"{p['kl']:z.4f} ± {p['kl_margin']:.4f}"]
                timed = times if budget == f"{part.budget:g}" else ["", ""]
                rows.append([f"budget {budget}", *row, f"{p['nll']:+z.4f}", *timed])
    head = [
        f"batch of {BATCH}, test text",
        "experts per layer",
        "bytes",
        "KL, nats (95%)",
        "ΔNLL, nats",
        "decode step, ms",
        "generate, tokens/s",
    ]
    return Table("Distinct experts, bytes, loss and time (1 thread)", head, rows)


def notes(parts: list[Part]) -> list[str]:
    """Why a model is not faster, for each that is not."""
    return [
        f"{part.model} is not faster with fewer experts where they all fit in the processor's cache: reading them costs "
        "next to nothing there, and deciding takes time."
        for part in parts
        if part.times["decode_step"]["ratio"] < 1
    ]


@torch.no_grad()
def _continue(loaded: LoadedModel, selector: LynxSelector, options: QuickstartOptions) -> list[str]:
    """One prompt in a batch of 16 continued greedily with and without skipping."""
    rows, _ = decode_groups(options.corpus, loaded.tokenizer, "test", BATCH - 1, 48, 1, 4, fewest=1)[0]
    texts = [PROMPT, *loaded.tokenizer.batch_decode(rows, skip_special_tokens=True)]
    loaded.tokenizer.padding_side = "left"
    batch = loaded.tokenizer(texts, return_tensors="pt", padding=True).to(loaded.input_device)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    length = batch["input_ids"].shape[1]

    def run() -> str:
        ids = generate_plainly(loaded.model, **batch, max_new_tokens=32, do_sample=False)
        return str(loaded.tokenizer.decode(ids[0, length:], skip_special_tokens=True))

    plain = run()
    with skip_experts(loaded.model, selector, options.budget) as skipping:
        skipped = run()
    return [f"prompt:    {PROMPT!r}", f"untouched: {plain!r}", f"skipping:  {skipped!r}", str(skipping.stats)]
