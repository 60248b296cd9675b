"""The README is executed: its commands and its Python, verbatim."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from lynx_learn.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def run(command: list[str], folder: Path) -> str:
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_python_block_skips_experts() -> None:
    (code,) = blocks("python")
    out = run([sys.executable, "-c", code], ROOT)
    before, after = map(float, re.search(r"([\d.]+) -> ([\d.]+) distinct experts", out).groups())  # type: ignore[union-attr]
    assert after < before


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_first_command_ends_with_the_table(tmp_path: Path) -> None:
    install = next(block for block in blocks("bash") if "quickstart" in block)
    assert install.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt '.[cpu]' && ")
    command = install.strip().split(" && ")[-1].removeprefix(".venv/bin/")
    out = run(command.split(), tmp_path)
    closing = out[out.index("Distinct experts, bytes, loss and time") :]
    assert "untouched" in closing
    assert "budget 0.01" in closing


# What follows each command of a block, so that it reads less text; the words before it are the README's.
SMALLER = {
    "inspect": "",
    "collect": "--tokens 4000",
    "train": "--epochs 1 --tune-steps 1 --reference false",
    "calibrate": "--tokens 1 --length 48 --prompt 16",
    "evaluate": "--tokens 1 --length 48 --prompt 16",
    "export": "",
}


def run_here(block: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The commands of a block, one after the other, in this process and `folder`."""
    patch.chdir(folder)
    for line in block.replace("\\\n", " ").strip().splitlines():
        program, command, *words = shlex.split(line, comments=True)
        assert program == "lynx-learn"
        assert main([command, *words, *shlex.split(SMALLER[command])]) == 0, line


def test_commands_for_an_own_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(next(block for block in blocks("bash") if "lynx-learn collect" in block), tmp_path, monkeypatch)
    assert "at equal loss" in capsys.readouterr().out
    assert (tmp_path / "my" / "report" / "report.json").exists()


def test_export_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "selectors").symlink_to(ROOT / "selectors")
    run_here(next(block for block in blocks("bash") if "lynx-learn export" in block), tmp_path, monkeypatch)
    assert "checked with onnxruntime on CPUExecutionProvider" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "my" / "selector.onnx").stat().st_size > 100_000


def test_second_command_is_what_ci_runs() -> None:
    (command,) = [line for block in blocks("bash") for line in block.splitlines() if line.endswith(".venv/bin/pytest")]
    assert command.startswith("python3 -m venv .venv && ")
    script = (ROOT / ".ci" / "run").read_text()
    assert "grep -F '.venv/bin/pytest' README.md" in script


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))])
def test_commands_have_the_options_that_pages_write(page: str) -> None:
    for line in re.findall(r"lynx-learn [a-z]+[^`\n]*", (ROOT / page).read_text(encoding="utf-8")):
        words = line.split()
        name = next((f"bench {kind}" for kind in ("--url", "--offload") if kind in words), words[1])
        if name not in COMMANDS:
            continue
        command = COMMANDS[name]
        options = getattr(import_module(f"lynx_learn.{command.module}"), command.options)
        known = {f.name.replace("_", "-") for f in fields(options)} | {"help", "config", "print-config", "quiet"}
        for option in re.findall(r"--([a-z][\w-]*)", line):
            assert option in known, f"{page}: {line}"


def test_links_to_files_exist() -> None:
    for name in re.findall(r"`([\w./-]+\.(?:md|txt|py|sh))`", README):
        assert (ROOT / name).exists(), name
