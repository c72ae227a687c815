"""The run behind `cmlm-fast post-train`: check everything, train, write a plain Hugging Face checkpoint.

    prepare(options)  reads, checks, loads; writes nothing; every bad input is a one-line ValueError or OSError
    run(prepared)     scores the held-out texts, trains, scores again, saves; returns the summary

Example:
    >>> run(prepare(PostTrainOptions(model="bert-base-uncased", train_file="texts.txt", output_dir="out")))
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import ranks
from .backends import named_backend, use_backend
from .checkpoints import checkpoints
from .config import CMLMConfig
from .errors import Stopped, disk_reason
from .machine import check_backend_here, fast_in_bf16, processes_for
from .options import PostTrainOptions, arguments_named, check_numbers, expect, first_line
from .output import (
    REPORTS,
    SUMMARY,
    check_output,
    disk_errors,
    finished_run,
    open_output,
    staged,
    what_is_kept,
)
from .report import plot_curves
from .same_run import check_settings, fingerprint_of_tokens, fingerprint_of_weights, settings_of, write_settings
from .start import check_vocabulary, load_model, load_tokenizer, sequence_length

if TYPE_CHECKING:
    from datasets import Dataset

    from .callbacks import MetricsFile, StopOnSignal
    from .data import TextCounts
    from .modeling import CMLMModel
    from .trainer import CMLMTrainer, CMLMTrainingArguments

logger = logging.getLogger(__name__)

#: Learning rate schedules that need no parameters of their own.
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")


@dataclass
class Prepared:
    """Everything a run needs, checked and in memory."""

    options: PostTrainOptions
    model: CMLMModel
    tokenizer: Any
    train: Dataset
    evaluation: Dataset | None
    counts: TextCounts
    checkpoint: Path | None
    arguments: CMLMTrainingArguments
    settings: dict[str, Any]  # what a resumed run must share with this one


def prepare(options: PostTrainOptions) -> Prepared:
    """Check the options, read the texts, load tokenizer and model. Writes nothing.

    Raises a ValueError, OSError or ModuleNotFoundError with a one-line message for the user.
    """
    check_numbers(options)
    options = replace(options, **{name: os.fspath(getattr(options, name)) for name in ("model", "train_file", "output_dir")})
    config = CMLMConfig.from_preset(options.preset, **options.objective)
    check_backend_here(options.backend)
    checkpoint = None
    if ranks.is_main():  # the other ranks get it in `run`
        checkpoint = check_output(Path(options.output_dir), overwrite=options.overwrite, resume=options.resume)
    start, folder = Path(options.model).resolve(), Path(options.output_dir).resolve()
    replaced = start == folder or any(path in checkpoints(folder) for path in (start, *start.parents))
    rule = "elsewhere than in output_dir, which overwrite writes anew"
    expect(not (options.overwrite and start.is_dir() and replaced), "model", rule, options.model)
    expect(Path(options.train_file).exists(), "train_file", "an existing file or folder", options.train_file)
    # Slow steps come after the checks that fail at once.
    from transformers import set_seed

    expect(options.scheduler in SCHEDULERS, "scheduler", f"one of {', '.join(SCHEDULERS)}", options.scheduler)
    with_contrast = options.contrastive_batch_size is None or config.sequence_weight > 0
    expect(with_contrast, "contrastive_batch_size", "given with a sequence_weight > 0 only", options.contrastive_batch_size)
    from .data import TokenBudgetSampler, clean_texts, load_texts, sequence_lengths, split_evaluation, tokenize_texts

    tokenizer = load_tokenizer(options.model, options.trust_remote_code)
    columns = {"text_column": options.text_column, "text_pair_column": options.text_pair_column}
    with arguments_named(path="train_file", dataset="train_file", share="eval_share"):
        texts, counts = clean_texts(load_texts(options.train_file, **columns))
        train, held = split_evaluation(texts, options.eval_share, options.seed)
    set_seed(options.seed)  # initialises the projection, and a head that the checkpoint lacks
    model = load_model(options.model, config, options.trust_remote_code)
    known = not options.gradient_checkpointing or model.lm.supports_gradient_checkpointing
    expect(known, "gradient_checkpointing", f"off for {type(model.lm).__name__}, which has none", "on")
    if options.freeze_encoder:
        model.freeze_encoder()
    length = sequence_length(model, tokenizer, options.max_length, config.position_jitter)
    check_vocabulary(model, tokenizer)
    arguments = _arguments(options)
    low = not options.low_precision_layer_norm or arguments.bf16 or arguments.fp16
    expect(low, "low_precision_layer_norm", "used with bf16 or fp16", "float32")
    if options.max_steps > 0:  # otherwise the trainer checks it
        arguments.check_schedule(options.max_steps)
    _check_reports(arguments)
    tokens: dict[str, Any] = {"max_length": length, "whole_word": options.whole_word}
    train = tokenize_texts(train, tokenizer, num_proc=processes_for(len(train)), **tokens)
    if held is not None:
        held = tokenize_texts(held, tokenizer, num_proc=processes_for(len(held)), **tokens)
    if options.max_tokens is not None:  # the sampler checks it
        TokenBudgetSampler(sequence_lengths(train), options.max_tokens, ranks=arguments.world_size)
    settings = settings_of(options, config, arguments) | {"max_length": length, "eval_share": options.eval_share}
    settings |= {"model": fingerprint_of_weights(model), "train_file": fingerprint_of_tokens(train),
                 "held-out texts": fingerprint_of_tokens(held)}  # fmt: skip
    if checkpoint is not None:
        check_settings(Path(options.output_dir), settings)
    return Prepared(options, model, tokenizer, train, held, counts, checkpoint, arguments, settings)


def run(prepared: Prepared) -> dict[str, Any]:
    """Score, train, score, save; returns the summary that is also written to summary.json.

    Raises:
        DiskError: a write failed; the message says what the folder still holds.
        DivergedError: the loss or a weight is not finite.
        Stopped: SIGINT or SIGTERM; if training was under way, it has finished its step and saved a checkpoint.
    """
    from .callbacks import StopOnSignal

    with StopOnSignal() as stop, ExitStack() as opened:
        try:
            return _run(prepared, stop, opened)
        except Stopped as stopped:
            raise Stopped(stopped.signal, what_is_kept(Path(prepared.options.output_dir))) from None


def _run(prepared: Prepared, stop: StopOnSignal, opened: ExitStack) -> dict[str, Any]:
    from transformers import PrinterCallback, ProgressCallback
    from transformers.integrations import TensorBoardCallback

    from .callbacks import MetricsFile, QuietProgress, TrainingTime
    from .trainer import CMLMTrainer

    options, folder = prepared.options, Path(prepared.options.output_dir)
    prepared.checkpoint = ranks.broadcast_from_main(prepared.checkpoint)
    finished: dict[str, Any] | None = ranks.broadcast_from_main(finished_run(folder) if options.resume else None)
    if finished is not None:
        logger.warning("%s holds a finished run: nothing is left to do", folder)
        return finished
    size = sum(p.numel() * p.element_size() for p in prepared.model.parameters())
    # The final checkpoint, and the Trainer's: weights and two moments each, one more than it keeps, but no more than it
    # writes. After a resume the earlier ones exist already.
    saved = 1 if prepared.checkpoint else options.save_total_limit + 1
    if options.save_steps and options.max_steps > 0:
        saved = min(saved, -(-options.max_steps // options.save_steps))
    # Without checkpoints the model is saved once more, with its scores.
    copies = 1 + (3 * saved if options.save_steps else prepared.evaluation is not None)
    fresh = prepared.checkpoint is None
    opening = open_output(folder, copies * size, fresh=fresh)
    ranks.in_turn(lambda: opened.enter_context(opening) if ranks.is_main() else None)
    metrics = MetricsFile(folder / "metrics.jsonl", prepared.checkpoint if ranks.is_main() else None)
    spent = TrainingTime(prepared.checkpoint)
    with disk_errors(folder), use_backend(options.backend or named_backend()), closing(QuietProgress()) as progress:
        if fresh and ranks.is_main():
            write_settings(folder, prepared.settings)
        trainer = CMLMTrainer(
            prepared.model, prepared.arguments, train_dataset=prepared.train, eval_dataset=prepared.evaluation,
            processing_class=prepared.tokenizer, callbacks=[stop, metrics, spent],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback if prepared.arguments.disable_tqdm else ProgressCallback)
        trainer.add_callback(progress)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                # By default it gets the folder when training begins, and would log earlier scores to the working directory.
                callback.logging_dir = str(folder / REPORTS / time.strftime("%Y-%m-%d_%H-%M-%S"))
        before: dict[str, float] = {}
        if prepared.evaluation is not None and fresh:
            if trainer.is_fsdp_enabled:  # FSDP shards model and optimizer together, when training begins
                prepared.arguments.eval_on_start = True
            else:
                before = trainer.evaluate()
        stop.defer = not options.save_steps
        result = trainer.train(resume_from_checkpoint=str(prepared.checkpoint) if prepared.checkpoint else None)
        seconds = spent.seconds()
        if stop.stopped and ranks.broadcast_from_main((folder / f"checkpoint-{result.global_step}").exists()):
            raise Stopped(stop.stopped)
        before = before or metrics.first_evaluation()
        summary = _summary(prepared, before, {}, result.global_step, seconds)
        if stop.defer:  # the trained model is not saved yet, and scoring may take long
            _save(trainer, prepared, summary, metrics)
            stop.release()
        if prepared.evaluation is not None:
            summary = _summary(prepared, before, trainer.evaluate(), result.global_step, seconds)
        if options.save_steps or prepared.evaluation is not None:
            _save(trainer, prepared, summary, metrics)
    return summary


def _save(trainer: CMLMTrainer, prepared: Prepared, summary: Mapping[str, Any], metrics: MetricsFile) -> None:
    folder = Path(prepared.options.output_dir)
    state = trainer.accelerator.get_state_dict(trainer.model)  # on every rank: FSDP gathers its shards
    if not ranks.is_main():
        return
    with staged(folder) as staging:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(staging, state)
        prepared.tokenizer.save_pretrained(staging)
        try:
            plot_curves(metrics.entries(), staging / "curves.png")
        except Exception as error:  # a failed plot must not cost the weights
            if disk_reason(error) is not None:
                raise
            (staging / "curves.png").unlink(missing_ok=True)
            logger.warning("no curves.png: %s", first_line(error))
        files = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
        (staging / SUMMARY).write_text(json.dumps({**summary, "files": files}, indent=1) + "\n")


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


def _check_reports(arguments: CMLMTrainingArguments) -> None:
    """Raise ValueError if a reporting service is unknown or not installed."""
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        rule, given = "none or a service that is installed", ", ".join(arguments.report_to)
        raise ValueError(f"expected report_to to be {rule}, got {given}: {first_line(error)}") from error


def _arguments(options: PostTrainOptions) -> CMLMTrainingArguments:
    from .trainer import CMLMTrainingArguments

    gpu = torch.accelerator.is_available()
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # the Trainer uses it unless an option says otherwise
    agreed = launcher == "no" or options.fp16 or options.bf16 is not False
    expect(agreed, "bf16", f"left out or given where accelerate launch has mixed_precision {launcher}", "no bf16")
    fp16 = options.fp16 or (options.bf16 is None and launcher == "fp16")
    expect(gpu or not fp16, "mixed_precision", "no or bf16 without a GPU", "fp16")
    bf16 = not fp16 and (fast_in_bf16() or launcher == "bf16") if options.bf16 is None else options.bf16
    batches = (options.contrastive_batch_size or options.batch_size) // options.batch_size
    names = ("activation_checkpointing", "gradient_checkpointing")  # its current and its former name in transformers
    name = next(name for name in names if name in {field.name for field in fields(CMLMTrainingArguments)})
    checkpointing: dict[str, Any] = {name: True} if options.gradient_checkpointing else {}
    return CMLMTrainingArguments(
        output_dir=options.output_dir, num_train_epochs=options.epochs, max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size, per_device_eval_batch_size=options.batch_size,
        max_tokens=options.max_tokens, contrastive_batch_size=options.contrastive_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation * batches, learning_rate=options.learning_rate,
        weight_decay=options.weight_decay, warmup_steps=options.warmup, lr_scheduler_type=options.scheduler,
        bf16=bf16, fp16=fp16,
        seed=options.seed, logging_steps=options.logging_steps,
        save_strategy="steps" if options.save_steps else "no", save_steps=options.save_steps or 500,
        save_total_limit=options.save_total_limit, report_to=options.report_to, use_cpu=not gpu,
        dataloader_pin_memory=gpu, torch_compile=options.torch_compile,
        low_precision_layer_norm=options.low_precision_layer_norm, **checkpointing,
    )  # fmt: skip
