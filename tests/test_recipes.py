"""Every recipe in `train/` is fed to the real parser, and run in a small size by its script, as are those of `docs/`."""

import csv
import gzip
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from flows import BUDGETS, LENGTH, PROMPT, calibrated, tiny_flow
from transformers import AutoModelForCausalLM, AutoTokenizer

from lynx_learn import LynxSelector, cli, skip_experts
from lynx_learn.decode.served import TextOptions
from lynx_learn.fit.train import TrainOptions
from lynx_learn.measure.evaluate import EvaluateOptions
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.loading import load_model
from lynx_learn.traces.documents import read_documents
from lynx_learn.traces.format import Trace

Script = Callable[..., str]
ROOT = Path(__file__).parents[1]
SMALL_MODEL = {
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run a script of the repository as `python NAME WORDS` does there, in this process; returns what it printed."""
    monkeypatch.chdir(ROOT)

    def script(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capsys.readouterr()
        runpy.run_path(name, run_name="__main__")
        return capsys.readouterr().out

    return script


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with the recipe's three sources, small."""
    documents = list(islice(read_documents("python-stdlib"), 60))
    for source in ("math", "code", "prose"):
        with gzip.open(tmp_path / f"{source}.jsonl.gz", "wt", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": document.text[:4_000]}) + "\n" for document in documents)
    return tmp_path


SECOND_MODEL = {
    **{key: value for key, value in SMALL_MODEL.items() if key not in ("num_experts", "norm_topk_prob")},
    "model_type": "glm4_moe",
    "n_routed_experts": 8,
    "num_nextn_predict_layers": 0,
}


# Tokens of one step: windows times their length.
STEP = 8 * SMALL_MODEL["max_position_embeddings"]


def train_words(
    texts: Path, out: Path, steps: int, name: str = "reference", model: dict[str, Any] = SMALL_MODEL
) -> list[object]:
    recipe = ["train/reference_moe.py", "--config", f"train/{name}-moe.yaml"]
    small = ["--model", json.dumps(model), "--tokens", steps * STEP, "--checkpoint_steps", 10]
    return [*recipe, "--corpus", texts, "--heldout", texts, "--out", out, *small]


class Stopped(Exception):
    """The run was broken off."""


def test_reference_moe_recipe_resumes_and_writes_a_plain_model(
    texts: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    out = tmp_path / "run"
    checkpoint = ModelCheckpoint.on_train_batch_end

    def stop(self: Any, trainer: Any, *more: Any) -> None:
        checkpoint(self, trainer, *more)
        if trainer.global_step == 25:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(ModelCheckpoint, "on_train_batch_end", stop)
        with pytest.raises(Stopped):
            script(*train_words(texts, out, 40))
    saved = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 20
    assert saved["budget"]["tokens_seen"] == 20 * STEP
    assert not (out / "model").exists()
    script(*train_words(texts, out, 40))
    figures = json.loads((out / "model" / "training.json").read_text())
    assert (figures["steps"], figures["tokens_seen"]) == (40, 40 * STEP)
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 40
    with next((out / "logs").glob("*/metrics.csv")).open() as lines:
        balances = [float(row["balance"]) for row in csv.DictReader(lines)]
    # Experts times the sum of load share × mean probability: top_k where both are even, whatever the number of tokens.
    assert balances == pytest.approx([SMALL_MODEL["num_experts_per_tok"]] * len(balances), rel=0.5)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert model.config.model_type == "qwen3_moe"
    assert tokenizer.decode(tokenizer("def f(x):\n    return 12")["input_ids"]) == "def f(x):\n    return 12"
    sources = tmp_path / "sources.json"
    sources.write_text(json.dumps({"text": [{"repo": "https://github.com/somebody/something", "licence": "MIT"}]}))
    places = ["--model", out / "model", "--sources", sources, "--config_file", "train/reference-moe.yaml"]
    script("train/reference_card.py", *places)
    card = (out / "model" / "README.md").read_text()
    assert f"{figures['tokens_seen']:,} tokens" in card
    assert "- MIT: somebody/something" in card


def test_second_model_recipe_evens_the_load_by_the_choice_bias(texts: Path, tmp_path: Path, script: Script) -> None:
    out = tmp_path / "run"
    script(*train_words(texts, out, 60, "second", SECOND_MODEL))
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    figures = json.loads((out / "model" / "training.json").read_text())
    assert len(bias.unique()) > 1
    # A step moves it by the rate, or by nothing, towards the expert's mean load.
    assert bias.abs().max() <= 5e-3 * figures["steps"] * 1.01
    assert max(figures["heldout"]["load"]["heaviest_over_mean"]) < 8 / 2


@pytest.mark.parametrize("name", ["reference-moe", "second-moe", "top2-moe", "reference-moe-50m"])
def test_a_recipe_of_a_model_sets_only_known_options(name: str, script: Script) -> None:
    with pytest.raises(SystemExit) as end:
        script("train/reference_moe.py", "--config", f"train/{name}.yaml", "--print_config")
    assert not end.value.code


@pytest.mark.slow
def test_selector_recipe(tmp_path: Path, script: Script) -> None:
    trace, selector, report, coverage, ablations = (
        str(tmp_path / name) for name in ("trace", "selector", "report", "coverage", "ablations")
    )
    model, text = str(tiny_flow().model), ["--corpus", str(tiny_flow().texts)]
    served = ["--length", "32", "--prompt", "8", "--ignore_eos", "true"]
    small = {
        "collect": ["--model", model, *text, "--tokens", "3000", "--length", "64", "--out", trace],
        "train": [
            *("--trace", trace, "--out", selector, "--epochs", "1", "--tune_steps", "1", "--reference", "false"),
            *("--sensitivity_groups", "1"),
        ],
        "calibrate": [
            *("--selector", selector, *text, "--batch_sizes", "2", "--tokens", "1", *served),
        ],
        "evaluate": [
            *("--selector", selector, "--trace", trace, *text, "--out", report, "--workers", "1"),
            *("--batch_sizes", "16", "--batches", "mixed", "--tokens", "1", *served),
            *("--methods", "xshare", "sere", "learned", "formula", "oracle"),
        ],
        "coverage": [
            *("--selector", selector, *text, "--batch_sizes", "2", *served, "--shift", "null"),
            *("--groups", "24", "--calibration_groups", "12", "--resplits", "5", "--bootstraps", "5"),
            *("--out", coverage),
        ],
    }
    assert f"for step in {' '.join(small)}; do" in (ROOT / "train" / "selector.sh").read_text()
    for step, options in small.items():
        assert cli.main([step, "--config", f"train/selector/{step}.yaml", *options]) == 0
    assert set(LynxSelector.from_pretrained(selector).config.thresholds["kl"]) == {"0.003", "0.01", "0.03"}
    variants = {"base": {}, "no surrogates, not tuned": {"surrogate_share": 0, "tune_steps": 0}}
    places = ["--config", "train/ablations.yaml", "--trace", trace, *text, "--out", ablations]
    small_base = {"scorer": "linear", "epochs": 1, "reference": False, "tune_steps": 1, "sensitivity_groups": 1}
    changes = ["--base", json.dumps(small_base), "--variants", json.dumps(variants), "--batch_size", 2, "--tokens", 1]
    said = script("train/ablations.py", *places, *changes)
    assert all(name in said for name in variants)
    assert "100.0%" in said  # without surrogates all is unexplained
    sizes = yaml.safe_load((ROOT / "train" / "surrogates.yaml").read_text())
    assert all(TrainOptions("", "", **{**sizes["base"], **changes}) for changes in sizes["variants"].values())
    empty = partial(re.sub, r"(<!-- .+? -->\n)((?!<!--)[\s\S])*(<!-- end -->)", r"\1\3")
    pages = [tmp_path / name for name in ("frontier.md", "certificate.md")]
    prose = [empty((ROOT / "docs" / page.name).read_text()) for page in pages]
    for page, text in zip(pages, prose, strict=True):
        page.write_text(text)
    table = tmp_path / "table.md"
    table.write_text("| a |\n")
    places = ["--config", "docs/measured-pages.yaml", f"--pages={json.dumps(list(map(str, pages)))}"]
    reports = ["main", "large_batches"]
    places += [word for name in reports for word in (f"--{name}", report)]
    places += [word for name in ("larger", "larger_64", "top2", "second") for word in (f"--{name}", "null")]
    places += [word for name in ("ablations", "longer") for word in (f"--{name}", f"{ablations}/ablations.json")]
    places += ["--coverage", f"{coverage}/coverage.json"]
    rounded = tmp_path / "quantised"
    rounded.mkdir()
    shutil.copyfile(table, rounded / "quantised.md")
    points = [
        {"format": name, "budget": budget, "bytes": 0.5, "kl": 0.01} for name in "abcde" for budget in (None, 0.1)
    ]
    (rounded / "quantised.json").write_text(json.dumps({"options": {"selector": "some"}, "points": points}))
    tables = ["certificate", "large_batch", "large_batch_all", "long_decode", "trained_length"]
    tables += ["stand_ins", "stand_ins_larger", "surrogate_kinds", "decision_kinds", "decision_kinds_larger"]
    places += [word for name in ("quantised", "quantised_larger") for word in (f"--{name}", rounded)]
    script("docs/measured_pages.py", *places, *(word for name in tables for word in (f"--{name}", table)))
    assert (tmp_path / "frontier.svg").read_text() == (Path(report) / "frontier.svg").read_text()
    assert not (tmp_path / "frontier-second.svg").exists()
    drawn = (tmp_path / "quantised.svg").read_text()
    assert drawn.count(">some<") == 2
    assert all(f">{name}<" in drawn for name in "abcde")
    filled = [page.read_text() for page in pages]
    assert [empty(text) for text in filled] == prose
    assert all("<!-- end -->\n<!--" not in text for text in filled)
    names = {
        "frontier",
        "methods",
        "sources",
        "large batches",
        "large batches sources",
        "ablations",
        "longer",
        "coverage",
    }
    names |= {"guarantees", "quantised", "quantised larger", *(name.replace("_", " ") for name in tables)}
    assert all(sum(f"<!-- {name} -->\n|" in text for text in filled) == 1 for name in names)
    for name in ("larger", "larger 64", "top2", "top2 methods", "top2 setting", "second"):
        assert sum(f"<!-- {name} -->\n<!-- end -->" in text for text in filled) == 1


def test_certificate_recipe_puts_every_text_into_one_table(tmp_path: Path, script: Script) -> None:
    recipe = yaml.safe_load((ROOT / "train" / "certificate.yaml").read_text())
    for where in recipe["prompts"].values():
        for how in recipe["texts"].values():
            EvaluateOptions(recipe["selector"], "unused", methods=["learned"], **recipe["base"], **where, **how)
    names = ["greedy", "sampled while skipping at 0.01"]
    texts = {name: {**recipe["texts"][name], "skipping_budget": BUDGETS[0]} for name in names}
    prompts = {"own": {"corpus": str(tiny_flow().texts)}, "other": {"corpus": str(tiny_flow().texts), "seed": 5}}
    small = {"batch_sizes": [2], "tokens": 1, "length": LENGTH, "prompt": PROMPT, "ignore_eos": True}
    places = ["--config", "train/certificate.yaml", "--selector", calibrated(), "--out", tmp_path]
    changes = [
        f"--{name}={json.dumps(value)}" for name, value in (("prompts", prompts), ("texts", texts), ("base", small))
    ]
    said = script("train/certificate.py", *places, *changes)
    assert (tmp_path / "certificate.md").read_text() in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| o")]
    assert [row[:3] for row in rows] == 2 * [[source, text, "2"] for source in prompts for text in texts]
    report = json.loads((tmp_path / "own-greedy" / "report.json").read_text())
    assert (report["options"]["mode"], report["options"]["temperature"]) == ("generate", 0.0)
    point = next(p for p in report["points"] if p["setting"] == f"budget={BUDGETS[1]:g}")
    shown = f"{point['kl']:.4f} ± {point['kl_margin']:.4f}"
    over = point["kl"] - point["kl_margin"] > BUDGETS[1]
    assert rows[0][4] == f"{f'**{shown}**' if over else shown}, {point['bytes']:.0%}"
    assert rows[4][4] == " ".join(f"{value:.4f}" for value in point["kl_by_part"])
    assert len({row[4] for row in rows[:4]}) == 4  # other text loses something else


def test_a_long_decode_is_measured_by_position_and_read_off_at_the_budget(tmp_path: Path, script: Script) -> None:
    recipe = yaml.safe_load((ROOT / "train" / "long_decode.yaml").read_text())
    assert recipe["stretch"] * 512 == recipe["length"]
    places = ["--config", "train/long_decode.yaml", "--selector", calibrated(), "--model", tiny_flow().model]
    places += ["--corpus", tiny_flow().texts, "--out", tmp_path / "page.md", "--budget", BUDGETS[1], "--prompt", PROMPT]
    said = script(
        "train/long_decode.py", *places, "--batch_size=2", f"--length={2 * LENGTH}", "--stretch=2", "--parts=3"
    )
    assert (tmp_path / "page.md").read_text() in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")]
    found = {row[0]: row[1:] for row in rows}
    mean, *parts = map(float, found["skipping in the last part alone"])
    assert parts[:2] == [0, 0] < [parts[2]] * 2
    assert mean == pytest.approx(sum(parts) / 3, abs=1e-4)
    assert float(found["skipping everywhere"][1]) > 0
    assert {f"all experts in every {n}th step" for n in recipe["every"]} < set(found)


def test_stand_ins_leave_less_together_than_alone(tmp_path: Path, script: Script) -> None:
    places = ["--config", "train/stand_ins.yaml", "--trace", tiny_flow().trace, "--selector", calibrated()]
    said = script("train/stand_ins.py", *places, "--out", tmp_path / "page.md", "--tokens", 2000)
    assert (tmp_path / "page.md").read_text() in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["0", "1", "all"]
    for _, *cells in rows:
        scalar, surrogate, both, either, oracle = map(float, cells)
        assert 0 < both < 1.1
        assert both <= surrogate + 0.01
        assert scalar <= 1.1
        assert oracle <= min(scalar, surrogate)
        assert oracle <= either <= max(scalar, surrogate)


def read_config(selector: Path) -> dict[str, Any]:
    return json.loads((selector / "config.json").read_text())  # type: ignore[no-any-return]


def cells(said: str) -> list[list[str]]:
    """The rows of a Markdown table, without its head."""
    lines = [line for line in said.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_other_kinds_of_surrogates_stand_beside_those_that_are_fitted(tmp_path: Path, script: Script) -> None:
    places = ["--config", "train/surrogate_kinds.yaml", "--trace", tiny_flow().trace, "--selector", calibrated()]
    sizes = ["--budget", BUDGETS[1], "--batch_size", 2, "--batches", 10]
    said = script("train/surrogate_kinds.py", *places, "--out", tmp_path / "page.md", *sizes)
    assert (tmp_path / "page.md").read_text() in said
    rows = cells(said)
    assert [row[0] for row in rows] == ["0", "1", "all"]
    assert all(0 < float(cell) < 1.2 for row in rows for cell in row[1:])


def test_a_shared_projection_is_found_where_there_is_one() -> None:
    script = runpy.run_path(str(ROOT / "train" / "surrogate_kinds.py"))
    draw = torch.Generator().manual_seed(0)
    down = torch.randn(12, 3, generator=draw)
    rows = []
    for _ in range(4):
        x, up = torch.randn(300, 12, generator=draw), torch.randn(3, 12, generator=draw)
        rows.append(script["Rows"](x, x @ down @ up + 1, torch.ones(300)))
    for width, most in ((3, 1e-3), (2, 1.0)):
        for own, (whole, constant) in zip(rows, script["shared_input"](rows, rows, width), strict=True):
            left = (own.y - own.x @ whole - constant).square().sum() / (own.y - own.y.mean(0)).square().sum()
            assert left < most
            assert width == 3 or left > 1e-2


def test_other_ways_to_decide_are_read_off_at_equal_loss(tmp_path: Path, script: Script) -> None:
    places = ["--config", "train/decision_kinds.yaml", "--trace", tiny_flow().trace, "--selector", calibrated()]
    sizes = ["--budget", BUDGETS[1], "--batch_size", 2, "--length", LENGTH, "--learned_from", 3, "--measured_on", 2]
    said = script("train/decision_kinds.py", *places, "--out", tmp_path / "page.md", *sizes)
    assert (tmp_path / "page.md").read_text() in said
    names = ["learned", "by entropy", "by its own entropy", "oracle", "errors together"]
    assert [row[0] for row in cells(said)] == names
    reached = [cell for row in cells(said) for cell in row[1:] if cell != "not reached"]
    assert reached
    assert all(0 < float(cell.split(",")[0]) <= Trace.open(tiny_flow().trace).options.num_experts for cell in reached)


def test_what_is_known_of_a_token_is_of_the_step_before() -> None:
    script = runpy.run_path(str(ROOT / "train" / "decision_kinds.py"))
    loaded = load_model(tiny_flow().model)
    tokens = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    given = script["known"](loaded, find_moe_layers(loaded.model), tokens, 4)
    with torch.no_grad():
        log = loaded.model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)
    assert given.features.shape == (8, 2, 4)
    for step, sequence in ((0, 1), (5, 0)):
        place = 4 + step
        before, own = (-(row.exp() @ row) for row in log[sequence, place - 1 : place + 1])
        surprise = -log[sequence, place - 1, tokens[sequence, place]]
        wanted = torch.stack([before, surprise, torch.tensor(float(place)).log(), own])
        torch.testing.assert_close(given.features[step, sequence], wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(given.log[sequence, step], log[sequence, place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sign", "kept"), [(1, [True, False, True]), (-1, [False, False, True])])
def test_experts_whose_errors_add_up_are_not_both_left_out(sign: int, kept: list[bool]) -> None:
    script = runpy.run_path(str(ROOT / "train" / "decision_kinds.py"))
    model = load_model(tiny_flow().model).model
    layer = find_moe_layers(model)[0]
    selector = LynxSelector.from_pretrained(calibrated())
    own = selector.layers[0]
    with torch.no_grad():
        for weight in own.surrogates.parameters():
            weight.zero_()
        own.sensitivity.fill_(1)
        for weight in (layer.experts.gate_up_proj, layer.experts.down_proj):
            weight[:] = weight[0].clone()
        layer.experts.down_proj[1] *= sign
        layer.experts.down_proj[2] *= 3
    logits = torch.zeros(1, 1, layer.num_experts)
    hidden = torch.randn(1, 1, layer.hidden_size, generator=torch.Generator().manual_seed(0)).to(layer.dtype)
    weights = torch.full((1, 1, 3), 1 / 3, dtype=layer.dtype)
    active = torch.ones(1, 1, dtype=torch.bool)
    routing = script["Routing"](hidden, logits, torch.tensor([[[0, 1, 2]]]), weights, active)
    cost = float(layer.expert_output(0, hidden[0]).float().square().sum() / 9)
    found = {}
    with mock.patch.object(LynxSelector, "check"):  # these are no longer the selector's experts
        for name in ("Oracle", "Together"):
            policy = script[name](selector, 1.1 * cost)
            policy.bind(find_moe_layers(model))
            found[name] = (policy.decide(layer, routing).weights != 0).flatten().tolist()
    assert found == {"Oracle": [False, False, True], "Together": kept}


def test_cross_fitted_costs_are_nearer_to_those_on_unseen_tokens(tmp_path: Path, script: Script) -> None:
    places = ["--config", "train/cross_fit.yaml", "--trace", tiny_flow().trace, "--out", tmp_path / "page.md"]
    said = script("train/cross_fit.py", *places, "--tokens", "[700]", "--layer", 1, "--epochs", 1)
    assert (tmp_path / "page.md").read_text() in said
    plain, crossed = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if "| 700" in line]
    assert (plain[2], crossed[2]) == ("as they are", "cross-fitted")
    assert float(plain[3]) < float(crossed[3])


def test_hidden_states_in_fewer_bits_are_held_against_those_of_the_model(tmp_path: Path, script: Script) -> None:
    base = {"scorer": "linear", "epochs": 1, "reference": False, "tune_steps": 0, "sensitivity_groups": 1}
    places = ["--config", "train/hidden_states.yaml", "--trace", tiny_flow().trace, "--out", tmp_path / "out"]
    said = script("train/hidden_states.py", *places, "--base", json.dumps(base), "--tokens", 0)
    exact, half, quarter = json.loads((tmp_path / "out" / "hidden-states.json").read_text())["rows"]
    assert (
        exact["error"]
        == exact["worst"]
        == 0
        < half["error"]
        < half["worst"]
        < quarter["error"]
        < quarter["worst"]
        < 1 / 16
    )
    assert exact["bytes"] > half["bytes"] > quarter["bytes"]
    assert f"float8_e4m3fn {quarter['bytes'] / 1e6:,.1f} {quarter['error']:.2%}" in " ".join(said.split())
    again = Trace.open(tmp_path / "out" / "auto" / "trace")
    assert again.sha256 == Trace.open(tiny_flow().trace).sha256


def test_a_scalar_finds_an_expert_that_is_a_multiple_of_another() -> None:
    script = runpy.run_path(str(ROOT / "train" / "stand_ins.py"))
    flow = tiny_flow()
    trace, model = Trace.open(flow.trace), load_model(flow.model).model
    layer = find_moe_layers(model)[0]
    twin = 2.5 * layer.experts.down_proj[0]
    with torch.no_grad():
        layer.experts.gate_up_proj[:] = layer.experts.gate_up_proj[0]
        layer.experts.down_proj[:] = twin
        layer.experts.down_proj[0] /= 2.5
    found = script["measure"](layer, trace, 2, script["Options"]("", "", "")).tolist()
    whole, scalar, surrogate, both, either, oracle = found
    assert either == scalar < 1e-6 * whole
    assert oracle <= scalar
    # What a surrogate leaves is no multiple of another expert, so that the scalar helps less behind it.
    assert 1e-6 * whole < both < surrogate < whole


def test_quantised_experts_lose_more_in_fewer_bits_and_read_fewer_bytes(tmp_path: Path, script: Script) -> None:
    recipe = yaml.safe_load((ROOT / "train" / "quantised.yaml").read_text())
    TextOptions(**recipe["text"])
    small = {"corpus": str(tiny_flow().texts), "length": LENGTH, "prompt": PROMPT, "ignore_eos": True}
    places = ["--config", "train/quantised.yaml", "--selector", calibrated(), "--out", tmp_path, "--split", "test"]
    changes = [f"--text={json.dumps(small)}", f"--budgets={json.dumps(BUDGETS)}", "--batch_size=2", "--groups=3"]
    given = {"corpus": str(tiny_flow().texts), "split": "fit", "tokens": 20 * LENGTH, "length": LENGTH}
    fit = {"epochs": 1, "reference": False, "tune_steps": 0, "sensitivity_groups": 1}
    changes += [f"--collect={json.dumps(given)}", f"--train={json.dumps(fit)}"]
    said = script("train/quantised.py", *places, *changes)
    assert (tmp_path / "quantised.md").read_text() in said
    written = json.loads((tmp_path / "quantised.json").read_text())
    before, own = written["retrained"]
    assert [before["selector_of"], own["selector_of"]] == ["as stored", recipe["retrain"]]
    # With a threshold that skips next to nothing, both lose what rounding alone does.
    alone = next(p for p in written["points"] if (p["format"], p["budget"]) == (recipe["retrain"], None))
    for kind in (before, own):
        assert kind["points"][0]["kl"] == pytest.approx(alone["kl"], rel=0.2)
        assert kind["points"][-1]["bytes"] < kind["points"][0]["bytes"]
    identities = [read_config(tmp_path / name / "selector")["identity"] for name in ("as-stored", recipe["retrain"])]
    assert identities[0] != identities[1]
    points = written["points"]
    found = {(p["format"], p["budget"]): p for p in points}
    few, many = BUDGETS
    assert 0 < found["int8", None]["kl"] < found["int4", None]["kl"]
    assert found["int8", None]["bytes"] == pytest.approx(8.25 / 16)
    assert found["int4", many]["bytes"] < found["int4", few]["bytes"] < found["as stored", few]["bytes"]
    assert found["int8", many]["kl"] == pytest.approx(found["as stored", many]["kl"], rel=0.3)
    assert found["int8", many]["kl"] > 3 * found["int8", None]["kl"]


def test_weights_are_rounded_to_what_a_format_holds() -> None:
    formats = runpy.run_path(str(ROOT / "train" / "quantised.py"))
    weights = torch.zeros(1, 64)
    weights[0, :6] = torch.tensor([7.0, 3.6, -1.4, 0.4, 0.2, -7.0])
    assert formats["integers"](weights, 4)[0, :6].tolist() == [7, 4, -1, 0, 0, -7]
    # The largest of a block is between 4 and 8 times its power of two; a tie goes to the smaller number.
    assert formats["mxfp4"](weights)[0, :6].tolist() == [6, 4, -1.5, 0.5, 0, -6]
    assert (formats["mxfp4"](weights / 32) == formats["mxfp4"](weights) / 32).all()
    # Three bits behind the leading one: 448 / 7 is a power of two, so that these are rounded as they are.
    assert formats["float8"](weights)[0, :6].tolist() == pytest.approx([7, 3.5, -1.375, 0.40625, 0.203125, -7])


def test_random_model_keeps_the_share_of_experts_that_was_asked_for(tmp_path: Path, script: Script) -> None:
    words = ["docs/random_model.py", "--layers", 2, "--fraction", 0.5, "--out", tmp_path / "new"]
    assert "at budget 1.0" in script(*words)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model", dtype=torch.float32)
    selector = LynxSelector.from_pretrained(tmp_path / "new" / "selector")
    ids = torch.randint(3, 4000, (16, 8), generator=torch.Generator().manual_seed(1))
    with skip_experts(model, selector, budget=1.0) as skipping:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    stats = skipping.stats
    assert stats.steps == 4
    assert sum(stats.experts_after) / sum(stats.experts_before) == pytest.approx(0.5, abs=0.15)
    assert AutoTokenizer.from_pretrained(tmp_path / "new" / "model")("def")["input_ids"]
    with pytest.raises(SystemExit, match="is not empty"):
        script(*words)


def test_no_recipe_is_left_out() -> None:
    recipes = {path.relative_to(ROOT / "train").as_posix() for path in (ROOT / "train").rglob("*.yaml")}
    assert recipes == {
        *(
            "reference-moe.yaml",
            "reference-moe-50m.yaml",
            "second-moe.yaml",
            "top2-moe.yaml",
            "ablations.yaml",
            "surrogates.yaml",
            "certificate.yaml",
            "long_decode.yaml",
            "quantised.yaml",
            "stand_ins.yaml",
            "cross_fit.yaml",
            "surrogate_kinds.yaml",
            "decision_kinds.yaml",
            "hidden_states.yaml",
        ),
        *(f"selector/{s}.yaml" for s in ("collect", "train", "calibrate", "evaluate", "coverage")),
    }
