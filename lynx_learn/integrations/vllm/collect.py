"""`lynx-learn collect --engine vllm`: text through a vLLM engine whose workers keep what their MoE layers were given."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import LynxError, ModelError, OptionError, TraceError
from ...moe.families import moe_blocks
from ...moe.loading import check_tokenizer, folder_revision, hub_commit, model_path, pick_dtype
from ...traces.collect import CollectOptions
from ...traces.format import TracedModel, TraceOptions
from .settings import KEY, RECORD, SUPPORTED, engine_version

SMALLEST_BLOCK = 16
"""Tokens that a block of vLLM's cache holds at least; it keeps one block to itself."""
# What recording needs to be as it is; vLLM's other arguments are the caller's.
OWN = (
    "model",
    "revision",
    "tokenizer",
    "dtype",
    "max_model_len",
    "enforce_eager",
    "enable_prefix_caching",
    "additional_config",
)


class VllmTracer:
    """An engine in this process; its workers are in others where it has several."""

    def __init__(self, asked: CollectOptions) -> None:
        """Start the engine; the entry point of `collect --engine vllm`.

        Raises:
            LynxError: there is no vLLM that the plugin knows, it cannot run the model, or its layers cannot be traced.
        """
        name, length, batch_size, options = asked.model, asked.length, asked.batch_size, asked.engine_options
        if taken := sorted(set(options) & set(OWN)):
            raise OptionError(f"--engine_options has {taken[0]}, which collect sets itself: leave it out")
        if not (found := engine_version()).startswith(SUPPORTED):
            raise OptionError(
                f"--engine vllm needs vLLM {SUPPORTED}x in this environment (found: {found or 'none'}): install it, or leave --engine out"
            )
        # The traces come from a worker through the engine; read by vLLM when it is imported.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        path = model_path(name)
        commit = hub_commit(path)
        structure = read_structure(name, path, commit)
        from vllm import LLM
        from vllm.platforms import current_platform

        # Sampling is asked for in full: the model's own generation config has no say.
        own: dict[str, Any] = {"max_num_seqs": batch_size, "use_tqdm_on_load": False, "generation_config": "vllm"}
        if current_platform.is_cpu() and "kv_cache_memory_bytes" not in options:
            # Left to itself vLLM takes most of the machine's memory there, which takes longer than the text.
            own["num_gpu_blocks_override"] = batch_size * -(-(length + 1) // SMALLEST_BLOCK) + 1
        try:
            self.engine = LLM(
                model=path,
                revision=commit,
                tokenizer_revision=commit,
                dtype=pick_dtype(name, asked.dtype, torch.device(current_platform.device_type)),
                max_model_len=length + 1,
                enforce_eager=True,
                enable_prefix_caching=False,
                additional_config={KEY: {RECORD: structure.blocks}},
                **{**own, **options},
            )
        except LynxError:
            raise
        except Exception as error:  # vLLM raises many kinds; to the user they are one
            # The first lines: of a validation error, the second names the option and the third says what is wrong.
            reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:3]) or type(error).__name__
            raise ModelError(
                f"vLLM cannot run {name!r} ({reason}): see --engine_options, or leave --engine out"
            ) from error
        self.tokenizer = self.engine.get_tokenizer()
        check_tokenizer(name, self.tokenizer, int(structure.config.get_text_config().vocab_size))
        said = self.engine.collective_rpc("lynx_describe")[0]
        self.model = TracedModel(
            model=name,
            revision=commit or folder_revision(Path(path)),
            model_type=str(structure.config.model_type),
            expert_bytes=structure.expert_numbers * getattr(torch, said["dtype"]).itemsize,
            **said,
        )

    def run(self, rows: Tensor, options: TraceOptions, shard: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """One request for each row. What a request generates last is run by no step, so one token more is asked for."""
        from vllm import SamplingParams

        more = options.length - rows.shape[1] + 1
        first = options.seed * 1_000_003 + shard * options.sequences_per_shard
        sampling = [
            SamplingParams(
                temperature=1.0, seed=first + row, max_tokens=more, min_tokens=more, ignore_eos=True, detokenize=False
            )
            for row in range(len(rows))
        ]
        prompts = [{"prompt_token_ids": row} for row in rows.tolist()]
        outputs = self.engine.generate(prompts, sampling, use_tqdm=False)
        generated = torch.tensor([list(output.outputs[0].token_ids)[:-1] for output in outputs], dtype=torch.int64)
        wanted = torch.cat([rows, generated.view(len(rows), -1)], dim=1)
        tokens, layers = self.engine.collective_rpc("lynx_take", args=(options.length,))[0]
        if not torch.equal(tokens, wanted):
            raise TraceError("vLLM ran other tokens than it was given: its traces cannot be collected")
        return wanted, layers

    def close(self) -> None:
        """End the engine and its workers, so that another one can be started in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


class Structure(NamedTuple):
    """What a configuration says of a model's MoE layers."""

    config: Any
    blocks: tuple[str, ...]
    """As transformers names them."""
    experts: int
    """Of a block."""
    expert_numbers: int
    """Numbers in the weights of one expert."""


def read_structure(name: str, path: str, commit: str | None = None) -> Structure:
    """The structure of a model, from its configuration; no weight is read.

    Raises:
        ModelError: transformers does not know the model, or it has no MoE block.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, revision=commit or "main")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model {name!r} cannot be loaded ({reason}): give a folder or Hub id of a causal language model"
        ) from error
    blocks = list(moe_blocks(model))
    stacked = [p for _, _, experts in blocks[:1] for p in experts.parameters() if p.ndim > 1]
    if not stacked:
        raise ModelError(
            f"model {name!r} has no Mixture-of-Experts block of a known shape: `lynx-learn inspect` says more"
        )
    names, experts = tuple(block for block, _, _ in blocks), min(p.shape[0] for p in stacked)
    return Structure(config, names, experts, sum(p.numel() // p.shape[0] for p in stacked))
