"""The command line: a dict of commands; every option is a field of the command's dataclass (see `options`).

Exit status: 0 done, 1 a fault of this package (with a traceback), 2 something for the user to put right, 130 interrupted.
"""

import dataclasses
import difflib
import io
import json
import os
import re
import sys
import time
import typing
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

from .errors import LynxError, Unfinished
from .options import parse


class Command(NamedTuple):
    """Where a command is, imported when it runs, and how it is shown."""

    module: str
    options: str
    function: str
    summary: str
    examples: tuple[str, ...]


COMMANDS = {
    "quickstart": Command(
        "quickstart",
        "QuickstartOptions",
        "quickstart",
        "the whole flow on a small trained MoE",
        ("lynx-learn quickstart", "lynx-learn quickstart --budget 0.03 --out my/quickstart"),
    ),
    "inspect": Command(
        "inspection",
        "InspectOptions",
        "inspect_model",
        "what a model is made of, and whether it is supported",
        ("lynx-learn inspect reference-moe", "lynx-learn inspect Qwen/Qwen3-30B-A3B"),
    ),
    "plan": Command(
        "plan",
        "PlanOptions",
        "plan",
        "what each command takes on a model, from its configuration",
        ("lynx-learn plan reference-moe --tokens 20000 --rate 5e10", "lynx-learn plan Qwen/Qwen3-30B-A3B"),
    ),
    "collect": Command(
        "traces.collect",
        "CollectOptions",
        "collect",
        "write router traces of a model over text",
        (
            "lynx-learn collect --model reference-moe --tokens 20000 --out my/trace",
            "lynx-learn collect --model my/model --corpus my/text --mode generate --out my/trace",
        ),
    ),
    "import-routes": Command(
        "integrations.vllm.routes",
        "ImportRoutesOptions",
        "import_routes",
        "make a trace of the experts that vLLM returns",
        ("lynx-learn import-routes --files my/routes.npz --model reference-moe --out my/routes",),
    ),
    "train": Command(
        "fit.train",
        "TrainOptions",
        "train",
        "fit a selector from a trace",
        (
            "lynx-learn train --trace my/trace --out my/selector",
            "lynx-learn train --trace my/trace --tune-batch-sizes 16 --tune-steps 40 --out my/selector",
        ),
    ),
    "calibrate": Command(
        "measure.calibrate",
        "CalibrateOptions",
        "calibrate",
        "find the thresholds for quality budgets",
        (
            "lynx-learn calibrate --selector my/selector --budgets 0.01 0.03 --batch-sizes 16",
            "lynx-learn calibrate --selector my/selector --metric agreement --budgets 0.05",
        ),
    ),
    "coverage": Command(
        "measure.coverage",
        "CoverageOptions",
        "coverage",
        "check the bound of calibrate on many random splits",
        ("lynx-learn coverage --selector my/selector --budgets 0.01 --batch-sizes 8 --out my/coverage",),
    ),
    "evaluate": Command(
        "measure.evaluate",
        "EvaluateOptions",
        "evaluate",
        "measure loss and savings on test text",
        ("lynx-learn evaluate --selector my/selector --methods xshare gate_sq learned --tokens 6000 --out my/report",),
    ),
    "bench": Command(
        "decode.bench",
        "BenchOptions",
        "bench",
        "time decode steps with skipping on and off in turns",
        (
            "lynx-learn bench --model reference-moe --selector selectors/reference-moe --budget 0.01 --out my/bench",
            "lynx-learn bench --shape qwen3-half --layers 4 --fraction 0.51 --batch-sizes 4 16 64 --out my/bench",
        ),
    ),
    "bench --url": Command(
        "integrations.client",
        "ServerOptions",
        "bench_server",
        "time a vLLM server with skipping on and off in turns",
        ("lynx-learn bench --url http://127.0.0.1:8000 --prompts 64 --concurrency 16",),
    ),
    "bench --offload": Command(
        "offload.timing.bench",
        "OffloadBenchOptions",
        "bench_offload",
        "time decode with experts on disk",
        (
            "lynx-learn bench --offload --model reference-moe --selector selectors/reference-moe --out my/offload",
            "lynx-learn bench --offload --model my/model --predictors my/predictors --shares 0.25 --out my/offload",
        ),
    ),
    "replay": Command(
        "offload.replay",
        "ReplayOptions",
        "replay",
        "what fast memory would hold, from a trace",
        (
            "lynx-learn replay --trace my/trace --shares 0.25 0.5 --batch-sizes 1 16",
            "lynx-learn replay --trace my/trace --predictors my/predictors",
        ),
    ),
    "simulate": Command(
        "hardware.simulate",
        "SimulateOptions",
        "simulate",
        "a trace's routing on hardware that a file describes",
        (
            "lynx-learn simulate --hardware data/hardware/devices-8.yaml --trace my/trace",
            "lynx-learn simulate --hardware my.yaml --trace my/trace --selector my/selector",
        ),
    ),
    "export": Command(
        "graph.export",
        "ExportOptions",
        "export",
        "write a selector as an ONNX graph for serving engines",
        ("lynx-learn export --selector selectors/reference-moe --out my/selector.onnx",),
    ),
}
USAGE_ERROR, INTERRUPTED = 2, 130
# Read by OpenMP when torch is loaded. Threads that spin while they wait lose most of their time beside any other process.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # what a terminal or a log cannot show stops nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return _run(argv)
    except Unfinished as rest:
        _fail(str(rest))
        return 0
    except LynxError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _fail(
            "interrupted: what was finished is kept; `collect`, `train`, `calibrate`, `coverage` and `evaluate` go on from there when started again"
        )
        return INTERRUPTED
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}: make room or choose another --out, then run the command again")


def _fail(message: str) -> int:
    # Options are spelled as they are typed.
    line = re.sub(r"--\w+", lambda option: option[0].replace("_", "-"), " ".join(message.split()))
    print(f"lynx-learn: {line}", file=sys.stderr)
    return USAGE_ERROR


def _run(argv: list[str]) -> int:
    if quiet := "--quiet" in argv:
        argv = [word for word in argv if word != "--quiet"]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from . import __version__

        print(__version__)
        return 0
    if argv[0] == "completion":
        return _completion(argv[1:])
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "`lynx-learn --help` lists them"
        return _fail(f"unknown command {argv[0]!r}: expected one of {', '.join(COMMANDS)}; {hint}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
    from .show.progress import duration, say, set_quiet

    start = time.monotonic()
    set_quiet(quiet)
    name, words = argv[0], argv[1:]
    for kind in ("--url", "--offload"):
        if name == "bench" and any(word.partition("=")[0] == kind for word in words):
            name = f"bench {kind}"
            # Without a value it means the default one.
            words = [word for word, more in pairwise([*words, "--"]) if word != kind or not more.startswith("--")]
    command = COMMANDS[name]
    module = import_module(f".{command.module}", __package__)
    options = parse(name, getattr(module, command.options), words, command.examples)
    if name != "bench --url":  # which needs no model
        _hush_transformers()
    result = getattr(module, command.function)(options)
    say(f"lynx-learn {name}: {duration(time.monotonic() - start)} in all")
    _show(name, options, result)
    return 0


def usage() -> str:
    """What `lynx-learn` and `lynx-learn --help` print."""
    names = "\n".join(f"  {name:<16}{command.summary}" for name, command in COMMANDS.items())
    return f"""usage: lynx-learn COMMAND [options]

Learn which experts of a Mixture-of-Experts model a batch can skip at decode.

commands:
{names}
  {"completion":<16}print a completion script: bash, zsh, fish, tcsh, powershell

options:
  {"--help, -h":<16}show this, or after a command its options and examples
  {"--version":<16}show the version
  {"--quiet":<16}show results and errors, but no progress

Begin with `lynx-learn quickstart`.

Exit status: 0 done, 1 a fault of lynx-learn (with a traceback), 2 something to
put right (one line says what), 130 interrupted."""


def _completion(words: list[str]) -> int:
    """A script that completes commands, options and choices, by shtab."""
    import argparse

    import shtab

    if len(words) != 1 or words[0] not in shtab.SUPPORTED_SHELLS:
        shells = ", ".join(shtab.SUPPORTED_SHELLS)
        return _fail(f'completion: expected one of {shells}, as in eval "$(lynx-learn completion bash)"')
    whole = argparse.ArgumentParser("lynx-learn")
    parts = whole.add_subparsers()
    made: dict[str, argparse.ArgumentParser] = {}
    for name, command in COMMANDS.items():
        word = name.split()[0]
        one = made.setdefault(word, made.get(word) or parts.add_parser(word, help=command.summary))
        options = getattr(import_module(f".{command.module}", __package__), command.options)
        hints = typing.get_type_hints(options)
        for field in dataclasses.fields(options):
            choices = typing.get_args(hints[field.name]) if _is_literal(hints[field.name]) else None
            option = f"--{field.name.replace('_', '-')}"
            if option not in one._option_string_actions:  # `bench` has two sets of options
                one.add_argument(option, choices=choices)
    print(shtab.complete(whole, words[0]))
    return 0


def _is_literal(hint: object) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _hush_transformers() -> None:
    """Only our own lines and bars; transformers' loading bars and advice say nothing of the command's work."""
    import logging

    import transformers

    logging.getLogger("accelerate").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _show(command: str, options: Any, result: Any) -> None:
    from .selector.saving import read_metrics as figures
    from .show import quality, speed
    from .show.tables import show

    views: dict[str, Callable[[], None]] = {
        "collect": lambda: show(f"{result.collected_tokens:,} tokens in {result.shards} shards: {result.folder}"),
        "import-routes": lambda: show(
            f"{result.collected_tokens:,} tokens, routes alone: {result.folder}; for replay, and simulate without a selector"
        ),
        "train": lambda: show(
            quality.training_table(figures(options.out)["train"]["layers"]),
            f"selector without thresholds: {options.out}; next: lynx-learn calibrate --selector {options.out}",
        ),
        "calibrate": lambda: show(
            *quality.calibration_lines({options.metric: figures(options.selector)["calibrate"][options.metric]})
        ),
        "coverage": lambda: show(quality.coverage_table(result), quality.guarantees_table(result)),
        "evaluate": lambda: show(
            quality.evaluation_table(result), quality.matched_table(result), quality.ratios_table(result)
        ),
        "bench": lambda: show(*speed.bench_tables(result)),
        "bench --url": lambda: print(json.dumps(result, indent=2)),
        "bench --offload": lambda: show(*speed.offload_tables(result)),
        "replay": lambda: show(*speed.replay_tables(result)),
        "simulate": lambda: show(
            speed.simulation_table(result), *([speed.measured_table(result)] if result["measured"] else [])
        ),
        "export": lambda: show(*speed.export_lines(result)),
    }
    if command in views:
        views[command]()


if __name__ == "__main__":
    sys.exit(main())
