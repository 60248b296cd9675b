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

Experts that a checkpoint keeps in float8 (as DeepSeek-V3 and Qwen3-FP8 ship them) are refused by name, by `train` too: they
have to be dequantized first. No such model was run here.

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

## No MoE decoders

Of the {len(modeling())} folders of transformers whose code knows of experts, these hold no decoder with MoE blocks.

| folder | what it is |
| --- | --- |
{chr(10).join(f"| {name} | {reason} |" for name, reason in sorted(NOT_DECODERS.items()))}
"""


if __name__ == "__main__":
    (ROOT / "docs" / "support.md").write_text(support_table())
