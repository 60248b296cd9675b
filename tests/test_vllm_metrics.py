"""Counters of several processes, and how they are shown."""

from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lynx_learn.integrations.vllm import metrics as vllm_metrics


def test_counters_reach_another_process(tmp_path: Path) -> None:
    folder = tmp_path / "counters"
    assert vllm_metrics.read_totals(folder) == {}
    slots = [vllm_metrics.open_slots(folder, name) for name in ("a", "b")]
    slots[0][:] = range(len(vllm_metrics.SLOTS))
    slots[1][:] = 1
    totals = vllm_metrics.read_totals(folder)
    assert len(totals) == len(vllm_metrics.SLOTS)
    gauges = vllm_metrics.GAUGES
    assert totals == {name: i + (name not in gauges) for i, name in enumerate(vllm_metrics.SLOTS)}
    assert folder.stat().st_mode & 0o077 == 0


def test_the_audit_is_a_histogram(tmp_path: Path) -> None:
    """Prometheus wants counts up to each edge, of everything below it too."""
    slots = vllm_metrics.open_slots(tmp_path, "a")
    first = vllm_metrics.SLOTS.index(vllm_metrics.AUDIT[0])
    slots[first : first + len(vllm_metrics.AUDIT)] = [1] * (len(vllm_metrics.AUDIT) - 1) + [2.5]
    registry = CollectorRegistry()
    registry.register(vllm_metrics.Collector(tmp_path))
    page = text_string_to_metric_families(generate_latest(registry).decode())
    (found,) = (family for family in page if family.name == "lynx_audit_kl")
    values = {(sample.name, sample.labels.get("le")): sample.value for sample in found.samples}
    edges = [*map(float, vllm_metrics.AUDIT_EDGES), float("inf")]
    buckets = {float(le or 0): value for (name, le), value in values.items() if name.endswith("_bucket")}
    assert buckets == {edge: i + 1 for i, edge in enumerate(edges)}
    assert values["lynx_audit_kl_count", None] == len(edges)
    assert values["lynx_audit_kl_sum", None] == 2.5
