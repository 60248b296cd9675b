"""Whether skipping can act in an engine, read off its configuration before any weight is: all reasons at once, and the
command that works."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, fields, replace
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import LynxError, OptionError
from ...selector.config import SelectorConfig
from .settings import (
    BUDGET,
    KEY,
    ON_UNSUPPORTED,
    SUPPORTED,
    Settings,
    UnsupportedError,
    engine_version,
    read_settings,
    recorded,
    warn,
)

# Options of vLLM's command that have no meaning without the one that they belong to; a `*` stands for any end.
BELONGS = {
    "speculative_config": ("spec_*",),
    "enable_lora": ("lora_*", "max_lora*", "max_cpu_loras", "fully_sharded_loras", "default_mm_loras"),
    "data_parallel_size": ("data_parallel_*",),
    "enable_eplb": ("eplb_*", "num_redundant_experts"),
    "enable_dbo": ("dbo_*", "ubatch_size"),
}

# Until tests/test_vllm_gpu.py has passed on a GPU.
CUDA_GRAPHS_REFUSED = True


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


Again = Callable[[Mapping[str, Any], Mapping[str, str]], Any]
"""Makes the configuration once more, with other arguments of vLLM and other variables of the environment."""


def prepare(config: Any, again: Again) -> None:
    """Check a `VllmConfig` that the first process has just made, and give it the settings of the environment, so that
    workers that do not inherit it (Ray's, other nodes') know them, and the key of what was compiled does.

    Raises:
        UnsupportedError: with every reason, ending in the command that works.
    """
    given = config.additional_config
    if recorded(given) is not None:
        told = [reason.text for reason in recording_reasons(config)]
        if config.model_config.quantization:
            told.append(
                f"vLLM runs this model quantized ({config.model_config.quantization}), and `train` reads experts that are "
                "not: collect from those"
            )
        if told:
            raise UnsupportedError("; ".join(told))
        return
    try:
        settings = read_settings(os.environ, given)
    except OptionError as error:
        settings, found = None, [Reason(str(error), mistake=True), *_known(config)]
    else:
        if settings is None:
            return
        found = reasons(config, settings)
    if found:
        if settings is None or settings.on_unsupported != "warn" or any(reason.mistake for reason in found):
            raise UnsupportedError(explain(*behind(found, again)))
        warn("; ".join(reason.text for reason in found))
        settings = settings.untouched()
    assert settings is not None
    if isinstance(given, Mapping):
        config.additional_config = {**given, KEY: settings.to_config()}


def behind(found: Sequence[Reason], again: Again) -> tuple[list[Reason], bool]:
    """The reasons, with those that show only when the others are mended (vLLM compiles nothing where LoRA is, say), and
    whether a configuration with all mended has been made and has none left."""
    found = list(found)
    while True:
        options, environment = mends(found)
        if not options and not environment:
            return found, False
        try:
            config = again(options, environment)
        except Exception:  # vLLM's own checks raise many kinds: then it is not known to work
            return found, False
        known = {reason.text for reason in found}
        more = [reason for reason in _known(config) if reason.text not in known]
        if not more:
            return found, not _known(config)
        found += more


def mends(found: Sequence[Reason]) -> tuple[dict[str, Any], dict[str, str]]:
    """Arguments and variables that mend the reasons, together."""
    options = {name: value for reason in found for name, value in reason.options.items()}
    return options, {name: value for reason in found for name, value in reason.environment.items()}


def make_again(own: Callable[..., Any], args: Any, *more: Any, **kwargs: Any) -> Again:
    """For `behind`: `own` makes a configuration of `args`, of which a copy is kept as it is now."""
    before = copy(args)
    defaults = {part.name: part for part in fields(args)}

    def again(options: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
        other = copy(before)
        for part in defaults.values():
            for name in options:
                if _belongs(part.name, name):
                    made = part.default if part.default_factory is MISSING else part.default_factory()
                    setattr(other, part.name, made)
        for name, value in options.items():
            outer, _, inner = name.partition(".")
            if not _left_out(value):
                setattr(other, outer, replace(getattr(other, outer), **{inner: value}) if inner else value)
        saved = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            return own(other, *more, **kwargs)
        finally:
            for name, value in saved.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    return again


def reasons(config: Any, settings: Settings) -> list[Reason]:
    """Everything that is known before weights are: of the settings, the engine and the model."""
    from ...selector.selector import LynxSelector

    try:
        selector = LynxSelector.from_pretrained(settings.selector)
    except LynxError as error:
        return [Reason(str(error), mistake=True), *_known(config)]
    try:
        selector.config.calibrated(settings.budget)
    except OptionError as error:
        mend = _other_budget(config.additional_config, selector.config, settings.budget)
        return [mend._replace(text=str(error)), *_known(config, selector.config)]
    return _known(config, selector.config) if settings.budget else []


def _known(config: Any, selector: SelectorConfig | None = None) -> list[Reason]:
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
    own = given.get(KEY) if isinstance(given, Mapping) else None
    if isinstance(own, Mapping) and "budget" in own:
        assert isinstance(given, Mapping)
        return Reason("", {"additional_config": {**given, KEY: {**own, "budget": nearest}}}, mistake=True)
    return Reason("", environment={BUDGET: f"{nearest:g}"}, mistake=True)


def engine_reasons(config: Any) -> list[Reason]:
    """Engines in which the wrapped places would not be called, or not with the rows that they expect."""
    parallel, compilation = config.parallel_config, config.compilation_config
    found: list[Reason] = []
    if compilation.cudagraph_mode and CUDA_GRAPHS_REFUSED:
        text = "skipping in CUDA graphs was never tried on a GPU: add --compilation-config.cudagraph_mode NONE"
        found.append(Reason(text, {"compilation_config.cudagraph_mode": "NONE"}))
    if config.speculative_config is not None:
        text = "speculative decoding has no steps of one token per request: turn it off"
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
    return found


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


def explain(found: Sequence[Reason], works: bool) -> str:
    """All reasons, and the command that mends those that something in the command or the environment mends."""
    told = found[0].text if len(found) == 1 else f"skipping cannot act here, for {len(found)} reasons:"
    if not any(reason.mistake for reason in found):
        told += f" (or set {ON_UNSUPPORTED}=warn to serve untouched)"
    lines = [told, *(f"{number}. {reason.text}" for number, reason in enumerate(found, 1) if len(found) > 1)]
    mending = [reason for reason in found if reason.options or reason.environment]
    if mending and (command := mended(mending)):
        whole = works and len(mending) == len(found)
        lines += ["this works:" if whole else "with what an option can mend:", command]
    return "\n".join(lines)


def mended(found: Sequence[Reason]) -> str:
    """The command that this process was started with, or the call of `LLM`, with what mends the reasons; empty where an
    option to leave out stands in a file."""
    options, environment = mends(found)
    prefix = "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items())
    words = server_command()
    if words is None:
        call = ", ".join(["LLM(…", *(_argument(name, value) for name, value in options.items())]) + ")"
        return prefix + call if options else f"{prefix}python …"
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    actions = make_arg_parser(FlexibleArgumentParser())._actions
    for name, value in options.items():
        kept = without(words, [action for action in actions if _belongs(action.dest, name)])
        if len(kept) == len(words) and "--config" in words and _left_out(value):
            return ""
        outer, dot, inner = name.partition(".")
        option = f"--{outer.replace('_', '-')}{dot}{inner}"
        more = [] if value is True else [json.dumps(value) if isinstance(value, Mapping) else str(value)]
        words = kept if _left_out(value) else [*kept, option, *more]
    return prefix + shlex.join(words)


def _argument(name: str, value: Any) -> str:
    outer, _, inner = name.partition(".")
    return f"{outer}={ {inner: value} }" if inner else f"{name}={value!r}"


def _left_out(value: Any) -> bool:
    """Whether a value of an argument is what it is when it is not given."""
    return value is None or value is False or (value == 1 and value is not True)


def _belongs(other: str, name: str) -> bool:
    rules = BELONGS.get(name, ())
    return other == name or any(other.startswith(rule[:-1]) if rule[-1] == "*" else other == rule for rule in rules)


def server_command() -> list[str] | None:
    """The words that started this process, if they are those of a server of vLLM and no other program's."""
    words = list(sys.orig_argv)
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    if parent_process() is not None:
        return None
    if len(words) > 1 and Path(words[1]).name == "vllm":
        return ["vllm", *words[2:]]
    return words if main is not None and main.name.startswith("vllm.") else None


def without(words: Sequence[str], actions: Iterable[Any]) -> list[str]:
    """A command without the options of some of its parser's actions, however they are written (`--a-b 1`, `--a_b=1`, `--a.b 1`)."""
    forms = {form: action for action in actions for form in action.option_strings}
    kept: list[str] = []
    dropped = None  # the option whose values come next, and how many of them there have been
    for word in words:
        if not word.startswith("-") and dropped is not None and (dropped[0] != 1 or not dropped[1]):
            dropped = (dropped[0], dropped[1] + 1)
            continue
        dropped = None
        form = word.partition("=")[0].partition(".")[0].rstrip("+").replace("_", "-")
        if not word.startswith("-") or form not in forms:
            kept.append(word)
        elif "=" not in word and forms[form].nargs != 0:
            dropped = (1 if forms[form].nargs is None else 0, 0)
    return kept
