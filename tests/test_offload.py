"""Experts that are read from disk: the same outputs, what is read and kept, and what is refused."""

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ALL_COMPLETED, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flows import tiny_flow
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EXPERTS, TOP_K, build, decode, random_selector, tiny_model, watching, words
from torch import Tensor
from transformers import AutoModelForCausalLM

from lynx_learn.decode.runtime import skip_experts
from lynx_learn.errors import LynxError, ModelError, OptionError, SelectorError
from lynx_learn.files import checksum
from lynx_learn.moe.families import find_moe_layers
from lynx_learn.offload.loading import load_without_experts
from lynx_learn.offload.offload import Offloading, offload_experts
from lynx_learn.offload.predict import PREDICTORS
from lynx_learn.offload.replay import ReplayOptions, replay
from lynx_learn.offload.slots import LeastExpected, LeastRecent, Slots
from lynx_learn.selector.prices import RESIDENT, Recent, Residency

# Experts as wide as whole vectors: the last numbers of a sum of other length are computed by another instruction.
WIDTH = 64
# With experts in the Hub's layout, one tensor each; stacked and transposed, with biases.
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: build("Qwen3Moe", num_experts=EXPERTS, moe_intermediate_size=WIDTH, head_dim=16),
    "mixtral": lambda: build("Mixtral", num_local_experts=EXPERTS, intermediate_size=WIDTH),
    "gpt_oss": lambda: build("GptOss", num_local_experts=EXPERTS, intermediate_size=WIDTH, head_dim=16),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny model."""
    made: dict[Any, Path] = {}

    def save(name: str, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
        key = (name, dtype, *how.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            MODELS[name]().to(dtype).save_pretrained(made[key], **how)
        return made[key]

    return save


@pytest.fixture
def folder(saved: Callable[..., Path]) -> Path:
    return saved("qwen3_moe")


def whole(folder: Path, dtype: str = "float32") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """Logits of prompts and of a cached decode."""
    return torch.cat(decode(model, words(5, 9), 4), dim=1)


@pytest.mark.parametrize("slots", [TOP_K, 5, 9, 100])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_untouched_model(name: str, slots: int, saved: Callable[..., Path]) -> None:
    folder = saved(name)
    model, checkpoint = opened(folder)
    probe = Offloading(model, checkpoint, 1.0)
    with offload_experts(str(folder), slots * probe.slot_bytes, dtype="float32") as offloaded:
        assert torch.equal(outputs(offloaded.model), outputs(whole(folder)))
        assert offloaded.slots.count == min(slots, EXPERTS * len(offloaded.layers))
        stats = offloaded.stats
        expert = sum(p.numel() * p.itemsize for p in whole(folder).model.layers[-1].mlp.experts.parameters()) // EXPERTS
        assert stats.bytes_read == (stats.wanted - stats.hits) * expert
        assert (stats.hits > 0.7 * stats.wanted) == (slots == 100)


def opened(folder: Path) -> Any:
    loaded, checkpoint = load_without_experts(str(folder), "cpu", "float32", tokenizer=False)
    return loaded.model, checkpoint


@pytest.mark.parametrize("name", MODELS)
def test_experts_may_lie_in_the_hosts_memory(name: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    """As for a GPU, and with a CPU in its place: all are read when it is attached, and no file any more after that."""
    shutil.copytree(saved(name), tmp_path / "model")
    with offload_experts(str(tmp_path / "model"), 0.3, dtype="float32", slow_memory="host") as offloaded:
        for file in (tmp_path / "model").glob("*.safetensors"):
            file.unlink()
        offloaded.memory.disk.close()
        assert torch.equal(outputs(offloaded.model), outputs(whole(saved(name))))
        stats = offloaded.stats
        assert 0 < stats.hits < stats.wanted
        assert stats.bytes_read == (stats.wanted - stats.hits) * offloaded.memory.views[0].stored_bytes
        assert offloaded.memory.copies is not None
    assert offloaded.memory.copies is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_fast_memory_is_the_gpus(name: str, saved: Callable[..., Path]) -> None:
    folder, model = saved(name), whole(saved(name)).cuda()
    tokens = words(5, 9).cuda()
    with torch.no_grad(), offload_experts(str(folder), 0.3, dtype="float32", device="cuda") as offloaded:
        wanted, given = (torch.cat(decode(own, tokens, 4), dim=1) for own in (model, offloaded.model))
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)
        assert offloaded.memory.room.is_cuda
        assert offloaded.memory.copies is not None
        assert offloaded.memory.copies.room.is_pinned()
        assert 0 < offloaded.stats.hits < offloaded.stats.wanted
        with skip_experts(
            offloaded.model, random_selector(model).at_threshold(1.0, prices=RESIDENT[offloaded.layers[0].experts])
        ):
            decode(offloaded.model, tokens, 4)
    with pytest.raises(ModelError, match="not from disk"):
        offload_experts(str(folder), 0.3, device="cuda", slow_memory="disk")


@pytest.mark.parametrize("how", [{"max_shard_size": "20KB"}, {"save_original_format": False}], ids=str)
def test_checkpoints_in_pieces_or_stacked(how: dict[str, Any], saved: Callable[..., Path]) -> None:
    folder = saved("qwen3_moe", **how)
    with offload_experts(str(folder), 0.3, dtype="float32") as offloaded:
        assert torch.equal(outputs(offloaded.model), outputs(whole(folder)))


def test_another_precision_than_the_checkpoint_s(saved: Callable[..., Path]) -> None:
    folder = saved("qwen3_moe", torch.bfloat16)
    with offload_experts(str(folder), 0.3, dtype="float32") as offloaded:
        assert torch.equal(outputs(offloaded.model), outputs(whole(folder)))
        assert offloaded.stats.bytes_read == (offloaded.stats.wanted - offloaded.stats.hits) * offloaded.slot_bytes // 2


def test_no_expert_is_loaded_with_the_rest(folder: Path) -> None:
    model, _ = opened(folder)
    layers = find_moe_layers(model)
    experts = {id(p) for layer in layers for p in layer.experts.parameters()}
    assert all(p.is_meta == (id(p) in experts) for p in model.parameters())
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())
    reference = whole(folder)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert value.is_meta or torch.equal(value, reference.get_parameter_or_buffer(name)), name
    assert model.generation_config.eos_token_id == reference.generation_config.eos_token_id


def test_a_loaded_model_is_afterwards_what_it_was(folder: Path) -> None:
    model = whole(folder)
    wanted, before = outputs(model), {name: id(p) for name, p in model.named_parameters()}
    with offload_experts(model, 0.5) as offloaded:
        assert all(p.is_meta for layer in offloaded.layers for p in layer.experts.parameters())
        assert torch.equal(outputs(model), wanted)
        with pytest.raises(ModelError, match="offloaded already"):
            offload_experts(model, 0.5).attach()
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert torch.equal(outputs(model), wanted)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model))), wanted)
    with offload_experts(model, 0.5):  # and again
        assert torch.equal(outputs(model), wanted)


def test_slots_hold_what_the_simulation_says(folder: Path) -> None:
    """`prices.Residency` is what calibration measures with."""
    share = 0.4
    with offload_experts(str(folder), share, dtype="float32") as offloaded:
        layers = offloaded.layers
        recents = [
            Recent(EXPERTS, offloaded.slots.share(layer.index).stop - offloaded.slots.share(layer.index).start)
            for layer in layers
        ]
        assert {recent.slots for recent in recents} == {int(share * EXPERTS)}
        with watching(layers) as watch:
            for step in range(12):
                with torch.no_grad():
                    offloaded.model(input_ids=words(3, 2, seed=step))
                for recent, layer, seen in zip(recents, layers, watch.records[-len(layers) :], strict=True):
                    mask = np.zeros(EXPERTS, np.bool_)
                    mask[list(seen.loaded)] = True
                    recent.use(mask)
                    assert offloaded.slots.held(layer.index).tolist() == recent.held.tolist()


def test_what_is_skipped_is_not_read(folder: Path) -> None:
    model = whole(folder)
    selector = random_selector(model, thresholds={"kl": {"0.1": {"1": 0.6}}})
    priced = selector.with_config(calibration={"kl": {"prices": Residency(0.5).describe()}})
    read, ran = {}, {}
    with skip_experts(model, selector, budget=0.1):
        wanted = outputs(model)
    with offload_experts(str(folder), 0.5, dtype="float32") as offloaded:

        def run(**how: Any) -> float:
            offloaded.reset()
            with skip_experts(offloaded.model, how.pop("own"), budget=0.1, **how) as skipping:
                found = outputs(offloaded.model)
            if "prices" not in how:
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            ran[how.get("prices", "uniform")] = sum(skipping.stats.experts_after)
            assert offloaded.stats.wanted >= sum(skipping.stats.experts_after) * skipping.stats.steps
            return offloaded.stats.bytes_read / offloaded.slot_bytes

        outputs(offloaded.model)
        read["untouched"] = offloaded.stats.bytes_read / offloaded.slot_bytes
        read["uniform"] = run(own=selector)
        read["residency"] = run(own=priced, prices="residency")
        with pytest.raises(SelectorError, match="calibrated with prices uniform, not residency"):
            run(own=selector, prices="residency")
    assert max(read["residency"], read["uniform"]) < read["untouched"]
    assert ran["residency"] > ran["uniform"]  # at one threshold: what lies there is left out no more


def test_what_was_attached_later_is_detached_first(folder: Path) -> None:
    model = whole(folder)
    wanted = outputs(model)
    offloaded = offload_experts(model, 0.5).attach()
    with (
        skip_experts(model, random_selector(model).at_threshold(0.6)),
        pytest.raises(ModelError, match="detach that first"),
    ):
        offloaded.detach()
    offloaded.detach()
    assert torch.equal(outputs(model), wanted)


def test_less_fast_memory_than_calibrated_with_is_refused(folder: Path) -> None:
    with offload_experts(str(folder), 0.3, dtype="float32") as offloaded:
        selector = random_selector(whole(folder), thresholds={"kl": {"0.1": {"1": 0.6}}}).with_config(
            calibration={"kl": {"prices": Residency(0.5).describe()}}
        )
        with pytest.raises(SelectorError, match=r"calibrated with prices residency:0\.5, not residency:0\.25"):
            skip_experts(offloaded.model, selector, budget=0.1, prices="residency")


# Reading ahead.


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny flow's model."""
    folder = tmp_path_factory.mktemp("predictors")
    replay(ReplayOptions(str(tiny_flow().trace), [0.5], [2], 10, predictors=str(folder)))
    return folder


@pytest.mark.parametrize("share", [0.25, 0.6])
@pytest.mark.parametrize("prefetch", PREDICTORS)
def test_what_is_read_ahead_changes_no_output(prefetch: str, share: float, predictors: Path) -> None:
    name = str(tiny_flow().model)
    tokens = words(3, 12) % 30
    with offload_experts(name, share, dtype="float32") as plain:
        wanted = decode(plain.model, tokens, 4)
        without = plain.stats
    ahead = offload_experts(name, share, dtype="float32", prefetch=prefetch, predictors=str(predictors))
    with ahead as offloaded:
        found = decode(offloaded.model, tokens, 4)
        check_held(offloaded, Path(name))
        stats, size = offloaded.stats, offloaded.memory.views[0].stored_bytes
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert stats.wanted == without.wanted
    assert 0 < stats.prefetched_bytes <= stats.bytes_read
    assert 0 <= stats.unused_bytes <= stats.prefetched_bytes
    assert stats.bytes_read % size == stats.unused_bytes % size == 0
    # What was needed was there, arrived in time, or was read when it was asked for.
    assert stats.bytes_read - stats.unused_bytes >= (stats.wanted - stats.hits) * size


def test_what_is_read_ahead_is_there_when_the_gate_fires(predictors: Path) -> None:
    """Where the disk is fast enough, foreseen experts are hits, and nothing that the layer still needs has gone."""
    name, hits = str(tiny_flow().model), {}
    for prefetch in (None, "learned"):
        how: dict[str, Any] = {} if prefetch is None else {"prefetch": prefetch, "predictors": str(predictors)}
        with offload_experts(name, 0.5, dtype="float32", **how) as offloaded:
            offloaded.layers[1].router.register_forward_hook(
                lambda *_: wait(list(offloaded.memory.ahead), return_when=ALL_COMPLETED) and None
            )
            decode(offloaded.model, words(2, 24) % 30, 4)
            hits[prefetch] = offloaded.stats.hits
            assert prefetch is None or offloaded.stats.unused_bytes < offloaded.stats.prefetched_bytes
    assert hits["learned"] > hits[None]


def test_a_read_ahead_that_fails_is_tried_again(predictors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, tokens = str(tiny_flow().model), words(3, 12) % 30
    how: dict[str, Any] = {"prefetch": "learned", "predictors": str(predictors)}
    with offload_experts(name, 0.4, dtype="float32", **how) as offloaded:
        wanted = decode(offloaded.model, tokens, 4)
        read_ahead, pool = offloaded.memory._read_ahead, offloaded.memory.pool
        submit = pool.submit

        def failing(index: int, experts: list[int]) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(pool, "submit", lambda *_: submit(next, iter(())))
                read_ahead(index, experts)
                wait(list(offloaded.memory.ahead))

        monkeypatch.setattr(offloaded.memory, "_read_ahead", failing)
        found = decode(offloaded.model, tokens, 4)
        check_held(offloaded, Path(name))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("prefetch", PREDICTORS)
def test_a_read_ahead_may_take_longer_than_a_step(
    prefetch: str, predictors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one step foresaw in vain and the next one needs is not used before it has arrived."""
    name, tokens, late = str(tiny_flow().model), words(1, 40) % 30, 0
    arriving: dict[Any, threading.Event] = {}

    def slow(may: threading.Event, read: Callable[..., None], disk: Any, expert: int, slot: Tensor) -> None:
        slot.fill_(255)  # in float32 no number
        may.wait()
        read(disk, expert, slot)

    def waiting(futures: Any, **how: Any) -> Any:
        for future in futures:
            arriving.get(future, threading.Event()).set()
        return wait(futures, **how)

    how: dict[str, Any] = {"prefetch": prefetch, "predictors": str(predictors), "readers": 64}
    with offload_experts(name, 0.8, dtype="float32") as plain:
        wanted = decode(plain.model, tokens, 4)
    with offload_experts(name, 0.8, dtype="float32", **how) as offloaded:
        memory = offloaded.memory
        read_ahead, pool = memory._read_ahead, memory.pool
        submit = pool.submit

        def submitted(*args: Any) -> Any:
            may = threading.Event()
            future = submit(slow, may, *args)
            arriving[future] = may
            return future

        def slowly(index: int, experts: list[int]) -> None:
            nonlocal late
            late += len(memory.late)
            with monkeypatch.context() as patch:
                patch.setattr(pool, "submit", submitted)
                read_ahead(index, experts)

        monkeypatch.setattr(memory, "_read_ahead", slowly)
        monkeypatch.setattr("lynx_learn.offload.memory.wait", waiting)
        found = decode(offloaded.model, tokens, 4)
        memory.forget_ahead()
        check_held(offloaded, Path(name))
        size, stats = memory.views[0].stored_bytes, memory.stats
    assert late > 0
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert stats.bytes_read - stats.unused_bytes >= (stats.wanted - stats.hits) * size


def test_prices_of_residency_do_not_go_with_prefetch(predictors: Path) -> None:
    name = str(tiny_flow().model)
    with offload_experts(name, 0.5, dtype="float32", prefetch="learned", predictors=str(predictors)) as offloaded:
        selector = random_selector(whole(Path(name))).at_threshold(1.0, prices=RESIDENT[offloaded.layers[0].experts])
        with pytest.raises(OptionError, match="do not go with prefetch"):
            skip_experts(offloaded.model, selector)


def test_predictors_that_cannot_be_used(predictors: Path, folder: Path, tmp_path: Path) -> None:
    name = str(tiny_flow().model)
    with pytest.raises(
        OptionError, match="prefetch 'luck' is unknown: expected one of popularity, correlation, learned"
    ):
        offload_experts(name, 0.5, prefetch="luck", predictors=str(predictors))
    with pytest.raises(OptionError, match="go together"):
        offload_experts(name, 0.5, prefetch="learned")
    with pytest.raises(OptionError, match=r"cannot be read .*replay --predictors"):
        offload_experts(name, 0.5, prefetch="learned", predictors=str(tmp_path))
    with pytest.raises(OptionError, match="are another model's"):
        offload_experts(str(folder), 0.5, prefetch="learned", predictors=str(predictors))


# Slots.


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 1), st.sets(st.integers(0, 5), min_size=1)), max_size=12), st.integers(1, 12))
def test_an_expert_has_one_slot_and_a_slot_one_expert(steps: list[tuple[int, set[int]]], count: int) -> None:
    for rule in (LeastRecent(), LeastExpected(np.arange(12).reshape(2, 6))):
        slots = Slots(count, 2, 6, rule)
        for layer, experts in steps:
            for e in sorted(experts):
                slot = slots.pin(layer, e) if slots.where[layer, e] >= 0 else slots.claim(layer, e)
                assert slot is not None  # nothing else is pinned
                slots.release(slot)
                assert slots.owner[slot].tolist() == [layer, e]
            held = [(la, e, int(s)) for (la, e), s in np.ndenumerate(slots.where) if s >= 0]
            assert len({slot for *_, slot in held}) == len(held) <= count
            assert all(slots.owner[slot].tolist() == [la, e] for la, e, slot in held)


def test_what_is_used_least_often_makes_room() -> None:
    slots = Slots(2, 1, 4, LeastExpected([[0.9, 0.1, 0.5, 0.2]]))
    for e in (0, 1, 2):
        slots.release(slots.claim(0, e))  # type: ignore[arg-type]
    assert slots.held(0).tolist() == [True, False, True, False]
    slots.pin(0, 2)
    slots.release(slots.claim(0, 3))  # type: ignore[arg-type]
    assert slots.held(0).tolist() == [False, False, True, True]


def test_nothing_that_is_pinned_makes_room() -> None:
    for rule in (LeastRecent(), LeastExpected(np.ones((1, 3)))):
        slots = Slots(1, 1, 3, rule)
        assert slots.claim(0, 1) == 0
        assert slots.claim(0, 2) is None
        slots.release(0)
        assert slots.claim(0, 2) == 0


# Bad input.


KILLED = """
import sys
from tiny import decode, words
from lynx_learn.offload.offload import offload_experts
with offload_experts(sys.argv[1], 0.3, dtype="float32") as offloaded:
    while True:
        decode(offloaded.model, words(5, 9), 4)
        print(offloaded.stats.bytes_read, flush=True)
"""


def test_a_killed_run_leaves_the_checkpoint_as_it_was(folder: Path) -> None:
    before = {file.name: checksum(file) for file in folder.iterdir()}
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    )
    assert run.stdout is not None
    assert int(run.stdout.readline()) > 0  # in the middle of reading
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert {file.name: checksum(file) for file in folder.iterdir()} == before


@pytest.mark.parametrize("memory", [0, -5.0, 100, 0.05])
def test_fast_memory_that_is_too_small(memory: float, folder: Path) -> None:
    with pytest.raises(OptionError, match=rf"fast_memory .* a token needs {TOP_K} in each layer"):
        offload_experts(str(folder), memory)


def test_a_checkpoint_without_safetensors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no model\.safetensors .*pytorch_model\.bin.*save_pretrained"):
        offload_experts(str(tmp_path), 0.5)


def test_a_checkpoint_of_another_model(saved: Callable[..., Path]) -> None:
    model = whole(saved("qwen3_moe"))
    with pytest.raises(ModelError, match=r"gate_up_proj .*transformers converts when it loads \(shape"):
        offload_experts(model, 0.5, store=str(saved("gpt_oss")))


def test_a_model_that_does_not_say_where_its_checkpoint_is() -> None:
    with pytest.raises(ModelError, match="give store="):
        offload_experts(tiny_model("qwen3_moe"), 0.5)


def check_held(offloaded: Offloading, folder: Path) -> None:
    """Every slot that counts as held has the whole expert."""
    state = dict(whole(folder).named_parameters())
    for (index, e), slot in np.ndenumerate(offloaded.slots.where):
        if slot >= 0:
            prefix = f"{offloaded.layers[index].name}.experts"
            for name, value in offloaded.memory.weights(index, e, int(slot)).items():
                assert torch.equal(value, state[f"{prefix}.{name}"][e])


@pytest.mark.parametrize("fault", ["truncated", "written", "disk"])
def test_files_that_fail_in_the_middle_of_a_step(
    fault: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights, data = tmp_path / "model.safetensors", (tmp_path / "model.safetensors").read_bytes()
    model = whole(folder)
    wanted = outputs(model)
    preadv = os.preadv
    with offload_experts(model, 0.3, store=str(tmp_path), readers=3) as offloaded:
        outputs(model)
        reads = []

        def failing(handle: int, buffers: Any, offset: int) -> int:
            reads.append(offset)
            if len(reads) == 7:
                if fault == "disk":
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                if fault == "truncated":
                    os.truncate(weights, 5000)
                else:
                    os.utime(weights, ns=(1, 1))
            return preadv(handle, buffers, offset)

        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(LynxError, match=r"model\.safetensors (cannot be read|was changed)") as error:
            outputs(model)
        assert "\n" not in str(error.value)
        monkeypatch.undo()
        assert not offloaded.slots.pinned.any()
        check_held(offloaded, folder)
        if fault == "disk":  # which has come back
            assert torch.equal(outputs(model), wanted)
    assert torch.equal(outputs(model), wanted)
    if fault != "truncated":
        assert weights.read_bytes() == data
