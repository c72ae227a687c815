"""The run behind `cmlm-fast post-train`: check everything, train, write a plain Hugging Face checkpoint.

    prepare(options)  reads, checks, loads; writes nothing; every bad input is a ValueError or OSError of one line
    run(prepared)     scores the held-out texts, trains, scores again, saves; returns the summary

Example:
    >>> run(prepare(PostTrainOptions(model="bert-base-uncased", train_file="texts.txt", output_dir="out")))
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .backends import use_backend
from .config import CMLMConfig
from .doctor import bfloat16_hardware
from .options import PostTrainOptions, check_numbers, expect
from .output import check_output, disk_errors, open_output, staged
from .pooling import copy_pooling
from .report import plot_curves

if TYPE_CHECKING:
    from datasets import Dataset

    from .data import TextCounts
    from .modeling import CMLMModel
    from .trainer import CMLMTrainer, CMLMTrainingArguments


@dataclass
class Prepared:
    """All that a run needs, checked and in memory."""

    options: PostTrainOptions
    model: CMLMModel
    tokenizer: Any
    train: Dataset
    evaluation: Dataset | None
    counts: TextCounts
    checkpoint: Path | None
    arguments: CMLMTrainingArguments


def prepare(options: PostTrainOptions) -> Prepared:
    """Check the options, read the texts, load tokenizer and model. Writes nothing.

    Raises ValueError, OSError or ModuleNotFoundError, each with one line for the user.
    """
    check_numbers(options)
    config = CMLMConfig.from_preset(options.preset, **options.objective)
    with use_backend(options.backend):
        pass  # an unknown backend is an error now
    checkpoint = check_output(Path(options.output_dir), overwrite=options.overwrite, resume=options.resume)
    expect(Path(options.train_file).exists(), "train_file", "an existing file or folder", options.train_file)
    # What the user must wait for comes after what can be said at once.
    from transformers.trainer_utils import SchedulerType

    schedulers = [scheduler.value for scheduler in SchedulerType]
    expect(options.scheduler in schedulers, "scheduler", f"one of {', '.join(schedulers)}", options.scheduler)
    from .data import clean_texts, load_texts, split_evaluation, tokenize_texts

    tokenizer = _load_tokenizer(options)
    length = options.max_length or min(128, int(tokenizer.model_max_length))
    texts, counts = clean_texts(
        load_texts(options.train_file, text_column=options.text_column, text_pair_column=options.text_pair_column)
    )
    train, held = split_evaluation(texts, options.eval_share, options.seed)
    model = _load_model(options, config)
    _check_fit(model, length)
    arguments = _arguments(options)
    tokens = {"max_length": length, "whole_word": options.whole_word}
    train = tokenize_texts(train, tokenizer, num_proc=_processes(len(train)), **tokens)
    if held is not None:
        held = tokenize_texts(held, tokenizer, num_proc=_processes(len(held)), **tokens)
    return Prepared(options, model, tokenizer, train, held, counts, checkpoint, arguments)


def run(prepared: Prepared) -> dict[str, Any]:
    """Score, train, score, save; returns the summary that is also written to summary.json.

    Raises:
        DiskError: a write failed; says what the folder still holds.
    """
    from transformers import PrinterCallback, ProgressCallback

    from .callbacks import MetricsFile, QuietProgress
    from .trainer import CMLMTrainer

    options, folder = prepared.options, Path(prepared.options.output_dir)
    size = sum(p.numel() * p.element_size() for p in prepared.model.parameters())
    # The checkpoint at the end, and the Trainer's: weights and two moments each, one more than it keeps.
    copies = 1 + (3 * (options.save_total_limit + 1) if options.save_steps else 0)
    open_output(folder, copies * size, fresh=prepared.checkpoint is None)
    metrics = MetricsFile(folder / "metrics.jsonl", prepared.checkpoint)
    with disk_errors(folder), use_backend(options.backend):
        trainer = CMLMTrainer(
            prepared.model, prepared.arguments, train_dataset=prepared.train, eval_dataset=prepared.evaluation,
            processing_class=prepared.tokenizer, callbacks=[metrics],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback if prepared.arguments.disable_tqdm else ProgressCallback)
        trainer.add_callback(QuietProgress())
        before = trainer.evaluate() if prepared.evaluation is not None and prepared.checkpoint is None else {}
        begin = time.perf_counter()
        result = trainer.train(resume_from_checkpoint=str(prepared.checkpoint) if prepared.checkpoint else None)
        seconds = time.perf_counter() - begin
        after = trainer.evaluate() if prepared.evaluation is not None else {}
        summary = _summary(prepared, before or metrics.first_evaluation(), after, result.global_step, seconds)
        _save(trainer, prepared, summary)
    return summary


def _save(trainer: CMLMTrainer, prepared: Prepared, summary: Mapping[str, Any]) -> None:
    folder = Path(prepared.options.output_dir)
    with staged(folder) as staging:
        trainer.model.save_pretrained(staging)
        prepared.tokenizer.save_pretrained(staging)
        copy_pooling(prepared.options.model, staging)
        plot_curves(trainer.state.log_history, staging / "curves.png")
        (staging / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def _summary(prepared: Prepared, before: Mapping[str, float], after: Mapping[str, float], steps: int,
             seconds: float) -> dict[str, Any]:  # fmt: skip
    names = ("perplexity", "masked_accuracy", "token_retrieval", "sequence_retrieval", "alignment", "uniformity", "loss")
    scores = {name: [before.get(f"eval_{name}"), after[f"eval_{name}"]] for name in names if f"eval_{name}" in after}
    return {
        "options": {**asdict(prepared.options), "objective": asdict(prepared.model.cmlm)},
        "texts": prepared.counts._asdict(),
        "sequences": {"train": len(prepared.train), "held_out": len(prepared.evaluation or ())},
        "steps": steps,
        "train_seconds": round(seconds, 2),
        "held_out_before_after": scores,
    }


def _load_tokenizer(options: PostTrainOptions) -> Any:
    from transformers import AutoTokenizer

    path = Path(options.model)
    if path.exists():
        expect((path / "config.json").is_file(), "model", "a folder with a config.json, or a hub id", options.model)
    rule = "a folder, or a hub id that can be reached, with a tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"expected model to be {rule}, got {options.model}: {_line(error)}") from error
    # transformers makes up a tokenizer of special tokens alone where a folder has none.
    expect(len(tokenizer) > len(tokenizer.all_special_ids), "model", rule, options.model)
    expect(tokenizer.mask_token_id is not None, "model", "one whose tokenizer has a mask token", options.model)
    return tokenizer


def _load_model(options: PostTrainOptions, config: CMLMConfig) -> CMLMModel:
    from .modeling import CMLMModel

    try:
        return CMLMModel.from_pretrained(options.model, config, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"expected model to be a masked LM or an encoder, got {options.model}: {_line(error)}") from error


def _processes(texts: int) -> int | None:
    """For tokenising: one a core where there is work for them, else this one."""
    wanted = min(os.cpu_count() or 1, texts // 20_000)
    return wanted if wanted > 1 else None


def _check_fit(model: CMLMModel, length: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None:
        pad = getattr(getattr(model.lm.base_model, "embeddings", None), "padding_idx", None)
        most -= model.cmlm.position_jitter + (0 if pad is None else pad + 1)
        expect(length <= most, "max_length", f"<= {most}, the positions the model has", length)


def _arguments(options: PostTrainOptions) -> CMLMTrainingArguments:
    from .trainer import CMLMTrainingArguments

    gpu = torch.accelerator.is_available()
    fast = bfloat16_hardware() if not gpu else torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
    batches = (options.contrastive_batch_size or options.batch_size) // options.batch_size
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if options.gradient_checkpointing else {}
    return CMLMTrainingArguments(
        output_dir=options.output_dir, num_train_epochs=options.epochs, max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size, per_device_eval_batch_size=options.batch_size,
        max_tokens=options.max_tokens, contrastive_batch_size=options.contrastive_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation * batches, learning_rate=options.learning_rate,
        weight_decay=options.weight_decay, warmup_steps=options.warmup, lr_scheduler_type=options.scheduler,
        bf16=fast and not options.fp16 if options.bf16 is None else options.bf16, fp16=options.fp16,
        seed=options.seed, logging_steps=options.logging_steps,
        save_strategy="steps" if options.save_steps else "no", save_steps=options.save_steps or 500,
        save_total_limit=options.save_total_limit, report_to=options.report_to, use_cpu=not gpu,
        dataloader_pin_memory=gpu, **checkpointing,
    )  # fmt: skip


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
