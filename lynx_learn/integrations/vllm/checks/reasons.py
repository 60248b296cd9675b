"""Everything in an engine's configuration and model that skipping cannot act with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ....errors import LynxError, OptionError
from ....selector.config import SelectorConfig
from ..settings import AUDIT_EVERY, BUDGET, KEY, SUPPORTED, Settings, UnsupportedError, engine_version

# Until tests/test_vllm_gpu.py has passed on a GPU.
CUDA_GRAPHS_REFUSED = True

# Drafts that the model alone verifies. Others need its hidden states or are layers beside its own (EAGLE, MTP, Medusa), or
# take drafts back behind the scheduler (ngram_gpu).
SPECULATIONS = ("ngram", "draft_model")


class Reason(NamedTuple):
    """One thing that skipping cannot act with.

    Attributes:
        text: what it is, and what to do.
        options: what mends it among vLLM's arguments; None, False and 1 stand for leaving one out.
        environment: what mends it in the environment.
        mistake: it is a setting of this package that cannot be used, which is no matter of what vLLM runs.
    """

    text: str
    options: Mapping[str, Any] = {}
    environment: Mapping[str, str] = {}
    mistake: bool = False


def reasons(config: Any, settings: Settings) -> list[Reason]:
    """Everything that is known before weights are: of the settings, the engine and the model."""
    from ....selector.selector import LynxSelector

    try:
        selector = LynxSelector.from_pretrained(settings.selector)
    except LynxError as error:
        return [Reason(str(error), mistake=True), *known_reasons(config)]
    try:
        selector.config.calibrated(settings.budget)
    except OptionError as error:
        mend = _other_budget(config.additional_config, selector.config, settings.budget)
        return [mend._replace(text=str(error)), *known_reasons(config, selector.config)]
    return known_reasons(config, selector.config) + audit_reasons(config, settings) if settings.budget else []


def known_reasons(config: Any, selector: SelectorConfig | None = None) -> list[Reason]:
    found = engine_version()
    if not found.startswith(SUPPORTED):
        return [Reason(f"vLLM {found or 'of unknown version'} is not supported: install {SUPPORTED}x")]
    try:
        return engine_reasons(config) + (model_reasons(config.model_config, selector) if selector else [])
    except AttributeError as error:
        return [Reason(f"this vLLM is built otherwise than the plugin expects ({error})")]


def _other_budget(given: object, selector: SelectorConfig, budget: float) -> Reason:
    """Leads to the largest calibrated budget below the one that was asked for."""
    known = sorted(float(text) for text in selector.thresholds.get("kl", ()))
    if not known:
        return Reason("", mistake=True)
    nearest = max((one for one in known if one <= budget), default=known[0])
    return _other_setting(given, "budget", BUDGET, nearest)._replace(mistake=True)


def _other_setting(given: object, name: str, variable: str, value: float) -> Reason:
    """Leads to another value of a setting, where it was set."""
    own = given.get(KEY) if isinstance(given, Mapping) else None
    if isinstance(own, Mapping) and name in own:
        assert isinstance(given, Mapping)
        return Reason("", {"additional_config": {**given, KEY: {**own, name: value}}})
    return Reason("", environment={variable: f"{value:g}"})


def engine_reasons(config: Any) -> list[Reason]:
    """Engines in which the wrapped places would not be called, or not with the rows that they expect."""
    parallel, compilation = config.parallel_config, config.compilation_config
    found: list[Reason] = []
    if compilation.cudagraph_mode and CUDA_GRAPHS_REFUSED:
        text = "skipping in CUDA graphs was never tried on a GPU: add --compilation-config.cudagraph_mode NONE"
        found.append(Reason(text, {"compilation_config.cudagraph_mode": type(compilation.cudagraph_mode)["NONE"]}))
    if (speculation := config.speculative_config) is not None:
        kind = speculation.method if speculation.method not in SPECULATIONS else ""
        if speculation.enable_adaptive_verification:
            kind = "adaptive verification"
        if kind:
            text = f"speculative decoding with {kind} was never tried: take {' or '.join(SPECULATIONS)}, or turn it off"
            found.append(Reason(text, {"speculative_config": None}))
    if config.lora_config is not None:
        found.append(
            Reason("LoRA changes the experts that the selector was trained for: turn it off", {"enable_lora": False})
        )
    sizes = {
        "pipeline": ("pipeline_parallel_size",),
        "data": ("data_parallel_size",),
        "context": ("prefill_context_parallel_size", "decode_context_parallel_size"),
    }
    for kind, names in sizes.items():
        if split := {name: 1 for name in names if getattr(parallel, name) > 1}:
            text = f"{kind} parallelism is not supported: use tensor or expert parallelism alone"
            if kind == "pipeline":  # the model needs as many devices as before
                split["tensor_parallel_size"] = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
            found.append(Reason(text, split))
    if parallel.use_ubatching:
        found.append(Reason("micro-batches (DBO) are not supported: turn them off", {"enable_dbo": False}))
    if parallel.enable_eplb:
        found.append(Reason("expert load balancing is not supported: turn it off", {"enable_eplb": False}))
    return found


def audit_reasons(config: Any, settings: Settings) -> list[Reason]:
    """Engines in which a step cannot be run twice."""
    if not settings.audit_every:
        return []
    off = f"turn the audit off ({AUDIT_EVERY}=0)"
    texts = {
        f"an audit runs a step twice, and this model's recurrent state would advance twice: {off}": (
            config.model_config.has_inner_state
        ),
        f"an audit runs a step twice, and the KV connector would save what it writes first: {off}": (
            config.kv_transfer_config is not None
        ),
        f"an audit cannot run a whole CUDA graph of model runner V2 twice: {off}": (
            config.use_v2_model_runner and config.compilation_config.cudagraph_mode
        ),
    }
    mend = _other_setting(config.additional_config, "audit_every", AUDIT_EVERY, 0)
    return [mend._replace(text=text) for text, applies in texts.items() if applies]


def recording_reasons(config: Any) -> list[Reason]:
    """Engines that traces cannot be collected from."""
    found = engine_reasons(config)
    if config.compilation_config.mode:
        text = "compiled graphs run past what records traces: add --enforce-eager"
        found.append(Reason(text, {"enforce_eager": True}))
    if config.use_v2_model_runner:
        name = "VLLM_USE_V2_MODEL_RUNNER"
        text = f"traces are not recorded in vLLM's model runner V2: set {name}=0"
        found.append(Reason(text, environment={name: "0"}))
    if kind := config.model_config.quantization:
        text = f"vLLM runs this model quantized ({kind}), which was never recorded: collect with --engine transformers"
        found.append(Reason(text))
    return found


def check(found: Sequence[Reason]) -> None:
    """Refuse, all at once, what no mending is offered for.

    Raises:
        UnsupportedError: there is any.
    """
    if found:
        raise UnsupportedError("; ".join(reason.text for reason in found))


def model_reasons(model: Any, selector: SelectorConfig) -> list[Reason]:
    """Models that are plainly not the selector's. Their routers are compared when they are loaded."""
    kind = (model.architectures or ["this model"])[0]
    if model.runner_type != "generate" or model.is_diffusion:
        return [Reason(f"{kind} generates no text token by token: load a causal language model")]
    if not model.get_num_experts():
        return [Reason(f"{kind} has no MoE layer that can be acted on: load a Mixture-of-Experts model")]
    found = []
    own = (model.get_num_experts(), model.get_hidden_size())
    if own != (selector.num_experts, selector.hidden_size):
        found.append(
            Reason(
                f"the selector is for {selector.num_experts} experts of width {selector.hidden_size} ({selector.base_model}), "
                f"{kind} has {own[0]} of width {own[1]}: load the model it was trained for"
            )
        )
    # A checkpoint that is quantized itself may be the selector's own: its values are then those that were trained on.
    online = getattr(model.hf_config, "quantization_config", None) is None
    if model.quantization and (online or _last(model.model) != _last(selector.base_model)):
        text = f"{kind} is quantized ({model.quantization}) as {selector.base_model} was not when the budget was measured: "
        found.append(Reason(f"{text}serve it as it was", {"quantization": None} if online else {}))
    if model.using_transformers_backend():
        text = f"{kind} is routed by the model's own code, of which the engine knows no logits: leave --model-impl out"
        found.append(Reason(text, {"model_impl": None} if model.model_impl != "auto" else {}))
    return found


def _last(name: str) -> str:
    """A model's own name, out of a folder of Hugging Face's cache too."""
    parts = Path(name).parts
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return (cached or parts or ("",))[-1].lower()
