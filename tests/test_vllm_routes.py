"""Routes as vLLM returns them, imported: what counts experts finds what it finds in the trace they are of; what learns refuses."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flows import one_line, tiny_flow, train_options
from safetensors.numpy import save_file

from lynx_learn import cli
from lynx_learn.errors import LynxError, OptionError, TraceError
from lynx_learn.fit.train import train
from lynx_learn.hardware.simulate import SimulateOptions, simulate
from lynx_learn.integrations.vllm import routes
from lynx_learn.integrations.vllm.collect import read_structure
from lynx_learn.integrations.vllm.routes import ImportRoutesOptions, import_routes
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.moe.loading import reference_moe
from lynx_learn.offload.replay import ReplayOptions, replay
from lynx_learn.traces.collect import record
from lynx_learn.traces.format import Trace

DEVICES = Path(__file__).parents[1] / "data" / "hardware" / "devices-8.yaml"


def requests(trace: Trace) -> list[Any]:
    """Of each sequence the experts `(tokens, layers, top_k)`, in vLLM's type."""
    layers = range(len(trace.options.layers))
    routed = torch.stack([torch.cat([p["indices"] for p in trace.layer_shards(i)]) for i in layers], dim=1)
    sequence = trace.index()["sequence"]
    return [routed[sequence == number].numpy().astype(np.uint8) for number in sequence.unique()]


def imported(folder: Path, arrays: list[Any]) -> Trace:
    np.savez(folder / "routes.npz", *arrays)
    return import_routes(asked(folder, folder / "routes.npz"))


def asked(folder: Path, file: Path) -> ImportRoutesOptions:
    return ImportRoutesOptions(str(file), str(tiny_flow().model), str(folder / "trace"))


def test_what_counts_experts_finds_the_same(tmp_path: Path) -> None:
    """In fast memory, on devices: but for what needs hidden states."""
    whole = Trace.open(tiny_flow().trace)
    arrays = requests(whole)
    trace = imported(tmp_path, arrays)
    assert trace.collected_tokens == whole.collected_tokens
    assert trace.options.layers == whole.options.layers
    assert trace.options.expert_bytes == whole.options.expert_bytes
    assert torch.equal(trace.assigned(), whole.assigned())
    options = ReplayOptions(str(whole.folder), [0.5], [2, 4], 40)
    ours, theirs = (replay(replace(options, trace=str(one.folder))) for one in (trace, whole))
    assert ours["hits"] == theirs["hits"]
    assert ours["foreseen"] == [row for row in theirs["foreseen"] if row["predictor"] != "learned"] != []
    simulated = SimulateOptions(str(DEVICES), str(whole.folder), batch_sizes=[4], steps=20)
    ours, theirs = (simulate(replace(simulated, trace=str(one.folder))) for one in (trace, whole))
    assert ours["rows"] == theirs["rows"] != []


def test_shards_and_requests_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "REQUESTS_PER_SHARD", 2)
    arrays = [array[:length] for array, length in zip(requests(Trace.open(tiny_flow().trace)), (5, 1, 7), strict=False)]
    trace = imported(tmp_path, arrays)
    index = trace.index()
    assert trace.shards == 2
    assert index["sequence"].tolist() == [0] * 5 + [1] + [2] * 7
    assert index["position"].tolist() == [*range(5), 0, *range(7)]
    assert trace.phases == {"unknown": 13}
    found = torch.stack(
        [torch.cat([p["indices"] for p in trace.layer_shards(i, ("indices",))]) for i in range(2)], dim=1
    )
    assert np.array_equal(found.numpy(), np.concatenate(arrays))


SAVED: dict[str, Callable[[Path, list[Any]], None]] = {
    "npz": lambda path, arrays: np.savez(path, *arrays),
    "compressed.npz": lambda path, arrays: np.savez_compressed(path, *arrays),
    "safetensors": lambda path, arrays: save_file({f"{i:03d}": array for i, array in enumerate(arrays)}, path),
}


@pytest.mark.parametrize("kind", [*SAVED, "folder"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_files_of_any_kind(kind: str, dtype: Any, tmp_path: Path) -> None:
    arrays = [array.astype(dtype) for array in requests(Trace.open(tiny_flow().trace))[:3]]
    file = tmp_path / f"routes.{kind}"
    if kind == "folder":
        file.mkdir()
        for number, array in enumerate(arrays):
            np.save(file / f"{number}.npy", array)
    else:
        SAVED[kind](file, arrays)
    trace = import_routes(asked(tmp_path, file))
    found = torch.cat([part["indices"] for part in trace.layer_shards(1, ("indices",))])
    assert np.array_equal(found.numpy(), np.concatenate(arrays)[:, 1])


def test_decoder_layers_without_experts_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's arrays have rows for all layers: here the second and the fourth of four are those with experts."""
    found = read_structure("tiny", str(tiny_flow().model))
    found.config.num_hidden_layers = 4
    deeper = found._replace(blocks=("model.layers.1.mlp", "model.layers.3.mlp"))
    monkeypatch.setattr(routes, "read_structure", lambda *_: deeper)
    arrays = requests(Trace.open(tiny_flow().trace))[:2]
    padded = [np.zeros((len(array), 4, array.shape[2]), np.uint8) for array in arrays]
    for wide, array in zip(padded, arrays, strict=True):
        wide[:, [1, 3]] = array
    trace = imported(tmp_path, padded)
    for layer in range(2):
        found = torch.cat([part["indices"] for part in trace.layer_shards(layer, ("indices",))])
        assert np.array_equal(found.numpy(), np.concatenate(arrays)[:, layer])


def test_what_learns_refuses_it_by_name(tmp_path: Path) -> None:
    trace = imported(tmp_path, requests(Trace.open(tiny_flow().trace)))
    flow = tiny_flow()._replace(trace=trace.folder)
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: train(train_options(flow, tmp_path / "selector")), "holds imported routes alone"),
        (
            lambda: simulate(SimulateOptions(str(DEVICES), str(trace.folder), selector=str(tiny_flow().selector))),
            "holds imported routes alone",
        ),
        (
            lambda: replay(ReplayOptions(str(trace.folder), predictors=str(tmp_path / "p"))),
            "--predictors is not usable",
        ),
    ]
    for refused, reason in refusals:
        with pytest.raises(LynxError, match=reason) as error:
            refused()
        one_line(error)
    assert not (tmp_path / "selector").exists()
    assert not (tmp_path / "p").exists()


def pickled() -> bytes:
    data = io.BytesIO()
    np.save(data, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return data.getvalue()


ONE = np.zeros((3, 2, 2), np.uint8) + np.array([1, 4], np.uint8)
REFUSED: dict[str, tuple[Any, str]] = {
    "another shape": (ONE[:, :1], r"has the shape \(3, 1, 2\): expected \(tokens, 2, top-k\)"),
    "no tokens": (ONE[:0], "has the shape"),
    "flat": (ONE[0], "has the shape"),
    "floats": (ONE.astype(np.float32), "holds float32: expected whole numbers"),
    "no expert": (ONE + np.uint8(4), "experts outside 0 to 7"),
    "negative": (ONE.astype(np.int32) - 2, "experts outside 0 to 7"),
    "padding": (np.concatenate([ONE, np.zeros((1, 2, 2), np.uint8)]), "one expert twice"),
    "pickle": (pickled(), "cannot be read .* without pickle"),
    "no array": (b"text", "cannot be read"),
    "cut": (pickled()[:40], "cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_route_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    given, reason = REFUSED[case]
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "0.npy", ONE)
    file = tmp_path / "in" / "1.npy"
    file.write_bytes(given) if isinstance(given, bytes) else np.save(file, given)
    with pytest.raises(TraceError, match=reason) as error:
        import_routes(asked(tmp_path, tmp_path / "in"))
    assert str(file) in one_line(error)
    assert not (tmp_path / "trace").exists()


def test_requests_of_two_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="requests of several top-k"):
        imported(tmp_path, [ONE, ONE[..., :1]])
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["nowhere.npz", "empty", "notes.txt"])
def test_no_file_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TraceError, match=r"expected a \.npy") as error:
        import_routes(asked(tmp_path, tmp_path / name))
    assert name in one_line(error)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "mine").write_text("mine")
    with pytest.raises(OptionError, match="not empty"):
        imported(tmp_path, [ONE])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = requests(Trace.open(tiny_flow().trace))
    np.savez(tmp_path / "r.npz", *arrays)
    words = ["--files", str(tmp_path / "r.npz"), "--model", str(tiny_flow().model), "--out", str(tmp_path / "t")]
    assert cli.main(["import-routes", *words]) == 0
    assert f"{sum(map(len, arrays)):,} tokens, routes alone" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["replay", "--trace", str(tmp_path / "t"), "--batch-sizes", "2", "--steps", "20"]) == 0
    assert "popularity" in capsys.readouterr().out


CAPTURE = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
import numpy as np
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsCapturer, bind_routed_experts_capturer

def bind(worker):
    worker.capturer = RoutedExpertsCapturer(256, worker.vllm_config)
    bind_routed_experts_capturer(worker.model_runner.model, worker.capturer)

model, rows, out = json.loads(sys.argv[1])
engine = LLM(model, dtype="float32", max_model_len=64, enforce_eager=True, kv_cache_memory_bytes=50_000_000, block_size=32)
engine.collective_rpc(bind)
found = []
for row in rows:
    engine.generate({"prompt_token_ids": row}, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    found.append(engine.collective_rpc(lambda worker: worker.capturer.snapshot_routing_data(len(row)).numpy().copy())[0])
np.savez(out, *found)
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_what_vllm_captures_is_what_transformers_routes(tmp_path: Path) -> None:
    """By vLLM's own capturer, bound to the layers of an engine: the connector that returns it needs another model runner."""
    pytest.importorskip("vllm", reason="needs an environment with vLLM: .ci/vllm makes one")
    from transformers import AutoModelForCausalLM
    from vllm_cases import environment

    rows = torch.randint(5, 4000, (3, 40), generator=torch.Generator().manual_seed(0))
    words = json.dumps([str(reference_moe()), rows.tolist(), str(tmp_path / "routes.npz")])
    command = [sys.executable, "-c", CAPTURE, words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    trace = import_routes(ImportRoutesOptions(str(tmp_path / "routes.npz"), "reference-moe", str(tmp_path / "trace")))
    assert trace.collected_tokens == rows.numel()
    model = AutoModelForCausalLM.from_pretrained(reference_moe(), dtype=torch.float32).eval()
    layers = find_moe_layers(model)
    for layer, wanted in zip(layers, record(model, layers, rows), strict=True):
        found = torch.cat([part["indices"] for part in trace.layer_shards(layer.index, ("indices",))])
        same = (found.sort(-1).values == wanted["indices"].long().sort(-1).values).all(-1)
        assert float(same.float().mean()) > 0.99  # near ties
