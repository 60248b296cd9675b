"""Traces: what is written comes back, and whatever is damaged, missing or foreign is refused by name."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lynx_learn.errors import OptionError, TraceError
from lynx_learn.traces.format import INDEX_TENSORS, LAYER_TENSORS, Trace, TraceOptions, TraceWriter

SHARDS, ROWS, LENGTH, SOURCES = 3, 2, 8, ["code", "prose"]
OPTIONS = TraceOptions(
    model="some/model",
    revision="local",
    model_type="tiny_moe",
    identity={"routers": [{"weight": [1.0] * 9}] * 2},
    layers=("model.layers.1.mlp", "model.layers.2.mlp"),
    num_experts=6,
    top_k=2,
    hidden_size=16,
    expert_bytes=1000,
    dtype="float32",
    corpus="python-stdlib",
    split="fit",
    mode="teacher",
    tokens=SHARDS * ROWS * LENGTH,
    length=LENGTH,
    prompt=0,
    bos="auto",
    sequences_per_shard=ROWS,
    seed=0,
)
Content = tuple[list[list[dict[str, Tensor]]], list[dict[str, Tensor]]]


def content(options: TraceOptions, seed: int = 0) -> Content:
    """Random tensors: per shard those of each layer, and the index."""
    torch.manual_seed(seed)
    tokens = ROWS * LENGTH
    layers = [
        [
            {
                "hidden": torch.randn(tokens, options.hidden_size).to(getattr(torch, options.dtype)),
                "logits": torch.randn(tokens, options.num_experts),
                "indices": torch.rand(tokens, options.num_experts).topk(options.top_k).indices.short(),
                "weights": torch.rand(tokens, options.top_k),
            }
            for _ in options.layers
        ]
        for _ in range(SHARDS)
    ]
    index = [
        {
            "tokens": torch.randint(0, 2**31 - 1, (tokens,), dtype=torch.int32),
            "sequence": torch.arange(shard * ROWS, (shard + 1) * ROWS, dtype=torch.int32).repeat_interleave(LENGTH),
            "position": torch.arange(LENGTH, dtype=torch.int32).repeat(ROWS),
            "phase": torch.full((tokens,), 2, dtype=torch.uint8),
            "source": torch.randint(0, 2, (tokens,), dtype=torch.int16),
        }
        for shard in range(SHARDS)
    ]
    return layers, index


def write(folder: Path, options: TraceOptions = OPTIONS, given: Content | None = None) -> Content:
    layers, index = given or content(options)
    writer = TraceWriter(folder, options)
    for shard in range(SHARDS):
        writer.write(shard, layers[shard], index[shard])
    writer.finish(SHARDS, SOURCES, {"teacher": SHARDS * ROWS * LENGTH})
    return layers, index


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    write(tmp_path / "trace")
    return tmp_path / "trace"


def files(folder: Path) -> list[str]:
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


def refusal(folder: Path, read: bool = False) -> str:
    """The one line that opening the trace, and with `read` reading all of it, is refused with."""

    def use() -> None:
        opened = Trace.open(folder)
        for layer in range(len(opened.options.layers) if read else 0):
            list(opened.layer_shards(layer))

    with pytest.raises(TraceError) as error:
        use()
    message = str(error.value)
    assert message
    assert "\n" not in message
    assert str(folder) in message
    return message


SHARD_FILES = [
    f"{part}/{shard:05d}.safetensors" for part in ("layer-00", "layer-01", "index") for shard in range(SHARDS)
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(dtype: str, tmp_path: Path) -> None:
    options = replace(OPTIONS, dtype=dtype)
    layers, index = write(tmp_path / "deep" / "trace", options)
    opened = Trace.open(str(tmp_path / "deep" / "trace"))
    assert opened.options == options
    assert (opened.shards, opened.sources) == (SHARDS, SOURCES)
    assert opened.phases == {"teacher": 48}
    assert opened.collected_tokens == 48
    for layer in range(2):
        shards = list(opened.layer_shards(layer))
        assert len(shards) == SHARDS
        for shard, tensors in enumerate(shards):
            assert set(tensors) == set(LAYER_TENSORS)
            for key, wanted in layers[shard][layer].items():
                assert torch.equal(tensors[key], wanted.long() if key == "indices" else wanted)
                assert tensors[key].dtype == (torch.int64 if key == "indices" else wanted.dtype)
    read = opened.index()
    assert set(read) == set(INDEX_TENSORS)
    assert all(torch.equal(read[key], torch.cat([part[key] for part in index]).long()) for key in INDEX_TENSORS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_announced_size_is_the_size_of_the_tensors(dtype: str, tmp_path: Path) -> None:
    options = replace(OPTIONS, dtype=dtype)
    write(tmp_path / "trace", options)
    tensors = 0
    for file in (tmp_path / "trace").rglob("*.safetensors"):
        data = file.read_bytes()
        tensors += len(data) - 8 - int.from_bytes(data[:8], "little")
    assert tensors == SHARDS * ROWS * LENGTH * options.bytes_per_token


def test_the_folder_holds_what_the_format_says(trace: Path) -> None:
    assert files(trace) == sorted(["manifest.json", "options.json", *SHARD_FILES])
    manifest = json.loads((trace / "manifest.json").read_text())
    assert manifest["format_version"] == 2
    assert sorted(manifest["sha256"]) == sorted(SHARD_FILES)
    assert {f.name for f in fields(TraceOptions)} <= manifest.keys()


@pytest.fixture(scope="module")
def shared_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "trace"
    write(folder)
    return folder


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(SHARD_FILES), where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_one_flipped_byte_is_found(shared_trace: Path, name: str, where: float, flip: int) -> None:
    file = shared_trace / name
    whole = file.read_bytes()
    at = int(where * len(whole))
    file.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    try:
        assert f"{file} is damaged" in refusal(shared_trace)
    finally:
        file.write_bytes(whole)
    Trace.open(shared_trace)


def test_datasets_streams_a_trace_as_the_page_says(trace: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?IterableDataset.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace('"my/trace"', repr(str(trace))), names)
    rows = list(names["data"].with_format("torch"))
    opened = Trace.open(trace)
    assert len(rows) == opened.collected_tokens
    for key in LAYER_TENSORS:
        wanted = torch.cat([shard[key] for shard in opened.layer_shards(0)]).float()
        torch.testing.assert_close(torch.stack([row[key] for row in rows]).float(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", [SHARD_FILES[0], SHARD_FILES[4], SHARD_FILES[-1]])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_shard_is_found(name: str, share: float, trace: Path) -> None:
    data = (trace / name).read_bytes()
    (trace / name).write_bytes(data[: int(share * len(data))])
    assert f"{trace / name} is damaged" in refusal(trace)


@pytest.mark.parametrize("name", SHARD_FILES)
def test_a_missing_shard_is_found(name: str, trace: Path) -> None:
    (trace / name).unlink()
    assert f"{trace / name} is missing" in refusal(trace)


def test_a_shard_damaged_after_opening_is_named(trace: Path) -> None:
    opened = Trace.open(trace)
    (trace / "layer-01" / "00001.safetensors").write_bytes(b"x" * 40)
    (trace / "index" / "00002.safetensors").unlink()
    assert len(list(opened.layer_shards(0))) == SHARDS
    with pytest.raises(TraceError, match=r"layer-01/00001\.safetensors cannot be read"):
        list(opened.layer_shards(1))
    with pytest.raises(TraceError, match=r"index/00002\.safetensors cannot be read"):
        opened.index()


@pytest.mark.parametrize("key", ["hidden", "logits", "weights"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(key: str, value: float, tmp_path: Path) -> None:
    given = content(OPTIONS)
    given[0][1][1][key][5, 1] = value
    write(tmp_path / "trace", given=given)
    message = refusal(tmp_path / "trace", read=True)
    assert "layer-01/00001.safetensors" in message
    assert key in message
    assert "not finite" in message


@pytest.mark.parametrize("index", [-1, OPTIONS.num_experts, 32767])
def test_an_index_that_is_no_expert_is_refused(index: int, tmp_path: Path) -> None:
    given = content(OPTIONS)
    given[0][2][0]["indices"][0, 1] = index
    write(tmp_path / "trace", given=given)
    message = refusal(tmp_path / "trace", read=True)
    assert "layer-00/00002.safetensors" in message
    assert "0 to 5" in message


def _without(key: str) -> Callable[[dict[str, object]], object]:
    return lambda manifest: {k: v for k, v in manifest.items() if k != key}


DAMAGE: dict[str, Callable[[dict[str, object]], object]] = {
    "a list": lambda m: [m],
    "null": lambda m: None,
    "empty": lambda m: {},
    "no shards": _without("shards"),
    "no checksums": _without("sha256"),
    "no model": _without("model"),
    "an unknown key": lambda m: {**m, "surprise": 1},
    "shards no number": lambda m: {**m, "shards": "many"},
    "tokens without end": lambda m: {**m, "collected_tokens": math.inf},
    "shards without end": lambda m: {**m, "shards": math.inf},
    "more shards than files": lambda m: {**m, "shards": SHARDS + 1},
    "fewer shards than files": lambda m: {**m, "shards": SHARDS - 1},
    "another layer": lambda m: {**m, "layers": ["a", "b", "c"]},
    "checksums a list": lambda m: {**m, "sha256": ["x"]},
    "one checksum gone": lambda m: {**m, "sha256": dict(list(m["sha256"].items())[1:])},  # type: ignore[attr-defined]
    "a checksum null": lambda m: {**m, "sha256": {**m["sha256"], "index/00000.safetensors": None}},  # type: ignore[dict-item]
    "layers null": lambda m: {**m, "layers": None},
    "a number null": lambda m: {**m, "num_experts": None},
    "a number true": lambda m: {**m, "top_k": True},
    "a name a number": lambda m: {**m, "model": 1},
    "a layer's name a number": lambda m: {**m, "layers": [0, *m["layers"][1:]]},  # type: ignore[index]
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_manifest_is_refused(change: Callable[[dict[str, object]], object], trace: Path) -> None:
    manifest = trace / "manifest.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    refusal(trace)


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0, 0.999))
def test_a_truncated_manifest_is_refused(shared_trace: Path, share: float) -> None:
    manifest = shared_trace / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[: int(share * (len(whole) - 2))])
    try:
        assert str(manifest) in refusal(shared_trace)
    finally:
        manifest.write_bytes(whole)


@pytest.mark.parametrize(
    "data", [b"\xff\xfe\x00", b"[" * 100_000, b"{}\n{}\n"], ids=["no text", "too deep", "two objects"]
)
def test_a_manifest_that_is_no_json_is_refused(data: bytes, trace: Path) -> None:
    (trace / "manifest.json").write_bytes(data)
    assert "manifest.json is damaged" in refusal(trace)


@pytest.mark.parametrize("version", [1, 3, "2", None])
def test_another_format_version_is_refused(version: object, trace: Path) -> None:
    manifest = json.loads((trace / "manifest.json").read_text())
    (trace / "manifest.json").write_text(json.dumps({**manifest, "format_version": version}))
    message = refusal(trace)
    assert f"format {version}" in message
    assert "reads 2" in message


def test_an_incomplete_trace_and_no_trace_are_told_apart(trace: Path, tmp_path: Path) -> None:
    (trace / "manifest.json").unlink()
    assert "is not complete" in refusal(trace)
    (tmp_path / "empty").mkdir()
    assert "holds no trace" in refusal(tmp_path / "empty")
    assert "holds no trace" in refusal(tmp_path / "nowhere")


# Writing.


def test_the_same_content_gives_the_same_bytes(trace: Path, tmp_path: Path) -> None:
    write(tmp_path / "again")
    assert files(trace) == files(tmp_path / "again")
    assert all((trace / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files(trace))


def changed(name: str) -> TraceOptions:
    value = getattr(OPTIONS, name)
    other: Any = (
        ("other",)
        if isinstance(value, tuple)
        else {}
        if isinstance(value, dict)
        else value + 1
        if isinstance(value, int)
        else value + "x"
    )
    return replace(OPTIONS, **{name: other})


@pytest.mark.parametrize("name", [f.name for f in fields(TraceOptions)])
def test_a_trace_with_any_other_option_is_left_alone(name: str, shared_trace: Path) -> None:
    before = {file: (shared_trace / file).read_bytes() for file in files(shared_trace)}
    with pytest.raises(OptionError, match="holds a trace with other ") as error:
        TraceWriter(shared_trace, changed(name))
    assert str(shared_trace) in str(error.value)
    assert "\n" not in str(error.value)
    assert {file: (shared_trace / file).read_bytes() for file in files(shared_trace)} == before


def test_foreign_folders_and_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    (tmp_path / "file").write_text("also")
    for name in ("mine", "file"):
        with pytest.raises(OptionError, match=f"{name} .*choose another ") as error:
            TraceWriter(tmp_path / name, OPTIONS)
        assert "\n" not in str(error.value)
    assert files(tmp_path) == ["file", "mine/thesis.txt"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "irreplaceable"


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]"])
def test_a_damaged_options_file_is_refused(data: bytes, trace: Path) -> None:
    (trace / "options.json").write_bytes(data)
    with pytest.raises(OptionError, match=r"trace .*--out") as error:
        TraceWriter(trace, OPTIONS)
    assert "\n" not in str(error.value)


def test_a_run_killed_while_writing_its_first_file_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    folder.mkdir()
    (folder / ".options.json.part").write_text('{"mod')
    write(folder)
    assert Trace.open(folder).shards == SHARDS
    assert ".options.json.part" not in files(folder)


def test_a_trace_on_a_full_disk_goes_on_when_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, hidden_size=512)
    given = content(options)
    (small_disk / "hog").write_bytes(bytes(100_000))
    with pytest.raises(OptionError) as error:
        write(small_disk / "trace", options, given)
    message = str(error.value)
    assert str(small_disk / "trace") in message
    assert "No space left on device" in message
    assert "\n" not in message
    assert not [name for name in files(small_disk) if name.endswith(".part")]
    assert "is not complete" in refusal(small_disk / "trace")
    (small_disk / "hog").unlink()
    write(small_disk / "trace", options, given)
    write(tmp_path / "trace", options, given)
    assert files(small_disk / "trace") == files(tmp_path / "trace")
    for name in files(tmp_path / "trace"):
        assert (small_disk / "trace" / name).read_bytes() == (tmp_path / "trace" / name).read_bytes()
