"""Train a small MoE language model on math, code and prose: the reference MoE, and a second one of another kind.

    python train/reference_moe.py --config train/reference-moe.yaml
    python train/reference_moe.py --config train/reference-moe-50m.yaml
    python train/reference_moe.py --config train/second-moe.yaml

The run is a folder: tokenizer, token files, checkpoints, logs, and at the end `model/`; that of the first recipe is what
ships in `lynx_learn/reference_moe/`. Started again with the same folder it continues from its last checkpoint. The budget is
in tokens, and the learning rate follows the share of it that is spent, so a run that is broken off and gone on with on
another machine is the same run.
"""

import gzip
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from jsonargparse import auto_cli
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from lynx_learn.moe.families import MoeLayer, find_moe_layers
from lynx_learn.moe.hooks import Routing, intercept
from lynx_learn.moe.loading import has_native_bfloat16
from lynx_learn.traces.documents import read_documents

END, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Options:
    """What the recipe file sets.

    Attributes:
        corpus: folder with one `.jsonl.gz` per source; the run reads the `fit` split of each.
        heldout: folder of test text, for the card's loss per source; never trained or selected on.
        out: folder of the run.
        mix: share of each source among the training windows.
        model: `model_type` and the other fields of its transformers configuration.
        tokens: tokens to train on, summed over restarts.
        windows: windows of `max_position_embeddings` tokens in a step.
        long_share: share of the budget, at the end, in which windows stay whole; before, they are cut in two.
        rate: peak learning rate of AdamW.
        router_rate: factor on `rate` for the routers; a slow router keeps its gates flat.
        balance, z_loss, flatness: weights of the load-balancing loss (per layer), of the router z-loss
            (arXiv 2202.08906) and of the mean sum of squared gate weights, which flattens the top-k weights.
        bias_rate: step of the routers' choice bias towards equal load, where they have one (DeepSeek-V3, arXiv 2412.19437).
        checkpoint_steps: a checkpoint to resume from is written this often.
        seed: of the initial weights and the order of the text.
    """

    corpus: str
    heldout: str
    out: str
    mix: dict[str, float]
    model: dict[str, Any]
    tokens: int = 13_000_000
    windows: int = 8
    long_share: float = 0.2
    warmup_share: float = 0.02
    decay_share: float = 0.6
    rate: float = 6e-3
    router_rate: float = 0.25
    weight_decay: float = 0.1
    balance: float = 0.01
    z_loss: float = 1e-3
    flatness: float = 0.02
    bias_rate: float = 0.0
    checkpoint_steps: int = 100
    seed: int = 0


def train_tokenizer(options: Options, path: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits one by one, on an equal share of every source."""
    if not path.exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\d|\s+(?=\S)|[^\s\d]+|\s+"), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=options.model["vocab_size"],
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(_sample(options, 8_000_000), trainer)
        wrapped = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=END, pad_token=PAD)
        wrapped.save_pretrained(path)
    return PreTrainedTokenizerFast.from_pretrained(path)


def _sample(options: Options, characters: int) -> Iterator[str]:
    for source in options.mix:
        seen = 0
        for document in read_documents(f"{options.corpus}/{source}.jsonl.gz", "fit"):
            seen += len(document.text)
            yield document.text
            if seen > characters:
                break


def tokenize(options: Options, tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, Path]:
    """Token files (uint16), one per source, documents joined by the end-of-text token."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {source: folder / f"{source}.bin" for source in options.mix}
    for source, path in files.items():
        if path.exists():
            continue
        with open(f"{path}.part", "wb") as out:
            texts: list[str] = []
            for document in read_documents(f"{options.corpus}/{source}.jsonl.gz", "fit"):
                texts.append(document.text)
                if len(texts) == 256:
                    out.write(_encode(tokenizer, texts))
                    texts = []
            out.write(_encode(tokenizer, texts))
        os.replace(f"{path}.part", path)
    return files


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> bytes:
    rows = tokenizer(texts)["input_ids"] if texts else []
    return b"".join(np.asarray([*row, tokenizer.eos_token_id], dtype=np.uint16).tobytes() for row in rows)


class Windows:
    """Endless random windows `(windows, length + 1)`; the step number is its whole state, so a run resumes exactly."""

    def __init__(self, files: dict[str, Path], options: Options, length: int) -> None:
        self.tokens = [np.memmap(path, dtype=np.uint16, mode="r") for path in files.values()]
        shares = np.array([options.mix[source] for source in files])
        self.shares = shares / shares.sum()
        self.options, self.length, self.step = options, length, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            rng = np.random.default_rng([self.options.seed, self.step])
            picks = rng.choice(len(self.tokens), size=self.options.windows, p=self.shares)
            starts = rng.random(len(picks))
            rows = []
            for source, start in zip(picks, starts, strict=True):
                tokens = self.tokens[source]
                begin = int(start * (len(tokens) - self.length - 1))
                rows.append(tokens[begin : begin + self.length + 1].astype(np.int64))
            self.step += 1
            yield torch.from_numpy(np.stack(rows))

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class ReferenceMoe(L.LightningModule):
    """Next-token loss plus the router losses; the learning rate follows the share of the tokens seen."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options.model))
        self.model.set_experts_implementation("grouped_mm")
        self.moe_layers = find_moe_layers(self.model)
        self.spent, self.tokens_seen = 0.0, 0
        self.last = time.monotonic()

    @property
    def progress(self) -> float:
        return self.tokens_seen / self.options.tokens

    def configure_optimizers(self) -> torch.optim.Optimizer:
        routers = [p for name, p in self.model.named_parameters() if name.endswith("gate.weight")]
        chosen = {id(p) for p in routers}
        rest = [p for p in self.model.parameters() if id(p) not in chosen]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": self.options.weight_decay, "factor": 1.0},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0, "factor": 1.0},
            {
                "params": routers,
                "weight_decay": self.options.weight_decay,
                "factor": self.options.router_rate,
            },
        ]
        return torch.optim.AdamW(groups, lr=self.options.rate, betas=(0.9, 0.95), fused=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's own refuses fused optimizers under mixed precision, though bfloat16's gradients are not scaled."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or math.inf)

    def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> None:
        o, p = self.options, self.progress
        scale = min(1.0, p / o.warmup_share + 1e-3, max(0.0, 1.0 - p) / o.decay_share)
        for group in self.optimizers().param_groups:
            group["lr"] = o.rate * group["factor"] * scale

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.progress < 1.0 - self.options.long_share:
            half = (batch.shape[1] - 1) // 2
            batch = torch.cat([batch[:, : half + 1], batch[:, half:]])
        logits, routings = run(self.model, self.moe_layers, batch[:, :-1])
        lm = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        balance, z_loss, squares, top1 = router_losses(routings)
        o = self.options
        if o.bias_rate:
            self._even_the_load(routings)
        loss = lm + o.balance * balance + o.z_loss * z_loss + o.flatness * squares
        self.tokens_seen += batch[:, 1:].numel()
        self.log_dict(
            {"lm": lm, "balance": balance, "z": z_loss, "top1_share": top1, "progress": self.progress}, prog_bar=True
        )
        return loss

    @torch.no_grad()
    def _even_the_load(self, routings: list[Routing]) -> None:
        for layer, routing in zip(self.moe_layers, routings, strict=True):
            load = torch.bincount(routing.indices.flatten(), minlength=layer.num_experts).float()
            layer.router.e_score_correction_bias += self.options.bias_rate * (load.mean() - load).sign()

    def on_train_batch_end(self, outputs: Any, batch: torch.Tensor, batch_idx: int) -> None:
        now = time.monotonic()
        self.spent, self.last = self.spent + now - self.last, now
        if self.progress >= 1.0:
            self.trainer.should_stop = True

    def on_train_start(self) -> None:
        self.last = time.monotonic()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["budget"] = {"spent": self.spent, "tokens_seen": self.tokens_seen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.spent, self.tokens_seen = checkpoint["budget"]["spent"], checkpoint["budget"]["tokens_seen"]


def run(model: torch.nn.Module, layers: list[MoeLayer], tokens: torch.Tensor) -> tuple[torch.Tensor, list[Routing]]:
    """The model's logits, and what each of its MoE layers did."""
    routings: list[Routing] = []
    with intercept(model, layers, lambda layer, routing: routings.append(routing)):
        logits = model(tokens, use_cache=False).logits
    return logits, routings


def router_losses(routings: list[Routing]) -> tuple[torch.Tensor, ...]:
    """Means over layers of: load balance, squared log-partition, sum of squared gate weights, top-1 gate weight.

    The balance is taken layer by layer: summed over layers first, it would let an expert starve in one of them.
    """
    balance, z_loss, squares, top1 = [], [], [], []
    for routing in routings:
        logits = routing.logits.float().flatten(0, -2)
        balance.append(load_balancing_loss_func((logits,), logits.shape[-1], routing.indices.shape[-1]))
        z_loss.append(logits.logsumexp(-1).square().mean())
        gates = routing.weights.float()
        gates = gates / gates.sum(-1, keepdim=True)
        squares.append(gates.square().sum(-1).mean())
        top1.append(gates.amax(-1).mean().detach())
    return tuple(torch.stack(values).mean() for values in (balance, z_loss, squares, top1))


@torch.no_grad()
def measure(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, heldout: str, length: int) -> dict[str, Any]:
    """Loss in nats per token, top-1 gate share and heaviest load over mean load, per held-out source."""
    results: dict[str, Any] = {}
    layers = find_moe_layers(model)
    load = torch.zeros(len(layers), layers[0].num_experts)
    for path in sorted(Path(heldout).glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        tokens = np.frombuffer(_encode(tokenizer, texts), dtype=np.uint16).astype(np.int64)
        rows = torch.from_numpy(tokens[: (len(tokens) - 1) // length * length + 1])
        rows = torch.stack([rows[i : i + length + 1] for i in range(0, len(rows) - 1, length)])[:128]
        total, share = 0.0, []
        for batch in rows.split(8):
            logits, routings = run(model, layers, batch[:, :-1])
            total += functional.cross_entropy(
                logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
            ).item()
            for index, routing in enumerate(routings):
                load[index] += torch.bincount(routing.indices.flatten(), minlength=load.shape[1])
            share.append(router_losses(routings)[-1].item())
        results[path.name.split(".")[0]] = {
            "nats_per_token": total / rows[:, 1:].numel(),
            "nats_per_byte": total / len(tokenizer.decode(rows[:, 1:].flatten().tolist()).encode()),
            "tokens": rows[:, 1:].numel(),
            "top1_gate_share": sum(share) / len(share),
        }
    relative = load / load.mean(dim=1, keepdim=True)
    results["load"] = {
        "heaviest_over_mean": relative.max(dim=1).values.tolist(),
        "lightest_over_mean": relative.min(dim=1).values.tolist(),
    }
    return results


def precision() -> Literal["bf16-mixed", "32-true"]:
    """bfloat16 on a GPU, and on a CPU that multiplies in it."""
    return "bf16-mixed" if torch.cuda.is_available() or has_native_bfloat16() else "32-true"


def main(options: Options) -> None:
    """Train (or go on training) the model and write `OUT/model`."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    L.seed_everything(options.seed)
    tokenizer = train_tokenizer(options, out / "tokenizer")
    files = tokenize(options, tokenizer, out / "tokens")
    length = options.model["max_position_embeddings"]
    module = ReferenceMoe(options)
    # Without a counter: with it, a run that goes on would leave its newest state beside the old one, under another name.
    checkpoints = ModelCheckpoint(
        out / "checkpoints",
        save_last=True,
        every_n_train_steps=options.checkpoint_steps,
        save_top_k=1,
        enable_version_counter=False,
    )
    trainer = L.Trainer(
        max_steps=-1,
        max_epochs=-1,
        accelerator="auto",
        devices=1,
        plugins=[LightningEnvironment()],  # inside a cluster's job too
        precision=precision(),
        gradient_clip_val=1.0,
        logger=CSVLogger(out, name="logs"),
        callbacks=[checkpoints],
        log_every_n_steps=20,
        enable_progress_bar=False,
    )
    last = out / "checkpoints" / "last.ckpt"
    trainer.fit(module, Windows(files, options, length), ckpt_path=last if last.exists() else None, weights_only=True)
    model = module.model.cpu().to(torch.bfloat16).eval()
    model.save_pretrained(out / "model", max_shard_size="48MB")  # what common hosts of repositories take as one file
    tokenizer.save_pretrained(out / "model")
    figures = {
        "minutes": module.spent / 60,
        "tokens_seen": module.tokens_seen,
        "steps": trainer.global_step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "precision": trainer.precision,
        "device": str(trainer.strategy.root_device),
        "heldout": measure(model.float(), tokenizer, options.heldout, length // 2),
    }
    if not math.isfinite(figures["heldout"]["load"]["heaviest_over_mean"][0]):
        raise SystemExit("the trained model gives non-finite router logits: lower --rate and train again")
    (out / "model" / "training.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main(auto_cli(Options, as_positional=False))
