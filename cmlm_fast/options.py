"""The options of a post-training run, and the rules for its numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class PostTrainOptions:
    """The options of `cmlm-fast post-train`, with their defaults.

    Attributes:
        model: folder or hub id of a checkpoint with a tokenizer.
        train_file: texts, as `data.load_texts` reads them.
        output_dir: folder for the checkpoint, metrics.jsonl, summary.json and curves.png.
        text_column, text_pair_column: columns of the file that hold the texts.
        eval_share: share of the texts held out for scoring; 0 scores nothing.
        preset, objective: a preset of CMLMConfig, and the fields that differ from it.
        freeze_encoder: train the LM head alone; needs a preset with MLM only.
        max_length: tokens per sequence; None: 128, or the model's maximum if that is less.
        whole_word: mask whole words.
        epochs, batch_size, gradient_accumulation, learning_rate, weight_decay, scheduler, seed: as in the Trainer.
        max_tokens: tokens per batch, instead of batch_size; None: batch_size.
        contrastive_batch_size: sequences contrasted together, a multiple of batch_size; gradient_accumulation then counts these
            groups; not with max_tokens.
        max_steps: optimizer steps; -1: as many as `epochs` needs.
        warmup: warm-up steps: a share below 1, or a number.
        bf16: None: if this machine multiplies bfloat16 in hardware.
        fp16, gradient_checkpointing, logging_steps, save_total_limit, report_to: as in the Trainer.
        torch_compile, low_precision_layer_norm: compile the encoder's layers, use 16-bit layer norms; see
            `CMLMTrainingArguments`.
        save_steps: steps between checkpoints; 0: only on a signal.
        resume, overwrite: continue from the newest checkpoint in output_dir, or start over in a folder that is not empty.
        trust_remote_code: run code that comes with the checkpoint.
        backend: which kernels run; see `cmlm_fast.use_backend`. None: the current choice, for example CMLM_FAST_BACKEND.
    """

    model: str
    train_file: str
    output_dir: str
    text_column: str | None = None
    text_pair_column: str | None = None
    eval_share: float = 0.05
    preset: str = "balanced"
    objective: Mapping[str, Any] = field(default_factory=dict)
    freeze_encoder: bool = False
    max_length: int | None = None
    whole_word: bool = False
    epochs: float = 3.0
    max_steps: int = -1
    batch_size: int = 32
    max_tokens: int | None = None
    contrastive_batch_size: int | None = None
    gradient_accumulation: int = 1
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.06
    scheduler: str = "linear"
    bf16: bool | None = None
    fp16: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    low_precision_layer_norm: bool = False
    seed: int = 42
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int = 2
    resume: bool = False
    overwrite: bool = False
    report_to: str = "none"
    trust_remote_code: bool = False
    backend: str | None = None


def expect(condition: bool, argument: str, rule: str, value: object) -> None:
    """Raise the one-line ValueError of the command line unless `condition` holds."""
    if not condition:
        raise ValueError(f"expected {argument} to be {rule}, got {value}")


@contextmanager
def arguments_named(**names: str) -> Iterator[None]:
    """Turn an error about a function argument into one about the option behind it, for example `path="train_file"`."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        found = re.search(r"\bexpected (\w+) to be ", str(error))
        if found is None or found[1] not in names:
            raise
        text = str(error)
        raise type(error)(text[: found.start(1)] + names[found[1]] + text[found.end(1) :]) from error


def first_line(error: BaseException) -> str:
    """First line of another library's error, for a one-line message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_warmup(warmup: float) -> None:
    """Raise ValueError unless `warmup` is a share of the steps or a number of steps."""
    expect(math.isfinite(warmup) and warmup >= 0, "warmup", "finite and >= 0", warmup)
    expect(warmup < 1 or warmup == int(warmup), "warmup", "a share below 1 or a whole number of steps", warmup)


def check_numbers(options: PostTrainOptions) -> None:
    """Raise ValueError if a number breaks its rule."""
    expect(0.0 <= options.eval_share < 1.0, "eval_share", "in [0, 1)", options.eval_share)
    for name in ("batch_size", "gradient_accumulation", "logging_steps", "save_total_limit"):
        expect(getattr(options, name) >= 1, name, ">= 1", getattr(options, name))
    for name in ("max_tokens", "contrastive_batch_size"):
        expect(getattr(options, name) is None or getattr(options, name) >= 1, name, ">= 1", getattr(options, name))
    if options.contrastive_batch_size is not None:
        size, rule = options.contrastive_batch_size, f"a multiple of batch_size = {options.batch_size}"
        expect(options.max_tokens is None, "contrastive_batch_size", "left out with max_tokens", size)
        expect(size % options.batch_size == 0, "contrastive_batch_size", rule, size)
    for name in ("epochs", "learning_rate"):
        value = getattr(options, name)
        expect(math.isfinite(value) and value > 0, name, "finite and > 0", value)
    for name in ("weight_decay", "save_steps"):
        value = getattr(options, name)
        expect(math.isfinite(value) and value >= 0, name, "finite and >= 0", value)
    check_warmup(options.warmup)
    expect(0 <= options.seed < 2**32, "seed", "in [0, 2^32)", options.seed)
    expect(options.max_steps == -1 or options.max_steps >= 1, "max_steps", ">= 1, or -1 for whole epochs", options.max_steps)
    expect(not (options.bf16 and options.fp16), "bf16 and fp16", "at most one of them", "both")
    expect(not options.fp16 or torch.accelerator.is_available(), "fp16", "used with a GPU", "no GPU (bf16 runs on a CPU)")
