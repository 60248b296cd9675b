"""Write the model card of a trained reference MoE from its `training.json` and the list of sources.

python train/reference_card.py --model runs/reference-moe/model --config_file train/reference-moe.yaml --sources ../shared/data/sources.json
python train/reference_card.py --model runs/reference-moe-50m/model --config_file train/reference-moe-50m.yaml --sources ../shared/data/sources.json
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import auto_cli


def card(model: str, config_file: str, sources: str) -> None:
    """Write `MODEL/README.md`.

    Args:
        model: folder that `reference_moe.py` wrote.
        config_file: recipe it was trained with.
        sources: JSON with repository and licence of every text source.
    """
    figures = json.loads((Path(model) / "training.json").read_text())
    recipe = yaml.safe_load(Path(config_file).read_text())
    text = render(figures, recipe, config_file, json.loads(Path(sources).read_text()))
    (Path(model) / "README.md").write_text(text)


def render(
    figures: dict[str, Any], recipe: dict[str, Any], config_file: str, sources: dict[str, list[dict[str, Any]]]
) -> str:
    """Markdown of the card."""
    shape = recipe["model"]
    heldout = {name: row for name, row in figures["heldout"].items() if name != "load"}
    load = figures["heldout"]["load"]
    losses = "\n".join(
        f"| {name} | {row['nats_per_token']:.3f} | {row['nats_per_byte']:.3f} | {row['tokens']:,} | {row['top1_gate_share']:.2f} |"
        for name, row in heldout.items()
    )
    balance = "\n".join(
        f"| {layer} | {heavy:.2f} | {light:.2f} |"
        for layer, (heavy, light) in enumerate(zip(load["heaviest_over_mean"], load["lightest_over_mean"], strict=True))
    )
    mix = ", ".join(f"{name} {share:.0%}" for name, share in recipe["mix"].items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {title(config_file)}

A small Mixture-of-Experts language model (Qwen3-MoE, {figures["parameters"]:,} parameters, {shape["num_hidden_layers"]} layers of
{shape["num_experts"]} experts, top-{shape["num_experts_per_tok"]}) for trying and testing expert selection. It is no assistant:
it continues English prose, Python and grade-school mathematics.

Trained by `python train/reference_moe.py --config {config_file}`: {figures["minutes"]:.0f} minutes on
{figures["device"]} ({figures["threads"]} threads), one run, {figures["tokens_seen"]:,} tokens in {figures["steps"]:,} steps; windows by source: {mix}.
Documents whose content hash puts them in the `calibrate` and `test` splits (a fifth) were not trained on.

## Held-out loss
Test sources that were not trained on, first 128 windows of 256 tokens; written by the same run.

| source | nats per token | nats per byte | tokens | top-1 gate weight |
| --- | --- | --- | --- | --- |
{losses}

## Load balance
Load of the heaviest and of the lightest expert over the mean, on the same text.

| layer | heaviest | lightest |
| --- | --- | --- |
{balance}

## Training text

{by_licence(sources)}
"""


def title(config_file: str) -> str:
    """Of the card: the name of the recipe."""
    return Path(config_file).stem.replace("-", " ").replace("moe", "MoE").replace("reference", "Reference")


def by_licence(sources: dict[str, list[dict[str, Any]]]) -> str:
    """One line per licence with its repositories."""
    found: dict[str, set[str]] = defaultdict(set)
    for entries in sources.values():
        for entry in entries:
            repository = str(entry["repo"]).removeprefix("https://github.com/")
            found[str(entry["licence"])].add(repository)
    return "\n".join(f"- {licence}: {', '.join(sorted(names))}" for licence, names in sorted(found.items()))


if __name__ == "__main__":
    auto_cli(card, as_positional=False)
