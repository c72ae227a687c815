"""Trainings on 1, 2 and 3 gloo ranks, under DDP and FSDP2, for tests/test_ranks.py: `python tests/rank_runs.py FOLDER`.

There are 33 sequences, 24 per step: the last step of an epoch has 9, so one of 2 ranks, or one of 3, gets none.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import make_lm, make_sentences, make_tokenizer
from datasets import Dataset
from forks import fork_ranks, wait
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from cmlm_fast import CMLMConfig, CMLMModel, CMLMTrainer, CMLMTrainingArguments
from cmlm_fast.data import tokenize_texts
from cmlm_fast.masking import EVALUATION_STEP

CONFIG = CMLMConfig(scope="sequence", sequence_weight=1.0, learn_temperature=True, projection=8, token_temperature=0.2)


class Gradients(TrainerCallback):
    """Keeps the unsharded gradients of every step, and how many times DDP all-reduced them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.reduced: list[int] = []
        self.trainer: Any = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        model = self.trainer.model_wrapped
        if not self.reduced and isinstance(model, DistributedDataParallel):
            model.register_comm_hook(self.reduced, _noted_allreduce)
        self.reduced.append(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()
                           if p.grad is not None})  # fmt: skip


def _noted_allreduce(reduced, bucket):  # no annotations: DDP rejects those that are strings
    reduced[-1] += bucket.is_last()
    return allreduce_hook(dist.group.WORLD, bucket)


def whole(tensor: Any) -> torch.Tensor:
    return getattr(tensor, "full_tensor", lambda: tensor)().detach().clone()


def use_fsdp2() -> None:
    """Let accelerate run FSDP2 on the CPU over gloo: it shards only on accelerators, so it is told that these ranks are some.

    The environment is what `accelerate launch` makes of a configuration file.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2",
                      FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_TRANSFORMER_CLS_TO_WRAP="BertLayer",
                      FSDP_STATE_DICT_TYPE="FULL_STATE_DICT", FSDP_RESHARD_AFTER_FORWARD="true",
                      FSDP_CPU_RAM_EFFICIENT_LOADING="true")  # fmt: skip
    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *args, **options: ("gloo", DistributedType.MULTI_GPU)


def train(folder: Path, name: str, rows: Any, tokenizer: Any, fsdp: bool = False, resume: str | None = None,
          evaluate_first: bool = False, full_at: int = 0, scale: float | None = None, config: CMLMConfig = CONFIG,
          tied: bool = True, **options: Any) -> None:  # fmt: skip
    world, rank = (int(os.environ[key]) for key in ("WORLD_SIZE", "RANK"))
    if fsdp:
        use_fsdp2()
    # At larger learning rates, steps amplify differences in rounding.
    usual = {"learning_rate": 2e-3, "num_train_epochs": 2, "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "steps",
             "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 24 // world, "per_device_eval_batch_size": 8,
             "ddp_backend": "gloo" if world > 1 else None}  # fmt: skip
    arguments = CMLMTrainingArguments(str(folder / name), use_cpu=True, report_to="none", disable_tqdm=True,
                                      dataloader_pin_memory=False, **{**usual, **options})  # fmt: skip
    gradients = Gradients()
    model = CMLMModel(make_lm(tie_word_embeddings=tied), config)
    trainer = CMLMTrainer(model, arguments, train_dataset=rows.select(range(33)),
                          eval_dataset=rows.select(range(33, 54)), processing_class=tokenizer,
                          callbacks=[gradients])  # fmt: skip
    gradients.trainer = trainer
    if scale is not None:
        trainer.model.loss.token.temperature.logit_scale.data.fill_(scale)
    masks: dict[tuple[int, int], list[torch.Tensor]] = {}
    make = trainer.mask

    def mask(batch: dict[str, Any], step: int) -> dict[str, Any]:
        made = make(batch, step)
        if step != EVALUATION_STEP and not batch.get("stand_in"):
            edges = batch["cu_seqlens"].tolist()
            for sample, begin, end in zip(batch["sample_ids"].tolist(), edges, edges[1:], strict=False):
                masks.setdefault((step, sample), []).append(torch.stack([made["view1"], made["view2"]])[:, begin:end].clone())
        return made

    dtypes: set[torch.dtype] = set()
    compute = trainer.compute_loss

    def compute_loss(*inputs: Any, **more: Any) -> Any:
        loss = compute(*inputs, **more)
        dtypes.add(loss.dtype)
        return loss

    trainer.mask, trainer.compute_loss = mask, compute_loss  # type: ignore[method-assign]
    if evaluate_first:
        trainer.evaluate()
    if full_at:
        return full_disk(trainer, full_at, folder / f"{name}-{rank}.pt")
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.mask = make  # type: ignore[method-assign]
    found = {"loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], "masks": masks,
             "sequence": [entry["sequence"] for entry in trainer.state.log_history if "sequence" in entry],
             "temperature": [entry["token_temperature"] for entry in trainer.state.log_history if "token_temperature" in entry],
             "training_loss": result.training_loss, "dtypes": dtypes,
             "gradients": gradients.steps, "reduced": gradients.reduced, "scores": trainer.evaluate(),
             "best": trainer.state.best_metric,
             "evaluated": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
             "batches": batches_without_the_last(trainer, rows.select(range(21))),
             "tested": trainer.predict(trainer.eval_dataset).metrics,
             "weights": {name: whole(p) for name, p in trainer.model.named_parameters()}}  # fmt: skip
    if fsdp:
        arguments = CMLMTrainingArguments(str(folder / name), use_cpu=True, report_to="none", dataloader_pin_memory=False,
                                          contrastive_batch_size=8, per_device_train_batch_size=8)  # fmt: skip
        try:
            CMLMTrainer(CMLMModel(make_lm(), CONFIG), arguments, train_dataset=rows, processing_class=tokenizer)
        except ValueError as error:
            found["refused"] = str(error)
    torch.save(found, folder / f"{name}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def full_disk(trainer: CMLMTrainer, step: int, path: Path) -> None:
    """Train with a disk that is full when a step's model is written; save what training raised."""
    save = CMLMModel.save_pretrained

    def fail(self: CMLMModel, *args: Any, **options: Any) -> None:
        if trainer.state.global_step == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, *args, **options)

    CMLMModel.save_pretrained = fail  # type: ignore[method-assign]
    try:
        trainer.train()
    except OSError as error:
        torch.save(str(error), path)
    dist.destroy_process_group()


def batches_without_the_last(trainer: CMLMTrainer, rows: Any) -> tuple[int, int]:
    """Number of training batches, of ten rows each and without an incomplete last round, and of held-out batches."""
    trainer.args.dataloader_drop_last, trainer._train_batch_size = True, 10
    train, held = (sum(1 for _ in loader) for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader(rows)))
    return train, held


def main() -> None:
    folder = Path(sys.argv[1])
    tokenizer = make_tokenizer()
    rows = tokenize_texts(Dataset.from_dict({"text": make_sentences()}), tokenizer, max_length=32)

    def run(name: str, world: int, **options: Any) -> None:
        codes = [wait(process) for process in fork_ranks(world, lambda: train(folder, name, rows, tokenizer, **options),
                                                         folder / f"{name}.log")]  # fmt: skip
        print(name, codes, flush=True)
        if any(codes):
            for rank in (rank for rank, code in enumerate(codes) if code):
                said = (folder / f"{name}.{rank}").read_text().partition("Extension modules:")[0]  # faulthandler's long list
                print(f"rank {rank}:", said[-2400:])
            sys.exit(1)

    for world in (1, 2, 3):
        run(f"ddp-{world}", world)
    # 24 sequences contrasted at once, four at a time in memory.
    for world in (1, 2, 3):
        micro = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6 // world}
        run(f"cached-{world}", world, contrastive_batch_size=24 // world, **micro)
    run("uneven-3", 3, per_device_train_batch_size=8, contrastive_batch_size=8)  # the last step leaves a rank without any
    run("evaluated-2", 2, evaluate_first=True)
    # Parameters outside the loss (LM head or projection) have no gradient for DDP to wait for.
    run("headless-2", 2, config=CMLMConfig(mlm_weight=0.0), num_train_epochs=1)
    run("flat-2", 2, config=CMLMConfig(sequence_weight=0.0, projection=8), num_train_epochs=1)
    # An untied BERT head has a second bias that the loss does not use. Nothing is logged before the end.
    for world in (1, 2):
        run(f"untied-{world}", world, tied=False, logging_steps=500)
    run("full-2", 2, full_at=4, eval_strategy="steps", eval_steps=2, metric_for_best_model="loss")
    run("one-to-two", 2, resume=str(folder / "ddp-1" / "checkpoint-2"))
    adam = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0}
    run("fsdp-2", 2, fsdp=True)
    run("fsdp-adam", 2, fsdp=True, **adam)
    run("fsdp-adam-resumed", 2, fsdp=True, resume=str(folder / "fsdp-adam" / "checkpoint-2"), **adam)
    run("fsdp-clamped", 2, fsdp=True, scale=6.0, max_steps=2)
    run("fsdp-best", 2, fsdp=True, num_train_epochs=2, eval_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True, **{**adam, "save_strategy": "best"})  # fmt: skip
    run("fsdp-bf16", 2, fsdp=True, bf16=True, num_train_epochs=1, **adam)
    run("ddp-adam", 1, **adam)


if __name__ == "__main__":
    main()
