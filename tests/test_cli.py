"""The command line: options in all spellings; on bad input one line, no traceback, and nothing half-written."""

import inspect
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from flows import LENGTH, blind, calibrated, contents, other_revision, save_model, save_tokenizer, tiny_flow
from safetensors import safe_open
from safetensors.torch import save

from lynx_learn import __version__
from lynx_learn.cli import COMMANDS, WAITING, main
from lynx_learn.fit.train import TrainOptions
from lynx_learn.inspection import InspectOptions
from lynx_learn.measure.calibrate import CalibrateOptions
from lynx_learn.measure.evaluate import EvaluateOptions
from lynx_learn.options import parse
from lynx_learn.traces.collect import CollectOptions
from lynx_learn.traces.format import Trace, TraceWriter


class Done(NamedTuple):
    """Exit status and what was printed; on stderr, empty lines of progress bars left out."""

    status: int
    out: str
    err: list[str]


Run = Callable[..., Done]
Refused = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command as the console script does, in this process."""

    def run(*words: object) -> Done:
        capsys.readouterr()
        try:
            status = main(["--quiet", *(str(word) for word in words)])
        except SystemExit as end:  # argparse's way out of --help and --print_config
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return Done(status, out, [line for line in err.splitlines() if line.strip()])

    return run


@pytest.fixture
def refused(run: Run) -> Refused:
    """Run a command that must fail with one line, which is returned."""

    def refused(*words: object) -> str:
        done = run(*words)
        assert done.status == 2
        assert len(done.err) == 1, done.err
        assert done.err[0].startswith("lynx-learn: ")
        assert "Traceback" not in done.err[0]
        return done.err[0]

    return refused


def collect_words(out: Path, **changes: object) -> list[object]:
    flow = tiny_flow()
    options = {"model": flow.model, "out": out, "corpus": flow.texts, "tokens": 640, "length": LENGTH, **changes}
    return ["collect", *(word for name, value in options.items() for word in (f"--{name}", value))]


def train_words(out: Path, **changes: object) -> list[object]:
    options = {
        "trace": tiny_flow().trace,
        "out": out,
        "surrogate_share": 0.0625,
        "epochs": 1,
        "reference": "false",
        **changes,
    }
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", value))]


def measuring_words(command: str, selector: Path, *more: object) -> list[object]:
    """Of calibrate and evaluate."""
    text = ["--corpus", tiny_flow().texts, "--mode", "teacher", "--length", LENGTH, "--prompt", 8]
    amount = ["--groups", 12] if command == "calibrate" else ["--tokens", 500]
    return [command, "--selector", selector, *text, "--batch-sizes", 2, *amount, *more]


@pytest.fixture
def selector(tmp_path: Path) -> Path:
    """A calibrated selector that a test may change."""
    shutil.copytree(calibrated(), tmp_path / "selector")
    return tmp_path / "selector"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A trace that a test may change."""
    shutil.copytree(tiny_flow().trace, tmp_path / "trace")
    return tmp_path / "trace"


# Help, and options in all their spellings.


def test_the_console_script_knows_its_version() -> None:
    script = Path(sys.executable).with_name("lynx-learn")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{__version__}\n"


def test_output_without_unicode_stops_nothing() -> None:
    """As in a job or a container whose locale knows ASCII only."""
    script = Path(sys.executable).with_name("lynx-learn")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([script, "collect", "--help"], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "lynx-learn collect --model reference-moe" in done.stdout


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_every_command_is_named(words: list[str], run: Run) -> None:
    done = run(*words)
    assert done.status == 0
    assert all(re.search(rf"^  {name} ", done.out, re.MULTILINE) for name in COMMANDS)
    assert "Begin with `lynx-learn quickstart`" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_in_one_line_of_text(command: str, run: Run) -> None:
    done = run(*command.split(), "--help")
    assert (done.status, done.err) == (0, [])
    description, _, rest = done.out.partition("\noptions:\n")
    options, _, examples = rest.partition("\nexamples:\n")
    assert (options_of(command).__doc__ or "").splitlines()[0] in " ".join(description.split())
    said = {block.split()[0]: " ".join(block.split()[1:]) for block in re.split(r"^  --", options, flags=re.M)[1:]}
    for field in fields(options_of(command)):
        text = said[field.name.replace("_", "-")]
        assert len(text.split()) > 3, f"{field.name} is not explained"
        assert "(required)" in text or "default" in text or not default_of(field), field.name
    assert "Literal[" not in options
    assert "_" not in re.sub(r"\S+_\S+|\S*json\S*", "", options)
    assert len(examples.split("\n")) >= 1
    assert all(len(line) <= 80 for line in (description + options).splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_help_are_commands_that_parse(command: str) -> None:
    for line in COMMANDS[command].examples:
        words = shlex.split(line)
        assert words[0] == "lynx-learn"
        options = words[1 + len(command.split()) :] if command != "bench --url" else words[2:]
        parse(command, options_of(command), options)


def test_a_mistyped_command_is_guessed(refused: Refused) -> None:
    assert "did you mean calibrate?" in refused("calibrat")
    assert "--help" in refused("serve")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_options(shell: str, run: Run) -> None:
    done = run("completion", shell)
    assert done.status == 0
    assert all(word in done.out for word in ("quickstart", "--batch-sizes", "--tune-steps", "--url", "formula"))


def test_completion_for_another_shell_is_refused(refused: Refused) -> None:
    assert "expected one of bash" in refused("completion", "fish-tank")


def test_waiting_threads_do_not_spin_unless_the_user_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    run("collect", "--help")
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("ACTIVE", "0")


def default_of(field: Field[Any]) -> object:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def options_of(command: str) -> type:
    import importlib

    found: type = getattr(importlib.import_module(f"lynx_learn.{COMMANDS[command].module}"), COMMANDS[command].options)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_print_config_shows_every_option(command: str, run: Run) -> None:
    done = run(*command.split(), "--print_config")
    assert (done.status, done.err) == (0, [])
    assert list(yaml.safe_load(done.out)) == list(inspect.signature(options_of(command)).parameters)


def test_a_printed_config_gives_the_same_options(tmp_path: Path, run: Run) -> None:
    words: dict[str, tuple[type, list[str]]] = {
        "collect": (CollectOptions, ["--model", "m", "--out", "o", "--tokens", "77", "--mode", "generate"]),
        "train": (TrainOptions, ["--trace", "t", "--out", "o", "--keep-top1", "true", "--rate", "1e-4"]),
        "calibrate": (CalibrateOptions, ["--selector", "s", "--budgets", "0.5", "1", "--batch-sizes", "3"]),
        "evaluate": (EvaluateOptions, ["--selector", "s", "--out", "o", "--methods", "learned", "random"]),
    }
    for command, (options, given) in words.items():
        file = tmp_path / f"{command}.yaml"
        file.write_text(run(command, *given, "--print_config").out)
        assert parse(command, options, ["--config", str(file)]) == parse(command, options, given)
        assert parse(command, options, ["--config", str(file), "--seed", "9"]).seed == 9


def test_options_are_spelled_with_dashes_or_underscores() -> None:
    for word in ("--batch-sizes", "--batch_sizes"):
        assert parse("calibrate", CalibrateOptions, ["--selector", "s", word, "2", "4"]).batch_sizes == [2, 4]
    for words in (["--sensitivity-groups", "3"], ["--sensitivity_groups=3"], ["--sensitivity-groups=3"]):
        assert parse("train", TrainOptions, ["--trace", "t", "--out", "o", *words]).sensitivity_groups == 3


@pytest.mark.parametrize(
    "words", [["--budgets", "0.5", "2"], ["--budgets", "[0.5, 2]"], ["--budgets=[0.5, 2]"], ["--budgets", "5e-1", "2."]]
)
def test_lists_are_words_or_json(words: list[str]) -> None:
    options = parse("calibrate", CalibrateOptions, [*words, "--selector", "s"])
    assert options.budgets == [0.5, 2.0]
    assert options.selector == "s"


def test_lists_of_words() -> None:
    words = ["--selector", "s", "--methods", "random", "gate_sum", "--out", "my-out"]
    options = parse("evaluate", EvaluateOptions, words)
    assert (options.methods, options.out) == (["random", "gate_sum"], "my-out")


def test_inspect_takes_its_model_as_a_word(run: Run) -> None:
    assert parse("inspect", InspectOptions, ["some/model"]).model == "some/model"
    assert parse("inspect", InspectOptions, ["--model", "some/model"]).model == "some/model"
    done = run("inspect", tiny_flow().model)
    assert (done.status, done.err) == (0, [])
    assert "qwen3_moe" in done.out
    assert "model.layers.1.mlp" in done.out
    assert "top-2, softmax, normalised" in done.out


# The flow.


def test_the_flow_from_flags_and_from_a_file(tmp_path: Path, run: Run) -> None:
    """Collect, train, calibrate and evaluate, each of which says what it did on stdout and nothing on stderr."""
    (tmp_path / "collect.yaml").write_text(run(*collect_words(tmp_path / "t", tokens=1280), "--print_config").out)
    done = run("collect", "--config", tmp_path / "collect.yaml")
    assert (done.status, done.err) == (0, [])
    assert "1,280 tokens in 3 shards" in done.out
    selector = tmp_path / "s"
    done = run(*train_words(selector, trace=tmp_path / "t"))
    assert (done.status, done.err) == (0, [])
    assert "model.layers.1.mlp" in done.out
    assert f"next: lynx-learn calibrate --selector {selector}" in " ".join(done.out.split())
    done = run(*measuring_words("calibrate", selector, "--budgets", 0.1))
    assert (done.status, done.err) == (0, [])
    assert re.search(r"^0\.1 +2 +0\.\d{4} +0\.\d{4} +\d\.\d → \d\.\d +\d+%", done.out, re.MULTILINE)
    choice = ["--methods", "xshare", "learned", "--levels", 0.1]
    done = run(*measuring_words("evaluate", selector, "--out", tmp_path / "e", *choice))
    assert (done.status, done.err) == (0, [])
    assert re.search(r"^learned +2 +\d\.\d +\d+% .*\nbudget=0\.1 ", done.out, re.MULTILINE)
    assert re.search(r"method +batch +KL 0\.1 +ΔNLL 0\.1", done.out)
    assert re.search(r"^learned +2 +\d+%/\d\.\d ", done.out, re.MULTILINE)
    assert re.search(r"^KL 0\.1 +2 ", done.out, re.MULTILINE)
    assert (tmp_path / "e" / "report.json").exists()


def test_a_budget_that_no_threshold_keeps_is_said(selector: Path, run: Run) -> None:
    done = run(*measuring_words("calibrate", blind(selector), "--budgets", 1e-9))
    assert (done.status, done.err) == (0, [])
    (row,) = (line for line in done.out.splitlines() if line.startswith("1e-09"))
    assert "skips nothing: no threshold qualified" in row
    assert "100%" in row
    assert json.loads((selector / "config.json").read_text())["thresholds"] == {"kl": {"1e-09": {"2": 0.0}}}


# Bad words.


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["sing"], "unknown command 'sing'"),
        (["--sing"], "unknown command"),
        (["collect"], "required: --model, --out; as in `lynx-learn collect --model "),
        (["collect", "--model", "m"], "required: --out; as in `lynx-learn collect "),
        (["collect", "--model"], "--model has no value: expected a word"),
        (
            ["collect", "--model", "m", "--out", "o", "--tokens", "many"],
            "--tokens many is not usable: expected a whole number",
        ),
        (
            ["collect", "--model", "m", "--out", "o", "--tokens", "1.5"],
            "--tokens 1.5 is not usable: expected a whole number",
        ),
        (["collect", "--model", "m", "--out", "o", "--tokens", "0"], "--tokens 0 "),
        (
            ["collect", "--model", "m", "--out", "o", "--mode", "sing"],
            "--mode sing is not usable: expected one of teacher, generate",
        ),
        (["collect", "--model", "m", "--out", "o", "--sing", "loud"], "unknown option or word --sing;"),
        (["collect", "--model", "m", "--out", "o", "--toekns", "3"], "--toekns: did you mean --tokens?"),
        (["calibrate", "--selector", "s", "--mix", "a=b"], "--mix {'a': 'b'} is not usable: expected NAME=VALUE pairs"),
        (["calibrate", "--selector", "s", "--budgets", "low"], "--budgets low is not usable: expected a number, or"),
        (["train", "--trace", "t", "--out", "o", "--rank", "x"], "--rank x is not usable: expected a whole number"),
        (["collect", "--model", "m", "--out", "o", "loud"], "loud"),
        (["train", "--trace", "t", "--out", "o", "--rate", "-1"], "--rate -1 "),
        (
            ["train", "--trace", "t", "--out", "o", "--reference", "perhaps"],
            "--reference perhaps is not usable: expected true or false",
        ),
        (["train", "--trace", "no-trace", "--out", "o"], "no-trace holds no trace"),
        (["calibrate", "--selector", "s", "--budgets", "-1"], "--budgets -1 "),
        (["calibrate", "--selector", "s", "--budgets", "nan"], "budgets"),
        (["calibrate", "--selector", "s", "--budgets"], "--budgets is empty"),
        (["calibrate", "--selector", "s", "--batch-sizes"], "--batch-sizes is empty"),
        (["calibrate", "--selector", "s", "--batch-sizes", "1.5"], "--batch-sizes 1.5 is not usable: expected a whole"),
        (["evaluate", "--selector", "s", "--out", "o", "--methods", "magic"], "--methods magic is unknown"),
        (["evaluate", "--selector", "s", "--out", "o", "--levels"], "--levels is empty"),
        (["quickstart", "--budget", "-1", "--out", "o"], "--budget -1 "),
        (["quickstart", "--test-tokens", "0", "--out", "o"], "--test-tokens 0 "),
        (["quickstart", "--tokens", "0", "--out", "o"], "--tokens 0 "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words(
    words: list[str], reason: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason in refused(*words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tokenz: 3\n", "--tokenz: did you mean --tokens?"),
        ("tokens: many\n", "--tokens many is not usable: expected a whole number"),
        ("tokens: [1\n", "parsing config"),
        ("- tokens\n", "--config holds no options"),
        ("", "--config holds no options"),
        (None, "--config: File does not exist"),
    ],
)
def test_bad_configs(text: str | None, reason: str, refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    assert reason in refused("collect", "--model", "m", "--out", tmp_path / "o", "--config", file)
    assert not (tmp_path / "o").exists()


# Bad models and corpora.


def save_dense(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **shape)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_unsupported(folder: Path) -> Path:
    from transformers import JetMoeConfig, JetMoeForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_key_value_heads": 1, "kv_channels": 8}
    JetMoeForCausalLM(JetMoeConfig(num_hidden_layers=1, num_local_experts=4, **shape)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "reason"),
    [(save_dense, "'llama' has no Mixture-of-Experts"), (save_unsupported, "'jetmoe' is not supported")],
)
def test_models_that_cannot_be_acted_on(
    make: Callable[[Path], Path], reason: str, refused: Refused, tmp_path: Path
) -> None:
    model = make(tmp_path / "model")
    assert reason in refused("inspect", model)
    assert reason in refused(*collect_words(tmp_path / "t", model=model))
    assert reason in refused("quickstart", "--model", model, "--out", tmp_path / "q")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_model_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    assert "there is no such folder" in refused("inspect", tmp_path / "model")
    assert "there is no such folder" in refused(*collect_words(tmp_path / "t", model=tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "less than one sequence"),
        ("the router\n", "less than one sequence"),
        (None, "does not exist"),
    ],
)
def test_corpora_without_enough_text(
    text: str | None, reason: str, refused: Refused, selector: Path, tmp_path: Path
) -> None:
    corpus, out = tmp_path / "text.txt", tmp_path / "out"
    if text is not None:
        corpus.write_text(text)
    before = contents(tmp_path)
    assert reason in refused(*collect_words(out, corpus=corpus))
    for command, more in (("calibrate", []), ("evaluate", ["--out", out])):
        said = refused(*measuring_words(command, selector, "--corpus", corpus, *more))
        assert reason in said or "holds 0 sequences of 32 tokens from 0 documents" in said
    assert contents(tmp_path) == before
    assert not out.exists()


def test_a_missing_corpus_is_told_before_a_model_is_loaded(refused: Refused, selector: Path, tmp_path: Path) -> None:
    corpus, out, model = tmp_path / "no.jsonl", tmp_path / "out", tmp_path / "no-model"
    for words in (
        collect_words(out, model=model, corpus=corpus),
        [*measuring_words("calibrate", selector), "--corpus", corpus, "--model", model],
        [*measuring_words("evaluate", selector), "--corpus", corpus, "--model", model, "--out", out],
        ["quickstart", "--corpus", corpus, "--model", model, "--out", out],
    ):
        assert "no.jsonl' does not exist" in refused(*words)
    assert not out.exists()


# Bad selectors and traces.


def test_a_selector_of_another_model_or_revision(refused: Refused, selector: Path, tmp_path: Path) -> None:
    before = contents(selector)
    other = save_model(tmp_path / "other", num_hidden_layers=1)
    revision = other_revision(tiny_flow().model, tmp_path / "revision")
    for model, reason in ((other, "load the model it was trained for"), (revision, "was trained for")):
        for words in (
            measuring_words("calibrate", selector),
            measuring_words("evaluate", selector, "--out", tmp_path / "e"),
        ):
            assert reason in refused(*words, "--model", model)
        assert "was collected from" in refused(*train_words(tmp_path / "s", model=model))
    assert contents(selector) == before
    assert {p.name for p in tmp_path.iterdir()} == {"selector", "other", "revision"}


def cut_in_half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_a_bit(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit])
@pytest.mark.parametrize("name", ["layer-01/00003.safetensors", "index/00000.safetensors"])
def test_a_damaged_trace(
    damage: Callable[[bytes], bytes], name: str, refused: Refused, trace: Path, tmp_path: Path
) -> None:
    (trace / name).write_bytes(damage((trace / name).read_bytes()))
    message = refused(*train_words(tmp_path / "s", trace=trace))
    assert str(trace / name) in message
    assert "damaged" in message
    assert [p.name for p in tmp_path.iterdir()] == ["trace"]


def test_a_trace_with_values_that_are_not_finite(refused: Refused, trace: Path, tmp_path: Path) -> None:
    """Whole by its checksums: the model overflowed when it was collected."""
    file = trace / "layer-01/00003.safetensors"
    with safe_open(file, "pt") as shard:
        tensors = {key: shard.get_tensor(key).clone() for key in shard.keys()}  # noqa: SIM118
    tensors["hidden"][5, 7] = torch.nan
    file.write_bytes(save(tensors))
    manifest = json.loads((trace / "manifest.json").read_text())
    manifest["sha256"]["layer-01/00003.safetensors"] = sha256(file.read_bytes()).hexdigest()
    (trace / "manifest.json").write_text(json.dumps(manifest))
    message = refused(*train_words(tmp_path / "s", trace=trace))
    assert str(file) in message
    assert "hidden holds values that are not finite" in message
    assert [p.name for p in tmp_path.iterdir()] == ["trace"]


def test_an_unfinished_trace(refused: Refused, trace: Path, tmp_path: Path) -> None:
    (trace / "manifest.json").unlink()
    assert "is not complete" in refused(*train_words(tmp_path / "s", trace=trace))


@pytest.mark.parametrize("name", ["config.json", "selector.safetensors"])
def test_a_damaged_selector(name: str, refused: Refused, selector: Path, tmp_path: Path) -> None:
    (selector / name).write_bytes(cut_in_half((selector / name).read_bytes()))
    before = contents(selector)
    assert name in refused(*measuring_words("calibrate", selector))
    assert name in refused(*measuring_words("evaluate", selector, "--out", tmp_path / "e"))
    assert contents(selector) == before
    assert [p.name for p in tmp_path.iterdir()] == ["selector"]


def test_folders_that_are_in_use(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for words in (train_words(tmp_path), collect_words(tmp_path), ["quickstart", "--out", tmp_path]):
        assert "not empty" in refused(*words)
    for words in (
        train_words(tmp_path / "notes.txt"),
        collect_words(tmp_path / "notes.txt"),
        ["quickstart", "--out", tmp_path / "notes.txt"],
        measuring_words("evaluate", calibrated(), "--methods", "xshare", "--out", tmp_path / "notes.txt"),
    ):
        assert "notes.txt" in refused(*words)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


# A full disk, and Ctrl-C.


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """While open, the system itself refuses to write more into a file, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(refused: Refused, selector: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    runs = {
        "t": collect_words(tmp_path / "t"),
        "s": train_words(tmp_path / "s"),
        "selector": measuring_words("calibrate", selector, "--budgets", 0.1),
        "e": measuring_words("evaluate", selector, "--out", tmp_path / "e", "--methods", "xshare"),
    }
    for name, words in runs.items():
        with files_no_larger_than(2500):
            message = refused(*words)
        assert "File too large" in message
        assert str(tmp_path / name) in message
    begun = {
        "t/options.json",
        *(n for n in contents(tmp_path) if n.startswith(("e/", "s/", "selector/.calibrate-kl.part/"))),
    }
    assert not begun & {"e/report.json", "e/frontier.svg", "s/config.json"}
    assert {n: d for n, d in contents(tmp_path).items() if n not in begun} == before
    assert all(name.startswith("s/.train.part/") for name in begun if name.startswith("s/"))
    main([str(word) for word in runs["t"]])  # with room again, collect goes on
    assert Trace.open(tmp_path / "t").collected_tokens == 640


def test_ctrl_c_while_collecting(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first of two shards."""
    write, out = TraceWriter.write, tmp_path / "t"
    words = collect_words(out)

    def interrupted(self: TraceWriter, shard: int, *content: Any) -> None:
        write(self, shard, *content)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TraceWriter, "write", interrupted)
    done = run(*words)
    assert done.status == 130
    assert len(done.err) == 1
    assert done.err[0].startswith("lynx-learn: interrupted")
    assert (out / "index" / "00000.safetensors").exists()
    assert not (out / "manifest.json").exists()
    assert not [name for name in contents(out) if name.endswith(".part")]


def test_ctrl_c_while_lightning_trains(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning would leave with a status of its own, without a word, and deaf to further interrupts."""
    from lynx_learn.fit.scorer import ScorerTraining

    scratch, words = tmp_path / "scratch", train_words(tmp_path / "s")
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    step, handler = ScorerTraining.training_step, signal.getsignal(signal.SIGINT)

    def interrupted(self: ScorerTraining, *batch: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *batch)

    monkeypatch.setattr(ScorerTraining, "training_step", interrupted)
    done = run(*words)
    assert done.status == 130
    assert len(done.err) == 1
    assert done.err[0].startswith("lynx-learn: interrupted")
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "s").exists()
    assert list(scratch.iterdir()) == []


def test_options_are_dataclasses_that_can_be_written_down() -> None:
    """What run.yaml holds comes back as the same options."""
    options = CalibrateOptions("s", budgets=[0.5])
    assert CalibrateOptions(**yaml.safe_load(yaml.safe_dump(asdict(options)))) == options
