"""Writes docs/support.md: `python tests/support_table.py`, with the newest transformers the package allows."""

from pathlib import Path

import transformers
from zoo import NOT_DECODERS, OLDEST, ZOO, build, modeling

from lynx_learn.errors import ModelError
from lynx_learn.moe.families import find_moe_layers

ROOT = Path(__file__).parents[1]


def support_table() -> str:
    """The page, from what the package does with a tiny model of each kind."""
    supported, refused = [], []
    for name, kind in sorted(ZOO.items()):
        try:
            layers = find_moe_layers(build(kind))
        except ModelError as error:
            refused.append(f"| {name} | `{kind.model_class}` | {str(error).partition(f'{name!r} ')[2]} |")
        else:
            rules = " / ".join(dict.fromkeys(layer.rule.describe() for layer in layers))
            supported.append(
                f"| {name} | `{kind.model_class}` | {len(layers)} of 2 | {rules} | {kind.oldest or 'the same'} |"
            )
    return f"""# Supported models

Written by `python tests/support_table.py` with transformers {transformers.__version__}; a test holds it equal to what the package does, and the
tests run with {OLDEST} as well, where the package refuses or transformers lacks a few more. Each row is a tiny model with random weights and two MoE
layers, built from its configuration. For a supported one, tests hold that every block is found, that the scoring rule
gives the router's own experts and weights, that decode with skipping calls fewer distinct experts, that each token then
gets what the kept experts and the surrogates give, and that nothing changes when it is off. Where a multimodal model
has such a model as its text part, that part is listed; a part without a head of its own got one for the test.

## Supported: {len(supported)} model types

| model type | class | MoE layers found | scoring rule | with {OLDEST} |
| --- | --- | --- | --- | --- |
{chr(10).join(supported)}

The rule depends on the configuration (expert groups, normalising, factors); it is found anew in each model.

## Refused: {len(refused)} model types

Each with the message of the error.

| model type | class | reason |
| --- | --- | --- |
{chr(10).join(refused)}

A deepseek_v4 without hashed layers is supported; its default configuration has them.

## Experts in float8

Checkpoints that keep weights in float8 (e4m3) with a scale for each block of rows and columns, as DeepSeek-V3 and Qwen3-FP8 ship
them (`quant_method` fp8 in `config.json`), are supported with transformers 5.17 or newer; 5.16 cannot load them, and is refused:

| where | what runs | what lynx-learn does |
| --- | --- | --- |
| a CPU | transformers dequantizes the weights when it loads them; the package accelerate has to be there | one line says so; trace, selector and decisions are those of a checkpoint with the same values in float32, bit for bit (a test) |
| a GPU below compute capability 8.9 | the same | the same, not run here |
| a newer GPU | transformers' own FP8 modules, by kernels from the Hub (package kernels), which round what enters a product to float8 too | as below |

With FP8 modules hidden states in traces and surrogates are in the type of the activations, an expert's bytes are those that
it has (values and scales), and at decode the products of one call cover the experts that are kept. Kernels were not run here:
tests put products in plain PyTorch in their place, under transformers' own modules. Without rounding what enters, routing,
hidden states, decisions and losses are those of the dequantized model to 1e-5. With it, on two tiny models with random weights,
hidden states are at most 20% from it, 90% of the assignments and 85% of the decisions on them are the same, and what skipping loses
is within 0.05 nats (limits of a test). `pytest -m "gpu and network" tests/test_eight_bits.py` runs the real kernels.

A model is identified by what its values stand for, so a selector fits a checkpoint in either form. `train` reads layers from the
checkpoint dequantized, wherever the model runs; no gradient goes through the kernels, so on such a GPU it takes `--tune_steps 0`.

Refused by name: other kinds of 8 bits and fewer as they are, fixed scales of activations (`activation_scheme` static), experts of a
quantized checkpoint read from disk (`offload`), and on machines that dequantize a weight whose sides are no multiples of its
blocks, which transformers 5.19 multiplies out wrongly or not at all: DeepSeek-V3's own `kv_a_proj_with_mqa` (576 rows in blocks
of 128) is one, so that the whole DeepSeek-V3 in float8 needs GPUs that multiply in it.

## No MoE decoders

Of the {len(modeling())} folders of transformers whose code knows of experts, these hold no decoder with MoE blocks.

| folder | what it is |
| --- | --- |
{chr(10).join(f"| {name} | {reason} |" for name, reason in sorted(NOT_DECODERS.items()))}
"""


if __name__ == "__main__":
    (ROOT / "docs" / "support.md").write_text(support_table())
