"""A tiny model of every MoE decoder in transformers that can be built from its configuration."""

import importlib
import inspect
import pkgutil
import zlib
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch
import transformers
from tiny import EOS, EXPERTS, HIDDEN, PAD, TOP_K, VOCAB
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

# The versions of transformers that the package is tested with.
OLDEST, NEWEST = "5.16.1", "5.19.0"
ABSENT = "absent"
UNSTACKED = "does not keep its expert weights as stacked 3-D parameters"
# By every name a configuration may know it; each takes those that it has.
OPTIONS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 32,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 2,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"), TOP_K),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size", "share_expert_dim"), 24),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    "n_group": 2,
    "topk_group": 1,
    # every layer a MoE layer
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    "decoder_sparse_step": 1,
    "mlp_layer_types": ["sparse", "sparse"],
    # attention of other kinds
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 16,  # where all of few heads score 0, which keys come first depends on how many there are
    "index_head_dim": 16,
    "index_topk": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
    "router_hidden_size": 16,
}
LINEAR: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
MLA: dict[str, Any] = {"num_key_value_heads": 4}
MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
INDEXER: dict[str, Any] = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4},
    **{"indexer_compress_ratio": 2, "hc_lowrank": 8, "ple_layer_ids": []},
}


@dataclass(frozen=True)
class Kind:
    """A class of transformers, with other options where `OPTIONS` do not fit.

    Attributes:
        refused: why, if it is refused.
        oldest: the same with the oldest transformers, where that differs; `ABSENT` if it does not have it.
        threshold: for costs; those of typical assignments are around 1.
    """

    model_class: str
    options: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    oldest: str = ""
    threshold: float = 2.0

    @property
    def reason(self) -> str:
        """Why the installed transformers' model is refused; empty if it is supported."""
        return (transformers.__version__ == OLDEST and self.oldest) or self.refused


# By the model type that its own configuration states.
ZOO: dict[str, Kind] = {
    "afmoe": Kind("AfmoeForCausalLM", {"route_scale": 1.5}),
    "aria_text": Kind("AriaTextForCausalLM", oldest=UNSTACKED),
    "axk1": Kind("AXK1ForCausalLM", MLA),
    "axk2": Kind("AXK2ForCausalLM", MLA),
    "cohere2_moe": Kind("Cohere2MoeForCausalLM"),
    "deepseek_ocr2_text": Kind("DeepseekOcr2TextModel"),
    "deepseek_v2": Kind("DeepseekV2ForCausalLM", {**MLA, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": Kind("DeepseekV3ForCausalLM", MLA),
    "deepseek_v32": Kind("DeepseekV32ForCausalLM", MLA),
    "dots1": Kind("Dots1ForCausalLM"),
    "ernie4_5_moe": Kind("Ernie4_5_MoeForCausalLM"),
    "exaone_moe": Kind("ExaoneMoeForCausalLM"),
    "flex_olmo": Kind("FlexOlmoForCausalLM"),
    "gemma4_text": Kind("Gemma4ForCausalLM", {"enable_moe_block": True, "hidden_size_per_layer_input": 0}),
    "glm4_moe": Kind("Glm4MoeForCausalLM"),
    "glm4_moe_lite": Kind("Glm4MoeLiteForCausalLM", MLA),
    "glm4v_moe_text": Kind("Glm4vMoeTextModel", {**MROPE, "head_dim": 16}),
    "glm5_next_text": Kind("Glm5NextTextModel", {**MLA, **LINEAR, "index_kpool": 2, "qk_rope_head_dim": 0}),
    "glm_moe_dsa": Kind("GlmMoeDsaForCausalLM", MLA),
    "gpt_oss": Kind("GptOssForCausalLM"),
    "granitemoe": Kind("GraniteMoeForCausalLM"),
    "granitemoe_swa": Kind("GraniteMoeSWAForCausalLM"),
    "granitemoehybrid": Kind("GraniteMoeHybridForCausalLM", {"layer_types": ["mamba", "attention"]}),
    "granitemoeshared": Kind("GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": Kind("HunYuanMoEV1ForCausalLM"),
    "hy_v3": Kind("HYV3ForCausalLM"),
    "hy_v4": Kind("HYV4ForCausalLM", oldest=ABSENT),
    "jamba": Kind(
        "JambaForCausalLM",
        {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 0, "expert_layer_period": 1},
    ),
    "kimi_linear": Kind("KimiLinearForCausalLM", {**MLA, **LINEAR}, oldest=ABSENT),
    "laguna": Kind("LagunaForCausalLM", {"moe_routed_scaling_factor": 2.0}),
    "lfm2_moe": Kind("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "mellum": Kind("MellumForCausalLM"),
    "mimo_v2_flash": Kind("MiMoV2FlashForCausalLM"),
    "minimax": Kind("MiniMaxForCausalLM", LINEAR),
    "minimax_m2": Kind("MiniMaxM2ForCausalLM"),
    "minimax_m3_vl_text": Kind("MiniMaxM3VLForCausalLM"),
    "mistral4": Kind("Mistral4ForCausalLM", MLA),
    "mixtral": Kind("MixtralForCausalLM"),
    "nemotron_h": Kind("NemotronHForCausalLM", {"layers_block_type": ["mamba", "moe", "attention", "moe"]}),
    "olmoe": Kind("OlmoeForCausalLM"),
    "phimoe": Kind("PhimoeForCausalLM"),
    "qwen2_moe": Kind("Qwen2MoeForCausalLM"),
    "qwen3_5_moe_text": Kind("Qwen3_5MoeForCausalLM", LINEAR),
    "qwen3_moe": Kind("Qwen3MoeForCausalLM"),
    "qwen3_next": Kind("Qwen3NextForCausalLM", LINEAR),
    # Its attention has no window, but its cache would have one.
    "qwen3_omni_moe_text": Kind("Qwen3OmniMoeThinkerTextModel", {**MROPE, "sliding_window": None}),
    "qwen3_vl_moe_text": Kind("Qwen3VLMoeTextModel", MROPE),
    "qwen4_exp_text": Kind("Qwen4ExpForCausalLM", {**LINEAR, **INDEXER}),
    "solar_open": Kind("SolarOpenForCausalLM"),
    "step3p5": Kind("Step3p7TextModel"),
    # refused
    "dbrx": Kind(
        "DbrxForCausalLM",
        {
            **{"d_model": HIDDEN, "n_heads": 4, "n_layers": 2, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": TOP_K, "hidden_size": HIDDEN},
        },
        UNSTACKED,
    ),
    "deepseek_v4": Kind("DeepseekV4ForCausalLM", {"mlp_layer_types": ["hash_moe", "moe"]}, "input_ids"),
    "doge": Kind("DogeForCausalLM", {"is_moe": True}, "no Mixture-of-Experts block of a known shape"),
    "ernie4_5_vl_moe_text": Kind(
        "Ernie4_5_VLMoeTextModel", {**MROPE, "moe_intermediate_size": [24, 16]}, "depends on the token"
    ),
    "inkling_text": Kind("InklingForCausalLM", {}, "scores experts in an unknown way"),
    "jetmoe": Kind("JetMoeForCausalLM", {}, "no child `gate` or `router`"),
    "llama4_text": Kind("Llama4ForCausalLM", {}, "runs every expert"),
    "longcat_flash": Kind(
        "LongcatFlashForCausalLM",
        {"num_layers": 1, "zero_expert_num": 4},
        "chooses among 12",
        oldest="does not return its logits",
    ),
    "zaya": Kind("ZayaForCausalLM", {"num_experts_per_tok": 1}, "chooses among 9"),
}
# Folders of transformers whose code knows of experts, and that hold no decoder with Mixture-of-Experts blocks.
NOT_DECODERS: dict[str, str] = {
    "bamba": "its layers are dense; experts are mentioned only",
    "diffusion_gemma": "denoises a block of tokens at once, so no step decodes one token per sequence",
    "nllb_moe": "an encoder and decoder, with an `nn.Module` for each expert",
    "openai_privacy_filter": "classifies tokens, generates none",
    "switch_transformers": "an encoder and decoder, with an `nn.Module` for each expert",
    "vitpose": "finds poses in images",
    "vitpose_backbone": "finds poses in images",
}
VISION: dict[str, Any] = {
    **dict.fromkeys(("depth", "num_hidden_layers"), 1),
    **dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size"), HIDDEN),
    **{"num_heads": 4, "deepstack_visual_indexes": [0]},
}
# Other ways to configure what the zoo holds, that lead to another rule or another shape.
VARIANTS: dict[str, Kind] = {
    "cohere2_moe by sigmoid": Kind("Cohere2MoeForCausalLM", {"expert_selection_fn": "sigmoid"}),
    "deepseek_v2 without expert groups": Kind("DeepseekV2ForCausalLM", {**MLA, "topk_method": "greedy"}),
    "deepseek_v4 without hashed layers": Kind("DeepseekV4ForCausalLM", {"mlp_layer_types": ["moe", "moe"]}),
    "laguna with capped logits": Kind("LagunaForCausalLM", {"moe_router_logit_softcapping": 2.0}),
    "qwen3_vl_moe with its vision tower": Kind("Qwen3VLMoeForConditionalGeneration", {"vision_config": VISION}),
    "nemotron_h in a narrower space": Kind(
        "NemotronHForCausalLM",
        {"layers_block_type": ["attention", "moe", "attention", "moe"], "moe_latent_size": 16},
        threshold=10.0,
    ),
}


class WithHead(nn.Module):
    """A text model whose only decoder class has a vision tower, with a head as that class gives it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.generation_config = GenerationConfig()

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        out = self.model(input_ids=input_ids, **options)
        out.logits = self.lm_head(out.last_hidden_state)
        return out


@cache
def modeling() -> dict[str, ModuleType]:
    """The modelling modules of transformers whose text knows of experts, by folder."""
    import transformers.models as models

    found: dict[str, ModuleType] = {}
    for package in pkgutil.iter_modules(models.__path__):
        spec = importlib.util.find_spec(f"transformers.models.{package.name}.modeling_{package.name}")
        if spec is None or spec.loader is None:
            continue
        if "xperts" in (spec.loader.get_source(spec.name) or ""):  # type: ignore[attr-defined]
            found[package.name] = importlib.import_module(spec.name)
    return found


def class_of(kind: Kind) -> type[PreTrainedModel] | None:
    """The class, unless this version of transformers does not have it."""
    known = getattr(transformers, kind.model_class, None)
    if known is not None:
        return known
    return next((c for m in modeling().values() if (c := getattr(m, kind.model_class, None)) is not None), None)


def known_options(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    known = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map}
    for parent in config_class.__mro__:
        known |= set(getattr(parent, "__annotations__", {}))
    return {name: value for name, value in OPTIONS.items() if name in known}


def build(kind: Kind) -> nn.Module:
    """The model with seeded random weights: routing spread, experts that matter, biases and factors that are not idle."""
    model_class = class_of(kind)
    assert model_class is not None
    config_class: type[PreTrainedConfig] = model_class.config_class  # type: ignore[assignment]
    text_class = config_class.sub_configs.get("text_config")
    if text_class is None:
        config = config_class(**(known_options(config_class) | kind.options))
    else:
        text = text_class(**known_options(text_class), **MROPE)
        config = config_class(text_config=text.to_dict(), **kind.options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(kind.model_class.encode()))
        model: Any = model_class(config)
        if not hasattr(model, "lm_head"):
            model = WithHead(model)
        with torch.no_grad():
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith(("e_score_correction_bias", "expert_bias")):
                    value.normal_(std=0.1)
                elif name.endswith("per_expert_scale"):
                    value.uniform_(0.5, 1.5)
                elif (".gate." in name or ".router." in name) and value.is_floating_point():
                    value.normal_(std=0.5)
                elif ".experts." in name:
                    value.normal_(std=0.2)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model.eval()
