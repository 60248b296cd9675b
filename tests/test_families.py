"""Blocks are found, scoring rules are the routers' own, and what does not fit is refused by name."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    COMMON,
    EOS,
    EXPERTS,
    FAMILIES,
    HIDDEN,
    PAD,
    TOP_K,
    build,
    routing_of,
    tiny_deepseek,
    tiny_model,
    words,
)
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lynx_learn.errors import ModelError
from lynx_learn.moe.calls import read_call
from lynx_learn.moe.experts import experts_by_distinct
from lynx_learn.moe.families import find_moe_layers, router_fingerprint
from lynx_learn.moe.routing_rules import Activation, ScoringRule


def by_expert(indices: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros(indices.shape[0], EXPERTS).scatter_add(1, indices, weights.float())


@pytest.mark.parametrize("name", FAMILIES)
def test_finds_every_moe_block(name: str) -> None:
    model = tiny_model(name)
    layers = find_moe_layers(model)
    parents = [n.rsplit(".", 1)[0] for n, m in model.named_modules() if type(m).__name__.endswith("Experts")]
    assert [layer.name for layer in layers] == parents
    assert [layer.index for layer in layers] == [0, 1]
    for layer in layers:
        assert layer.block is model.get_submodule(layer.name)
        assert (layer.num_experts, layer.top_k, layer.hidden_size) == (EXPERTS, TOP_K, HIDDEN)
        one_expert = [parameter[0] for parameter in layer.experts.parameters()]
        assert layer.expert_bytes == sum(p.numel() * p.element_size() for p in one_expert)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*FAMILIES, "deepseek_v3 with all expert groups open"])
def test_rule_reproduces_the_router(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name) if name in FAMILIES else tiny_deepseek(open_groups=2)
    if dtype == torch.bfloat16:
        model.bfloat16()
    for layer in find_moe_layers(model):
        hidden = torch.randn(500, HIDDEN, generator=torch.Generator().manual_seed(42 + layer.index)).to(dtype)
        with torch.no_grad():
            output = layer.router(hidden)
        wanted = by_expert(*routing_of(output))
        found = by_expert(*layer.rule.route(layer.logits_of(output)))
        if dtype == torch.float32:
            torch.testing.assert_close(found, wanted)
        else:  # low precision has ties in the logits, which may fall either way
            agree = torch.isclose(found, wanted, rtol=1e-2, atol=1e-2).all(dim=1)
            assert agree.float().mean() > 0.97


def reference_route(rule: ScoringRule, logits: list[float], allowed: list[bool]) -> dict[int, float]:
    """Weight of each chosen expert, written without tensors; experts that are not allowed do not exist."""
    present = [e for e in range(len(logits)) if allowed[e]]
    if rule.activation == "sigmoid":
        score = {e: 1 / (1 + math.exp(-logits[e])) for e in present}
    elif rule.activation == "sqrt_softplus":
        score = {e: math.sqrt(math.log(1 + math.exp(logits[e]))) for e in present}
    else:
        total = sum(math.exp(logits[e]) for e in present)
        score = {e: math.exp(logits[e]) / total for e in present}
    by_logit = rule.activation in ("topk_softmax", "sparsemixer")
    choice = {e: logits[e] for e in present} if by_logit else dict(score)
    if rule.bias is not None:
        choice = {e: choice[e] + float(rule.bias[e]) for e in present}
    size = len(logits) // rule.expert_groups
    members = {g: [e for e in present if e // size == g] for g in range(rule.expert_groups)}
    strength = {
        g: sum(sorted((choice[e] for e in m), reverse=True)[: rule.strength_of]) for g, m in members.items() if m
    }
    opened = (
        sorted(strength, key=lambda g: -strength[g])[: rule.open_groups] if rule.expert_groups > 1 else list(strength)
    )
    chosen = sorted((e for g in opened for e in members[g]), key=lambda e: -choice[e])[: rule.top_k]
    if rule.activation == "topk_softmax":
        total = sum(math.exp(logits[e]) for e in chosen)
        score = {e: math.exp(logits[e]) / total for e in chosen}
    if rule.activation == "sparsemixer":
        for place, best in enumerate(chosen):
            left = [e for e in present if e not in chosen[:place]]
            gap = {e: (logits[best] - logits[e]) / max(abs(logits[e]), logits[best]) for e in left}
            total = sum(math.exp(logits[e]) for e in left if gap[e] <= 2 * rule.nearness)
            score[best] = math.exp(logits[best]) / total
    weights = {e: score[e] for e in chosen}
    if rule.normalise:
        weights = {e: w / sum(weights[f] for f in chosen) for e, w in weights.items()}
    own = [1.0] * len(logits) if rule.expert_scale is None else rule.expert_scale.tolist()
    return {e: w * own[e] * rule.scale for e, w in weights.items()}


@settings(max_examples=300, deadline=None)
@given(
    activation=st.sampled_from(["softmax", "sigmoid", "sqrt_softplus", "topk_softmax", "sparsemixer"]),
    normalise=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    biased=st.booleans(),
    expert_groups=st.sampled_from([(1, 1, 2), (2, 1, 2), (2, 2, 2), (4, 1, 2), (4, 2, 2), (2, 1, 1), (4, 2, 1)]),
    scaled=st.booleans(),
    nearness=st.sampled_from([0.01, 0.3]),
    top_k=st.integers(1, 4),
    allowed=st.lists(st.booleans(), min_size=EXPERTS, max_size=EXPERTS).filter(any),
    seed=st.integers(0, 2**31),
)
def test_route_among_allowed_equals_reference(
    activation: Activation,
    normalise: bool,
    scale: float,
    biased: bool,
    expert_groups: tuple[int, int, int],
    scaled: bool,
    nearness: float,
    top_k: int,
    allowed: list[bool],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(5, EXPERTS, generator=generator)
    bias = torch.randn(EXPERTS, generator=generator) if biased else None
    own = 0.5 + torch.rand(EXPERTS, generator=generator) if scaled else None
    if activation in ("topk_softmax", "sparsemixer"):
        bias = None
    if activation == "sparsemixer":
        expert_groups = (1, 1, 2)
    rule = ScoringRule(activation, top_k, normalise, scale, bias, *expert_groups, own, nearness)
    indices, weights = rule.route(logits, torch.tensor(allowed))
    assert indices.shape == weights.shape == (5, top_k)
    assert all(allowed[e] for e in indices.flatten().tolist()), "a forbidden expert would be loaded"
    for row in range(5):
        wanted = torch.zeros(EXPERTS)
        for expert, weight in reference_route(rule, logits[row].tolist(), allowed).items():
            wanted[expert] = weight
        torch.testing.assert_close(by_expert(indices[row : row + 1], weights[row : row + 1])[0], wanted)


def test_route_with_everything_allowed_changes_nothing() -> None:
    for layer in find_moe_layers(tiny_model("deepseek_v3")):
        logits = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(1))
        free, masked = layer.rule.route(logits), layer.rule.route(logits, torch.ones(EXPERTS, dtype=torch.bool))
        torch.testing.assert_close(by_expert(*masked), by_expert(*free))


def odd_router(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights that are no known function of the logits."""
    logits = nn.functional.linear(hidden.reshape(-1, HIDDEN), self.weight)
    values, indices = logits.tanh().topk(self.top_k, dim=-1)
    return logits, values.abs() + 1.0, indices


def bare_router(self: Any, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden.reshape(-1, HIDDEN), self.weight)


def with_router(forward: Callable[..., Any], layer: int) -> PreTrainedModel:
    """A Mixtral with one router's forward replaced."""
    model = tiny_model("mixtral")
    router = model.get_submodule(f"model.layers.{layer}.mlp.gate")
    router.forward = forward.__get__(router)
    return model


def build_llama4() -> nn.Module:
    config = transformers.Llama4TextConfig(
        **COMMON, intermediate_size=48, intermediate_size_mlp=48, num_local_experts=4, head_dim=8
    )
    return transformers.Llama4ForCausalLM(config)


def build_dbrx() -> nn.Module:
    ffn = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    return transformers.DbrxForCausalLM(
        transformers.DbrxConfig(
            d_model=32,
            n_heads=4,
            n_layers=2,
            vocab_size=128,
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
            ffn_config=ffn,
        )
    )


def with_stray_experts() -> PreTrainedModel:
    """A Mixtral with one more set of experts that nothing routes to by a known block."""
    model = tiny_model("mixtral")
    stray = nn.ParameterDict({"up": torch.zeros(4, 3, 3), "down": torch.zeros(4, 3, 3)})
    model.get_submodule("model.layers.1").add_module("more", stray)
    return model


def with_another_router_call() -> PreTrainedModel:
    """A Mixtral whose second block gives its experts something else than indices and weights."""
    model = tiny_model("mixtral")
    block = model.get_submodule("model.layers.1.mlp")
    block.forward = lambda hidden: block.experts(hidden, block.gate(hidden[0])[0], None)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "llama": (lambda: build("Llama", intermediate_size=48), "'llama'", "no Mixture-of-Experts block"),
    "llama4": (build_llama4, "'llama4", "runs every expert"),
    "dbrx": (build_dbrx, "'dbrx'", "stacked 3-D parameters"),
    "router of logits only": (lambda: with_router(bare_router, 0), "'mixtral'", "does not return logits, weights and"),
    "unknown scoring": (lambda: with_router(odd_router, 0), "'mixtral'", "unknown way"),
    "experts beside the known ones": (with_stray_experts, "model.layers.1.more", "outside of a known block"),
    "another call of the experts": (with_another_router_call, "model.layers.1.mlp", "does not call its experts with"),
    "unknown scoring in one layer": (lambda: with_router(odd_router, 1), "model.layers.1.mlp", "unknown way"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name_with_the_reason(case: str) -> None:
    make, named, reason = REFUSED[case]
    with pytest.raises(ModelError) as caught:
        find_moe_layers(make())
    message = str(caught.value)
    assert named in message
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("case", ["mixtral", "unknown scoring"])
def test_reading_a_model_leaves_nothing_on_it(case: str) -> None:
    model = tiny_model(case) if case in FAMILIES else REFUSED[case][0]()
    with contextlib.suppress(ModelError):
        find_moe_layers(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_probabilities_in_the_place_of_logits_are_taken_back() -> None:
    """Rows that sum to one are a softmax; its logarithm gives the same routing, also among allowed experts."""

    def forward(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shares = nn.functional.linear(hidden.reshape(-1, HIDDEN), self.weight).softmax(-1)
        values, indices = shares.topk(self.top_k, dim=-1)
        return shares, values / values.sum(-1, keepdim=True), indices

    plain = find_moe_layers(tiny_model("mixtral"))[0]
    layer = find_moe_layers(with_router(forward, 0))[0]
    assert (plain.logits_are_probabilities, layer.logits_are_probabilities) == (False, True)
    hidden = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(3))
    allowed = torch.arange(EXPERTS) % 2 == 0
    with torch.no_grad():
        wanted = plain.rule.route(plain.logits_of(plain.router(hidden)), allowed)
        found = layer.rule.route(layer.logits_of(layer.router(hidden)), allowed)
    torch.testing.assert_close(by_expert(*found), by_expert(*wanted))


def test_fingerprint_is_of_the_routers_alone() -> None:
    model = tiny_model("olmoe")
    before = router_fingerprint(find_moe_layers(model))
    assert router_fingerprint(find_moe_layers(tiny_model("olmoe"))) == before
    assert router_fingerprint(find_moe_layers(tiny_model("qwen3_moe"))) != before
    layer = find_moe_layers(model)[1]
    with torch.no_grad():
        next(layer.experts.parameters()).add_(1.0)
        assert router_fingerprint(find_moe_layers(model)) == before
        assert router_fingerprint(find_moe_layers(model.bfloat16())) == before
        next(layer.router.parameters())[3, 5] += 0.5
        assert router_fingerprint(find_moe_layers(model)) != before


def filled_cache(model: PreTrainedModel, rows: int) -> DynamicCache:
    with torch.no_grad():
        return model(input_ids=words(rows, 4), use_cache=True).past_key_values


def test_only_one_token_on_a_filled_cache_is_a_decode_step() -> None:
    model = tiny_model("mixtral")
    cache = filled_cache(model, 3)
    step = read_call(model, (), {"input_ids": words(3, 1), "past_key_values": cache})
    assert step is not None
    assert step.active is not None
    assert step.active.all()
    embedded = read_call(model, (), {"inputs_embeds": torch.zeros(3, 1, HIDDEN), "past_key_values": cache})
    assert embedded is not None
    assert read_call(model, (words(3, 1),), {"past_key_values": cache}) is not None, "ids given by position"
    assert read_call(model, (), {"input_ids": words(3, 2), "past_key_values": cache}) is None, "chunk of a prompt"
    assert read_call(model, (), {"input_ids": words(3, 1)}) is None, "no cache"
    assert read_call(model, (), {"input_ids": words(3, 1), "past_key_values": None}) is None
    assert read_call(model, (), {"input_ids": words(3, 1), "past_key_values": DynamicCache()}) is None, "empty cache"


def test_ended_and_masked_rows_do_not_run() -> None:
    model = tiny_model("mixtral")
    cache = filled_cache(model, 3)
    ids, mask = words(3, 1), torch.ones(3, 5, dtype=torch.long)
    ids[1] = PAD
    mask[2, -1] = 0
    step = read_call(model, (), {"input_ids": ids, "attention_mask": mask, "past_key_values": cache})
    assert step is not None
    assert step.active is not None
    assert step.active.tolist() == [True, False, False]


def test_without_a_padding_token_the_first_end_token_stands_for_it() -> None:
    """As in `generate`, which then feeds ended sequences with it."""
    model = tiny_model("mixtral")
    assert model.generation_config is not None
    cache = filled_cache(model, 3)
    ids = words(3, 1)
    ids[1] = EOS
    for end in (EOS, [EOS, 2]):
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = None, end
        step = read_call(model, (), {"input_ids": ids, "past_key_values": cache})
        assert step is not None
        assert step.active is not None
        assert step.active.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("given_", "used"), [("batched_mm", "lynx_grouped_mm"), ("grouped_mm", "lynx_grouped_mm"), ("eager", "eager")]
)
def test_experts_run_by_distinct_and_are_put_back(given_: str, used: str) -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation(given_)
    ids = words(2, 6)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with experts_by_distinct(model):
            assert model.get_experts_implementation()[""] == used
            torch.testing.assert_close(model(input_ids=ids).logits, before)
        assert model.get_experts_implementation()[""] == given_
        with pytest.raises(IndexError), experts_by_distinct(model):
            model(input_ids=ids + 1000)
        assert model.get_experts_implementation()[""] == given_
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_rows_with_weight_zero_are_not_run(name: str) -> None:
    """A left out assignment may point anywhere: its expert is not read, which weights of NaN would tell."""
    model = tiny_model(name)
    layer = find_moe_layers(model)[0]
    hidden, weights = torch.randn(6, HIDDEN), torch.rand(6, TOP_K)
    indices = torch.randint(0, EXPERTS - 1, (6, TOP_K))
    with torch.no_grad():
        wanted = layer.experts(hidden, indices, weights.masked_fill(torch.eye(6, TOP_K).bool(), 0.0))
        for parameter in layer.experts.parameters():
            parameter[EXPERTS - 1] = math.nan
        broken = indices.masked_fill(torch.eye(6, TOP_K).bool(), EXPERTS - 1)
        with experts_by_distinct(model):
            found = layer.experts(hidden, broken, weights.masked_fill(torch.eye(6, TOP_K).bool(), 0.0))
        torch.testing.assert_close(found, wanted)
