"""Tiny models of every family the tests cover, built from their configs, and selectors with random parameters."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from lynx_learn.decode.shapes import SHAPES
from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.moe.identity import identify
from lynx_learn.selector.config import SelectorConfig, Thresholds
from lynx_learn.selector.selector import LynxSelector

VOCAB, HIDDEN, EXPERTS, TOP_K = 128, 32, 8, 2
PAD, EOS, FIRST_WORD = 0, 1, 3
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 2,
}


def build(kind: str, **options: Any) -> PreTrainedModel:
    """A model of transformers class prefix `kind` with seeded random weights: routing spread, experts that matter."""
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(kind.encode()))
        model: PreTrainedModel = getattr(transformers, f"{kind}ForCausalLM")(config)
        with torch.no_grad():
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("e_score_correction_bias"):
                    value.normal_(std=0.1)
                elif name.endswith(("gate.weight", "router.weight", "router.bias")) and "shared" not in name:
                    value.normal_(std=0.5)
                elif "experts" in name:
                    value.normal_(std=0.2)
    assert model.generation_config is not None
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model.eval()


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: build("Mixtral", num_local_experts=EXPERTS, intermediate_size=48),
    "qwen2_moe": lambda: build(
        "Qwen2Moe",
        num_experts=EXPERTS,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=40,
        norm_topk_prob=False,
    ),
    "qwen3_moe": lambda: build(
        "Qwen3Moe", num_experts=EXPERTS, moe_intermediate_size=48, head_dim=16, norm_topk_prob=True
    ),
    "olmoe": lambda: build("Olmoe", num_experts=EXPERTS, intermediate_size=48, norm_topk_prob=False),
    "deepseek_v3": lambda: tiny_deepseek(open_groups=1),
    "gpt_oss": lambda: build("GptOss", num_local_experts=EXPERTS, intermediate_size=48, head_dim=16, sliding_window=32),
    "granitemoe": lambda: build("GraniteMoe", num_local_experts=EXPERTS, intermediate_size=48),
}


def tiny_deepseek(open_groups: int) -> PreTrainedModel:
    """DeepSeek-V3 with a dense first layer, a shared expert, a choice bias and `open_groups` of 2 expert groups."""
    return build(
        "DeepseekV3",
        num_hidden_layers=3,
        num_key_value_heads=4,
        intermediate_size=48,
        moe_intermediate_size=48,
        n_routed_experts=EXPERTS,
        n_group=2,
        topk_group=open_groups,
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        num_mtp_layers=0,
    )


def tiny_model(name: str) -> PreTrainedModel:
    return FAMILIES[name]()


def random_selector(
    model: nn.Module,
    rank: int = 4,
    scorer: str = "mlp",
    thresholds: Thresholds | None = None,
    keep_top1: bool = False,
    seed: int = 0,
) -> LynxSelector:
    """A selector that fits `model`, of a mean rank, every parameter random and the cost of a typical assignment around 1."""
    layers = find_moe_layers(model)
    config = SelectorConfig(
        base_model="tiny",
        base_revision="local",
        model_type=str(model.config.model_type),  # type: ignore[union-attr]
        identity=identify(layers, model),
        layers=tuple(layer.name for layer in layers),
        num_experts=layers[0].num_experts,
        top_k=layers[0].top_k,
        hidden_size=layers[0].hidden_size,
        expert_bytes=layers[0].expert_bytes,
        scorer=scorer,
        rank=rank,
        keep_top1=keep_top1,
        thresholds=thresholds or {},
    )
    selector = LynxSelector(config)
    randomise(selector, seed)
    for layer, own in zip(layers, selector.layers, strict=True):
        weights = layer.rule.route(torch.randn(64, layer.num_experts, generator=torch.Generator().manual_seed(seed)))[1]
        own.scorer.log_residual -= 2 * weights.log().mean()  # type: ignore[union-attr,operator]
    return selector


@torch.no_grad()
def randomise(selector: LynxSelector, seed: int = 0) -> None:
    """Every parameter and buffer random, so that parity cannot hide in zeros."""
    generator = torch.Generator().manual_seed(seed)
    named = [*selector.named_parameters(), *selector.named_buffers()]
    for name, value in sorted(named, key=lambda item: "surrogates" in item[0]):
        if name.endswith("owner"):  # uneven ranks
            value.copy_(torch.randint(selector.config.num_experts, value.shape, generator=generator).sort().values)
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith(("spread", "sensitivity")):
            noise = 1.0 + 0.5 * noise.tanh()
        value.copy_(noise if name.endswith(("down", "constant", "spread", "sensitivity")) else 0.3 * noise)


def words(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens `(rows, length)`, none of them padding or an end."""
    return torch.randint(FIRST_WORD, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def routing_of(output: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Indices and weights out of a router's output, whatever their order there."""
    indices = next(part for part in output if not part.is_floating_point())
    weights = next(part for part in output if part.is_floating_point() and part.shape == indices.shape)
    return indices, weights


def by_expert(indices: Tensor, weights: Tensor) -> Tensor:
    """Weight of each expert `(tokens, experts)`."""
    return torch.zeros(indices.shape[0], EXPERTS).scatter_add(1, indices, weights.float())


@torch.no_grad()
def decode(model: nn.Module, tokens: Tensor, prompt: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits of the prompt `(rows, prompt, vocabulary)` and of a cached decode fed with the other tokens.

    `mask` is the attention mask of all tokens; without it nothing is padding.
    """
    mask = torch.ones_like(tokens) if mask is None else mask
    out = model(input_ids=tokens[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True)
    first, steps = out.logits, []
    for end in range(prompt + 1, tokens.shape[1] + 1):
        out = model(
            input_ids=tokens[:, end - 1 : end],
            attention_mask=mask[:, :end],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        steps.append(out.logits)
    return first, torch.cat(steps, dim=1)


@dataclass
class Seen:
    """What one MoE layer did in one call of the model: as routed, and as the experts module was really called."""

    layer: MoeLayer
    logits: Tensor
    routed: tuple[Tensor, Tensor]
    hidden: Tensor
    indices: Tensor
    weights: Tensor
    output: Tensor

    @property
    def loaded(self) -> set[int]:
        return set(self.indices.flatten().tolist())

    @property
    def wanted(self) -> set[int]:
        return set(self.routed[0].flatten().tolist())


@dataclass
class Watch:
    """Records of all MoE layers, one call after the other."""

    records: list[Seen] = field(default_factory=list)

    @property
    def steps(self) -> list[Seen]:
        """Those of decode steps: after the first call of each layer, the prompt."""
        layers = len({seen.layer.index for seen in self.records})
        return self.records[layers:]


@contextmanager
def watching(layers: list[MoeLayer]) -> Iterator[Watch]:
    """See what reaches routers and experts; open it inside a skipping context, so that its hooks run last."""
    watch, handles = Watch(), []
    for layer in layers:
        held: dict[str, Any] = {}

        def after_router(
            module: nn.Module, args: Any, output: Any, held: dict[str, Any] = held, layer: MoeLayer = layer
        ) -> None:
            held["routed"], held["logits"] = routing_of(output), layer.logits_of(output)

        def before_experts(module: nn.Module, args: Any, held: dict[str, Any] = held) -> None:
            held["called"] = args

        def after_experts(
            module: nn.Module, args: Any, output: Tensor, held: dict[str, Any] = held, layer: MoeLayer = layer
        ) -> None:
            hidden, indices, weights = held["called"]
            watch.records.append(Seen(layer, held["logits"], held["routed"], hidden, indices, weights, output))

        handles += [
            layer.router.register_forward_hook(after_router),
            layer.experts.register_forward_pre_hook(before_experts),
            layer.experts.register_forward_hook(after_experts),
        ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape named `small` beside the known ones."""
    sizes = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 4000,
    }
    monkeypatch.setitem(SHAPES, "small", ("qwen3_moe", sizes))
