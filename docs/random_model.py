"""Write a model of a known shape with random weights, and a selector for it: for timing servers, where only sizes count.

python docs/random_model.py --shape qwen3-half --layers 4 --fraction 0.51 --out runs/random

The selector's one "budget" is no loss: it stands for the threshold that keeps this share of the distinct experts.
"""

from pathlib import Path

import torch
from jsonargparse import auto_cli
from transformers import AutoTokenizer

from lynx_learn import reference_moe
from lynx_learn.decode.bench import BenchOptions, keeping
from lynx_learn.decode.shapes import random_selector, shaped_model
from lynx_learn.decode.timing import with_threads
from lynx_learn.moe.loading import fast_dtype

BUDGET = "1.0"


def write(out: str, shape: str = "qwen3-half", layers: int = 4, fraction: float = 0.51, batch_size: int = 16) -> None:
    """Write `model` and `selector` into a folder.

    Args:
        out: folder, new or empty.
        shape: as in `lynx-learn bench`.
        layers: of the model.
        fraction: share of the distinct experts that a batch keeps.
        batch_size: tokens of the batches that the threshold is found on; it holds for any number.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: choose another --out, or remove it")
    tokenizer = AutoTokenizer.from_pretrained(reference_moe())
    options = BenchOptions(out, shape=shape, layers=layers, fraction=fraction)
    model = shaped_model(shape, layers, torch.device("cpu"), torch.bfloat16)
    if int(model.config.vocab_size) < len(tokenizer):  # type: ignore[union-attr,arg-type]
        raise SystemExit(f"--layers {layers} leaves fewer words than the tokenizer has ({len(tokenizer)}): take more")
    selector = random_selector(model, options.surrogate_share)
    length = options.prompt + options.steps
    tokens = torch.randint(3, len(tokenizer), (batch_size, length), generator=torch.Generator().manual_seed(0))
    model.to(fast_dtype(torch.bfloat16, torch.device("cpu")))  # an emulated type would take minutes
    with with_threads(1):
        policy = keeping(model, selector, tokens, options)
    model.to(torch.bfloat16)
    model.save_pretrained(folder / "model")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "model")
    threshold = max(policy.thresholds.items())[1]
    selector.with_config(thresholds={"kl": {BUDGET: {"1": threshold}}}).save_pretrained(folder / "selector")
    print(
        f"{folder}/model and {folder}/selector, at budget {BUDGET} (threshold {threshold:g}): {fraction:.0%} of the distinct experts stay"
    )


if __name__ == "__main__":
    auto_cli(write, as_positional=False)
