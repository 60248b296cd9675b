"""The command line: a dict of commands; every option is a field of the command's dataclass."""

import dataclasses
import json
import os
import sys
import typing
from collections.abc import Callable
from typing import Any

from .errors import LynxError

# command -> (module, options class, function); imported when the command runs.
COMMANDS = {
    "quickstart": ("quickstart", "QuickstartOptions", "quickstart", "the whole flow on the reference MoE"),
    "inspect": (
        "inspection",
        "InspectOptions",
        "inspect_model",
        "what a model is made of, and whether it is supported",
    ),
    "collect": ("traces.collect", "CollectOptions", "collect", "write router traces of a model over text"),
    "train": ("fit.train", "TrainOptions", "train", "fit surrogates and scorers from a trace"),
    "calibrate": ("measure.calibrate", "CalibrateOptions", "calibrate", "find the thresholds for quality budgets"),
    "coverage": (
        "measure.coverage",
        "CoverageOptions",
        "coverage",
        "check the bound of calibrate on many random splits",
    ),
    "evaluate": ("measure.evaluate", "EvaluateOptions", "evaluate", "measure loss and savings on test text"),
    "bench": ("decode.bench", "BenchOptions", "bench", "time decode steps with skipping on and off in turns"),
    "export": ("graph.export", "ExportOptions", "export", "write a selector as an ONNX graph for serving engines"),
}
USAGE_ERROR, INTERRUPTED = 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except LynxError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _fail(
            "interrupted: what was finished is kept; `collect`, `coverage` and `evaluate` go on from there when started again"
        )
        return INTERRUPTED
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}: make room or choose another --out, then run the command again")


def _fail(message: str) -> int:
    print(f"lynx-learn: {' '.join(message.split())}", file=sys.stderr)
    return USAGE_ERROR


def _run(argv: list[str]) -> int:
    names = "\n".join(f"  {name:<12}{entry[3]}" for name, entry in COMMANDS.items())
    usage = f"usage: lynx-learn COMMAND [options]\n\n{names}\n\n`lynx-learn COMMAND --help` lists a command's options."
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else USAGE_ERROR
    if argv[0] == "--version":
        from . import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        return _fail(f"unknown command {argv[0]!r}: expected one of {', '.join(COMMANDS)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import importlib

    module_name, options_name, function_name, _ = COMMANDS[argv[0]]
    module = importlib.import_module(f".{module_name}", __package__)
    options = parse(argv[0], getattr(module, options_name), argv[1:])
    _quiet()
    result = getattr(module, function_name)(options)
    _show(argv[0], options, result)
    return 0


def parse(command: str, options: type, argv: list[str]) -> Any:
    """Options from flags and `--config file.yaml`; `--batch-sizes 8 16` and `--batch_sizes 8 16` are the same.

    Raises:
        LynxError: with one line, where argparse would print its usage too.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=f"lynx-learn {command}", exit_on_error=False, description=options.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with options")
    parser.add_class_arguments(options, as_group=False)
    try:
        config = parser.parse_args(_spread(options, argv))
    except ArgumentError as error:
        raise LynxError(f"{command}: {_first_reason(str(error))}; see lynx-learn {command} --help") from None
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(options)}
    return options(**values)


def _first_reason(message: str) -> str:
    return " ".join(message.split()).rstrip(".")


def _spread(options: type, argv: list[str]) -> list[str]:
    """Dashes to underscores, a leading word to `--model`, and `--list 1 2 3` to `--list [1, 2, 3]`."""
    hints = typing.get_type_hints(options)
    lists = {name for name, hint in hints.items() if typing.get_origin(hint) is list}
    if argv and not argv[0].startswith("-") and "model" in hints:
        argv = ["--model", *argv]
    found: list[str] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--"):
            found.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in lists and not equals:
            end = position
            while end < len(argv) and not argv[end].startswith("--"):
                end += 1
            values = argv[position:end]
            if not (len(values) == 1 and values[0].startswith("[")):
                values = [json.dumps([_number(v) for v in values])]
            found += [f"--{name}", *values]
            position = end
        else:
            found.append(f"--{name}{equals}{value}")
    return found


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _quiet() -> None:
    """Only our own lines and bars; transformers' loading bars and advice say nothing of the command's work."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _show(command: str, options: Any, result: Any) -> None:
    from .show import tables as report

    views: dict[str, Callable[[], None]] = {
        "collect": lambda: report.show(
            f"{result.collected_tokens:,} tokens in {result.shards} shards: {result.folder}"
        ),
        "train": lambda: report.show(
            report.training_table(_layers(options.out)),
            f"selector without thresholds: {options.out}; next: lynx-learn calibrate --selector {options.out}",
        ),
        "calibrate": lambda: report.show(
            report.calibration_table({options.metric: result.config.calibration[options.metric]})
        ),
        "coverage": lambda: report.show(report.coverage_table(result)),
        "evaluate": lambda: report.show(
            report.evaluation_table(result), report.matched_table(result), report.ratios_table(result)
        ),
        "bench": lambda: report.show(*report.bench_tables(result)),
        "export": lambda: report.show(*report.export_lines(result)),
    }
    if command in views:
        views[command]()


def _layers(folder: str) -> Any:
    from .selector.saving import read_metrics

    return read_metrics(folder)["train"]["layers"]  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
