"""Hidden states in fewer bits: what comes back, how large it is, and that every reader gets the model's dtype."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from collect_cases import LAYERS, choices, digests, undisturbed, whole
from flows import one_line
from hypothesis import given
from hypothesis import strategies as st

from lynx_learn.errors import TraceError
from lynx_learn.traces.collect import collect
from lynx_learn.traces.format import Trace
from lynx_learn.traces.packing import SCALE, hidden_bytes, pack, unpack

HALF_A_STEP = {"bfloat16": 2**-8, "float8_e4m3fn": 2**-4}


@given(
    stored=st.sampled_from(sorted(HALF_A_STEP)),
    magnitude=st.floats(-20, 20),
    outlier=st.floats(1, 1000),
    seed=st.integers(0, 99),
)
def test_rounding_costs_each_value_its_own_share(stored: str, magnitude: float, outlier: float, seed: int) -> None:
    """Also beside a dimension that is a thousand times larger, and whatever a token's size."""
    hidden = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**magnitude
    hidden[:, 3] *= outlier
    hidden[1], hidden[2] = 0.0, hidden[2] * 1e-6
    found = unpack(pack({"hidden": hidden}, stored), torch.float32)
    assert list(found) == ["hidden"]
    assert found["hidden"].dtype == torch.float32
    # Below the smallest normal value rounding is absolute.
    smallest = hidden.abs().amax(-1, keepdim=True) * 2**-6 / 448
    assert ((found["hidden"] - hidden).abs() <= HALF_A_STEP[stored] * hidden.abs().maximum(smallest) * 1.001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_stored_and_what_comes_back(dtype: torch.dtype) -> None:
    hidden = torch.randn(4, 16).to(dtype)
    assert pack({"hidden": hidden}, "auto")["hidden"] is hidden
    packed = pack({"hidden": hidden, "weights": hidden}, "float8_e4m3fn")
    assert (packed["hidden"].dtype, packed[SCALE].dtype) == (torch.float8_e4m3fn, torch.float32)
    found = unpack(packed, dtype)
    assert found["hidden"].dtype == dtype
    assert found["weights"] is hidden
    # What is written again loses nothing more than the model's dtype does.
    again = unpack(pack(unpack(packed, torch.float32), "float8_e4m3fn"), torch.float32)["hidden"]
    torch.testing.assert_close(again, unpack(packed, torch.float32)["hidden"])
    size = sum(packed[name].numel() * packed[name].element_size() for name in ("hidden", SCALE))
    assert size == 4 * hidden_bytes(16, dtype.itemsize, "float8_e4m3fn") == 4 * (16 + 4)


@pytest.mark.parametrize("stored", sorted(HALF_A_STEP))
def test_only_hidden_states_of_a_trace_are_rounded(stored: str, tmp_path: Path) -> None:
    trace = collect(choices(tmp_path / "t", hidden_dtype=stored))
    plain = Trace.open(undisturbed())
    assert (trace.options.hidden_dtype, trace.options.dtype) == (stored, "float32")
    for found, exact in zip(whole(trace), whole(plain), strict=True):
        for key in ("logits", "indices", "weights"):
            assert torch.equal(found[key], exact[key])
        assert found["hidden"].dtype == torch.float32
        error = (found["hidden"] - exact["hidden"]).norm() / exact["hidden"].norm()
        assert 0 < error < HALF_A_STEP[stored]
    parts = list(trace.layer_shards(0, ("indices",)))
    assert list(parts[0]) == ["indices"]
    ours, theirs = (sum(f.stat().st_size for f in t.folder.glob("layer-*/*")) for t in (trace, plain))
    tokens = trace.collected_tokens
    saved = tokens * LAYERS * (hidden_bytes(32, 4, "auto") - hidden_bytes(32, 4, stored))
    assert theirs - ours == pytest.approx(saved, rel=0.05)
    assert tokens * (plain.options.bytes_per_token - trace.options.bytes_per_token) == saved
    before = digests(trace.folder)
    (trace.folder / "manifest.json").unlink()
    collect(choices(tmp_path / "t", hidden_dtype=stored))
    assert digests(trace.folder) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_rounded_away(value: float) -> None:
    hidden = torch.randn(4, 16)
    hidden[2, 5] = value
    for stored in HALF_A_STEP:
        assert not torch.isfinite(unpack(pack({"hidden": hidden}, stored), torch.float32)["hidden"]).all()


def test_a_trace_without_its_scales_is_refused(tmp_path: Path) -> None:
    trace = collect(choices(tmp_path / "t"))
    trace.options = replace(trace.options, hidden_dtype="float8_e4m3fn")
    with pytest.raises(TraceError, match="cannot be read") as error:
        list(trace.layer_shards(0))
    one_line(error)
