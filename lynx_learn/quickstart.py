"""`lynx-learn quickstart`: the whole flow on the reference MoE and text that every Python carries."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .decode.runtime import skip_experts
from .decode.served import Mode
from .decode.timing import paired_ratio, take_turns
from .errors import OptionError
from .files import check_empty, write_json
from .fit.train import TrainOptions, train
from .measure.calibrate import CalibrateOptions, calibrate
from .measure.evaluate import EvaluateOptions, evaluate
from .moe.loading import REFERENCE, LoadedModel, generate_plainly, load_model
from .selector.saving import read_metrics
from .selector.selector import LynxSelector
from .show.tables import Table, calibration_lines, matched_table, show, training_table
from .traces import corpus as corpora
from .traces.collect import CollectOptions, collect
from .traces.groups import decode_groups

BATCH = 16
# Of the sequences, in tokens.
LENGTH = 128
# Fewer than `train` takes by default, for the sake of time.
TUNE_STEPS = 16
EPOCHS = 6
PROMPT = "def read_lines(path):\n"


@dataclass(frozen=True)
class QuickstartOptions:
    """The whole flow on a small trained MoE: collect, train, calibrate, evaluate, and a timing."""

    out: str = "lynx-quickstart"
    """folder for the trace, the selector and the report; must be new or empty"""
    model: str = REFERENCE
    """folder or Hub id; by default the reference MoE in this package"""
    corpus: str = corpora.BUILT_IN
    """text; fitted, calibrated and tested on disjoint documents of it"""
    tokens: int = 48_000
    """number of tokens to collect"""
    test_tokens: int = 10_000
    """decode tokens that the test scores for each point, at least"""
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
    device, dtype = options.device, options.dtype
    trace, selector_folder = str(out / "trace"), str(out / "selector")
    show(f"1/5 collect router traces of {options.model} on {options.corpus}")
    loaded = load_model(options.model, device, dtype)
    traced = collect(
        CollectOptions(options.model, trace, options.corpus, tokens=options.tokens, device=device, dtype=dtype), loaded
    )
    show("2/5 train surrogates and scorers")
    train(
        TrainOptions(
            trace,
            selector_folder,
            reference=False,  # a column of the table, for a tenth of the training's time
            epochs=EPOCHS,
            batch=2 * TrainOptions.batch,
            tune_steps=TUNE_STEPS,
            tune_batch_sizes=[BATCH],
            device=device,
            dtype=dtype,
        ),
        loaded,
        traced,
    )
    show(training_table(read_metrics(selector_folder)["train"]["layers"]))
    show("3/5 calibrate thresholds on other documents")
    budgets = sorted({options.budget, 3 * options.budget})
    selector = calibrate(
        CalibrateOptions(
            selector_folder,
            corpus=options.corpus,
            budgets=budgets,
            batch_sizes=[BATCH],
            groups=16,
            mode=options.mode,
            length=LENGTH,
            device=device,
            dtype=dtype,
        ),
        loaded,
    )
    show(*calibration_lines(read_metrics(selector_folder)["calibrate"]))
    show("4/5 evaluate on documents used for nothing else")
    report = evaluate(
        EvaluateOptions(
            selector_folder,
            str(out / "report"),
            corpus=options.corpus,
            methods=["xshare", "learned"],
            batch_sizes=[BATCH],
            tokens=options.test_tokens,
            levels=budgets,
            mode=options.mode,
            length=LENGTH,
            card=True,
            device=device,
            dtype=dtype,
        ),
        loaded,
    )
    show(matched_table(report))
    show("5/5 time decode steps, skipping on and off in turns")
    times = _time(loaded, selector, options)
    summary = {
        "points": [
            p for p in report["points"] if p["method"] == "untouched" or p["setting"] == f"budget={options.budget:g}"
        ],
        "decode_step": times,
    }
    show(_closing_table(report, times, options), *_continue(loaded, selector, options))
    write_json(out / "quickstart.json", summary)
    return summary


def _time(loaded: LoadedModel, selector: LynxSelector, options: QuickstartOptions) -> dict[str, float]:
    rows, _ = decode_groups(options.corpus, loaded.tokenizer, "test", BATCH, 160, 1, 3, fewest=1)[0]
    steps = take_turns(
        loaded.model, {"off": None, "on": selector.policy(options.budget)}, rows.to(loaded.input_device), prompt=64
    )
    off, on = steps["off"], steps["on"]
    return {"off_ms": off.median, "on_ms": on.median, "ratio": paired_ratio(off, on), "steps": len(off.ms)}


def _closing_table(report: dict[str, Any], times: dict[str, float], options: QuickstartOptions) -> Table:
    rows = []
    for p in report["points"]:
        if p["method"] == "untouched":
            rows.append(["untouched", f"{p['experts']:.1f}", "100%", "", "", f"{times['off_ms']:.1f} ms"])
        elif p["setting"].startswith("budget="):
            budget = p["setting"].removeprefix("budget=")
            step = f"{times['on_ms']:.1f} ms ({times['ratio']:.2f}×)" if budget == f"{options.budget:g}" else ""
            rows.append(
                [
                    f"learned, budget {budget}",
                    f"{p['experts']:.1f}",
                    f"{p['bytes']:.0%}",
                    f"{p['kl']:.4f} ± {p['kl_margin']:.4f}",
                    f"{p['nll']:+.4f}",
                    step,
                ]
            )
    head = [
        "batch of 16, test text",
        "experts per layer",
        "bytes",
        "KL, nats (95%)",
        "ΔNLL, nats",
        "decode step, 1 thread",
    ]
    return Table("Distinct experts, bytes, loss and time", head, rows)


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
