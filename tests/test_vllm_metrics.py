"""Counters of several processes."""

from pathlib import Path

from lynx_learn.integrations.vllm import metrics as vllm_metrics


def test_counters_reach_another_process(tmp_path: Path) -> None:
    folder = tmp_path / "counters"
    assert vllm_metrics.read_totals(folder) == {}
    slots = [vllm_metrics.open_slots(folder, name) for name in ("a", "b")]
    slots[0][:] = range(len(vllm_metrics.SLOTS))
    slots[1][:] = 1
    totals = vllm_metrics.read_totals(folder)
    assert totals == {name: i + 1 for i, name in enumerate(vllm_metrics.SLOTS)}
    assert folder.stat().st_mode & 0o077 == 0
