"""The engine's layers, and kernels that are refused."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import EXPERTS, HIDDEN
from vllm_stand_ins import Experts, engine_runner

from lynx_learn.integrations.vllm import layers as vllm_layers
from lynx_learn.integrations.vllm.settings import UnsupportedError


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"is_monolithic": True}, r"layer here runs a monolithic kernel \(SimpleNamespace\) that routes by itself"),
        ({"router": SimpleNamespace()}, "layer here routes with SimpleNamespace"),
        ({"is_sequence_parallel": True}, "layer here is split over the sequence"),
        ({"routed_input_transform": object()}, "routes a projection of its input"),
        ({"_fse_fuse_gate": True}, "runs shared experts in the routed kernel"),
        ({"use_deferred_moe_finalize": True}, "leaves its output unfinished"),
    ],
)
def test_layers_refused(changes: dict[str, Any], line: str) -> None:
    vllm_layers.check_layer("here", engine_runner(), torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=line):
        vllm_layers.check_layer("here", engine_runner(**changes), torch.device("cpu"))


class TritonExperts:
    """Named as one of vLLM's kernels."""


class FlashInferExperts:
    """The same."""


class TransformersMoERunner(SimpleNamespace):
    """Named as vLLM's for models that route by themselves."""


def test_kernels_that_want_distinct_experts_are_refused_off_the_cpu() -> None:
    def running(kernel: object) -> Any:
        experts = Experts()
        experts.quant_method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=kernel))
        return engine_runner(routed_experts=experts)

    gpu = torch.device("cuda")
    vllm_layers.check_layer("here", running(TritonExperts()), gpu)
    vllm_layers.check_layer("here", running(FlashInferExperts()), torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"layer here runs FlashInferExperts, .+ --moe-backend triton"):
        vllm_layers.check_layer("here", running(FlashInferExperts()), gpu)
    with pytest.raises(UnsupportedError, match="layer here runs SimpleNamespace, "):
        vllm_layers.check_layer("here", engine_runner(), gpu)


class MonolithicExperts:
    """One that routes by itself."""


@pytest.mark.parametrize("on_cpu", [False, True])
def test_vllm_chooses_a_kernel_that_can_be_acted_on(on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the choice is its own, and only while the model is built."""

    class FusedMoEExperts:
        @staticmethod
        def is_supported_config(kernel: type, config: Any, *_: Any) -> tuple[bool, str | None]:
            return kernel is not torch.nn.Module, None

    def chosen(backend: str = "auto") -> str:
        config = SimpleNamespace(moe_backend=backend)
        kernels = (torch.nn.Module, MonolithicExperts, FlashInferExperts, TritonExperts)
        return next(k.__name__ for k in kernels if FusedMoEExperts.is_supported_config(k, config, None)[0])

    stand_in = "vllm.model_executor.layers.fused_moe.modular_kernel"
    monkeypatch.setitem(sys.modules, stand_in, SimpleNamespace(FusedMoEExperts=FusedMoEExperts))  # type: ignore[arg-type]
    platform = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: on_cpu))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platform)  # type: ignore[arg-type]
    with vllm_layers.steering():
        assert chosen() == ("MonolithicExperts" if on_cpu else "TritonExperts")
        assert chosen("flashinfer_trtllm") == "MonolithicExperts"
    assert chosen() == "MonolithicExperts"


def test_models_that_route_by_themselves_are_refused() -> None:
    runner = TransformersMoERunner(**vars(engine_runner()))
    with pytest.raises(UnsupportedError, match="leave --model-impl out"):
        vllm_layers.check_layer("here", runner, torch.device("cpu"))


def test_quantized_gates_are_refused() -> None:
    gate = torch.nn.Module()
    gate.weight = torch.nn.Parameter(torch.ones(EXPERTS, HIDDEN), requires_grad=False)
    assert torch.equal(vllm_layers.read_gate("here", gate)["weight"], gate.weight)
    gate.weight = torch.nn.Parameter(gate.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"layer here has a quantized gate \(float8_e4m3fn\)"):
        vllm_layers.read_gate("here", gate)
