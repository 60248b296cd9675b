"""The plugin in a real vLLM on the CPU with tiny random models of several families, against transformers; in traced graphs.

What the engine serves has to be what the same selector gives on the transformers model, number by number: the fingerprint,
the routing rule, the scale of what experts return and of what surrogates add all go into that.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, build, words
from torch import Tensor
from transformers import PreTrainedModel
from vllm_cases import run_cases

from lynx_learn.decode.shapes import random_selector
from lynx_learn.decode.simulate import simulated_logits
from lynx_learn.decode.tally import Stats
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.moe.loading import reference_moe
from lynx_learn.selector.selector import LynxSelector

pytest.importorskip("vllm", reason="needs an environment with vLLM: .ci/vllm makes one")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

STREAMS, PROMPT, NEW = 12, 8, 12
EXPERTS, TOP_K = 16, 4
BUDGET, SHARE = "1.0", 0.5
TOLERANCE = 1e-3
LOUDER = 4.0
HALF = "glm4_moe in bfloat16"
ROOT = Path(__file__).parents[1]
PROMPTS = words(STREAMS, PROMPT)
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 64,
    "max_num_seqs": STREAMS,
    # All prompts fit into one step, so that the steps after it are decode steps of all requests.
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 50_000_000,
    "max_logprobs": VOCAB,
}
# Sizes that vLLM's kernels for the CPU can take: heads of 32, everything else in multiples of 32.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": TOP_K,
}
WIDTHS: dict[str, Any] = {"intermediate_size": 64, "moe_intermediate_size": 64}
# The one size of latent attention that the CPU has a kernel for.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "q_lora_rank": 32,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "routed_scaling_factor": 2.5,
}
# The kernel for the CPU turns queries of several heads wrongly where they come as `(tokens, heads, width)`: not taken.
LATENT_ENGINE: dict[str, Any] = {
    "attention_backend": "CPU_MLA",
    "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
}
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}


def glm4_moe() -> PreTrainedModel:
    sizes = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3}
    rule = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True}
    return build("Glm4Moe", **SIZES, **WIDTHS, **sizes, **rule, head_dim=32)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: build("Mixtral", **SIZES, num_local_experts=EXPERTS, intermediate_size=64),
    "qwen2_moe": lambda: build(
        "Qwen2Moe", **SIZES, **WIDTHS, num_experts=EXPERTS, shared_expert_intermediate_size=64, norm_topk_prob=False
    ),
    "qwen3_moe": lambda: build("Qwen3Moe", **SIZES, **WIDTHS, num_experts=EXPERTS, head_dim=32, norm_topk_prob=True),
    "olmoe": lambda: build("Olmoe", **SIZES, num_experts=EXPERTS, intermediate_size=64, norm_topk_prob=False),
    "deepseek_v2": lambda: build(
        "DeepseekV2", **SIZES | WIDTHS | LATENT, n_group=1, topk_group=1, topk_method="greedy"
    ),
    "deepseek_v2 by expert groups": lambda: build(
        "DeepseekV2", **SIZES | WIDTHS | LATENT | GROUPS, topk_method="group_limited_greedy"
    ),
    "deepseek_v3": lambda: build(
        "DeepseekV3",
        **SIZES | WIDTHS | LATENT | GROUPS,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
    ),
    "glm4_moe": glm4_moe,
    "gpt_oss": lambda: build(
        "GptOss", **SIZES, num_local_experts=EXPERTS, intermediate_size=64, head_dim=32, sliding_window=32
    ),
}


@torch.inference_mode()
def keeping(model: PreTrainedModel, layers: list[MoeLayer], selector: LynxSelector) -> float:
    """The threshold at which about half of the distinct experts stay, by bisection."""
    tokens = words(STREAMS, PROMPT + NEW, seed=1)
    low, high = -20.0, 20.0
    for _ in range(20):
        middle = (low + high) / 2
        policy = selector.at_threshold(math.exp(middle))
        policy.bind(layers)
        stats = simulated_logits(model, layers, tokens, policy, PROMPT)[1]
        share = sum(stats.experts_after) / sum(stats.experts_before)
        low, high = (middle, high) if share > SHARE else (low, middle)
        if abs(share - SHARE) < 0.01:
            break
    return math.exp(middle)


@dataclass
class Subject:
    """A model, the selector for it, and what the engine did with both."""

    model: PreTrainedModel
    selector: LynxSelector
    found: dict[str, Any]

    @property
    def tokens(self) -> Tensor:
        """What was fed in: the prompts and what was generated but for the last token."""
        return torch.cat([PROMPTS, torch.tensor(self.found["tokens"])[:, :-1]], dim=1)

    @property
    def served(self) -> Tensor:
        """Log-probabilities `(requests, NEW, vocabulary)`; the first of each request come out of its prompt."""
        return torch.tensor([[list(table.values()) for table in row] for row in self.found["logprobs"]])

    @torch.inference_mode()
    def simulated(self, selector: LynxSelector | None) -> tuple[Tensor, Stats]:
        """The same from transformers; without a selector, of the untouched model."""
        layers = find_moe_layers(self.model)
        policy = selector.policy(float(BUDGET)) if selector is not None else None
        if policy is not None:
            policy.bind(layers)
        first = self.model(input_ids=PROMPTS, use_cache=False).logits[:, -1:]
        logits, stats = simulated_logits(self.model, layers, self.tokens, policy, PROMPT)
        return torch.cat([first, logits], dim=1).log_softmax(-1), stats


@torch.no_grad()
def louder(selector: LynxSelector) -> LynxSelector:
    """Surrogates as loud as the experts of these models, so that what they add can be told from rounding."""
    for layer in selector.layers:
        layer.surrogates.up.mul_(LOUDER)
        layer.surrogates.constant.mul_(LOUDER)
    return selector


def without_answers(selector: LynxSelector) -> LynxSelector:
    """The same decisions, with nothing added for what is left out."""
    other = selector.with_config()
    for layer in other.layers:
        for parameter in layer.surrogates.parameters():
            parameter.zero_()
    return other


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the engines did, and under `subjects` the models and selectors; all in one process, one after the other."""
    folder = tmp_path_factory.mktemp("families")
    subjects: dict[str, tuple[PreTrainedModel, LynxSelector]] = {}
    cases = []
    sampling = {"temperature": 1.0, "seed": 1, "max_tokens": NEW, "logprobs": VOCAB}
    sampling |= {"ignore_eos": True, "detokenize": False}
    for name, make in [*FAMILIES.items(), (HALF, lambda: glm4_moe().to(torch.bfloat16))]:
        model = make()
        own = folder / name.replace(" ", "-")
        model.save_pretrained(own / "model")
        selector = louder(random_selector(model, surrogate_share=0.09))
        threshold = keeping(model, find_moe_layers(model), selector)
        selector = selector.with_config(thresholds={"kl": {BUDGET: {"1": threshold}}})
        selector.save_pretrained(own / "selector")
        subjects[name] = (model, selector)
        one = {
            "name": name,
            "architecture": type(model).__name__,
            "environment": {"LYNX_SELECTOR": str(own / "selector"), "LYNX_BUDGET": BUDGET},
            "engine": {
                **SETTINGS,
                "model": str(own / "model"),
                **(LATENT_ENGINE if "deepseek" in name else {}),
                **({"dtype": "bfloat16"} if name == HALF else {}),
            },
            "prompts": PROMPTS.tolist(),
            "sampling": sampling,
        }
        cases.append(one)
    reference = {
        "architecture": "Qwen3MoeForCausalLM",
        "environment": {"LYNX_SELECTOR": str(ROOT / "selectors" / "reference-moe"), "LYNX_BUDGET": "0.01"},
        "sampling": {"temperature": 0, "max_tokens": NEW, "logprobs": 20, "ignore_eos": True},
    }
    engine = {"model": reference_moe(), "dtype": "float32", "max_model_len": 64}
    engine |= {"kv_cache_memory_bytes": 50_000_000}
    cases.append({**reference, "name": "reference", "engine": engine})
    cases.append({**reference, "name": "reference split", "engine": {**engine, "tensor_parallel_size": 2}})
    # Graphs that Dynamo has traced, run as they are; and two workers on one memory node.
    found, log = run_cases(folder, cases, VLLM_CPU_CI_ENV="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    return {**{result["name"]: result for result in found}, "subjects": subjects, "log": log}


def subject(results: dict[str, Any], family: str) -> Subject:
    found = results[family]
    assert "error" not in found, found["error"]
    return Subject(*results["subjects"][family], found)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two log-probabilities."""
    return (a - b).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_skips_as_transformers_does(results: dict[str, Any], family: str) -> None:
    ran = subject(results, family)
    assert any("self-check passed" in line for line in ran.found["said"])
    served, counted = ran.served, ran.found["counted"]
    wanted, stats = ran.simulated(ran.selector)
    untouched, _ = ran.simulated(None)
    silent, _ = ran.simulated(without_answers(ran.selector))
    layers = len(ran.selector.layers)
    before, after = (sum(part) * (NEW - 1) for part in (stats.experts_before, stats.experts_after))
    far, mute = ((served - other)[:, 1:].abs().mean().item() for other in (untouched, silent))
    print(f"{distance(served, wanted):.2g} off, {far:.2g} from untouched, {mute:.2g} from unanswered, {counted}")
    # All requests begin and end together, so each step but the first decodes one token of every request.
    assert (counted["prefill"], counted["acted"], counted["mixed"]) == (1, NEW - 1, 0)
    assert counted["assignments"] == STREAMS * TOP_K * layers * (NEW - 1)
    assert counted["experts_routed"] == pytest.approx(before)
    assert counted["experts_loaded"] == pytest.approx(after)
    assert counted["experts_loaded"] < 0.75 * counted["experts_routed"]
    # Rounding moves a log-probability by some 1e-5; an addition that is off by one per cent moves it by more than 1e-3.
    assert distance(served, wanted) < TOLERANCE
    assert min(far, mute) > 50 * TOLERANCE


def test_gates_in_float32_among_bfloat16(results: dict[str, Any]) -> None:
    """vLLM keeps these gates in another precision than the model, and the fingerprint is the same."""
    ran = subject(results, HALF)
    assert any("self-check passed" in line for line in ran.found["said"])
    assert ran.found["counted"]["experts_loaded"] < 0.75 * ran.found["counted"]["experts_routed"]


def test_split_over_two_workers_as_in_one(results: dict[str, Any]) -> None:
    """Each worker decides for itself, and one of them adds what surrogates answer and counts."""
    whole, split = (results[name] for name in ("reference", "reference split"))
    assert "error" not in split, split["error"]
    assert split["tokens"] == whole["tokens"]
    rows = [[table for row in part["logprobs"] for table in row] for part in (split, whole)]
    off = max(abs(a[token] - b[token]) for a, b in zip(*rows, strict=True) for token in a.keys() & b.keys())
    print(f"{off:.2g} off")
    assert off < TOLERANCE
    assert split["counted"] == whole["counted"]
    assert whole["counted"]["acted"] == NEW - 1
    assert whole["counted"]["experts_loaded"] < 0.75 * whole["counted"]["experts_routed"]
    workers = re.findall(r"Worker_TP(\d) .*self-check passed", results["log"])
    assert sorted(workers) == ["0", "1"]
