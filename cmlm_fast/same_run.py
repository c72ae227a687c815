"""The settings that a resumed run must share with the interrupted one: everything its results depend on.

`settings.json` in the output folder records them; the first run writes it before it trains.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoints import replacing
from .config import CMLMConfig
from .options import PostTrainOptions

if TYPE_CHECKING:
    from datasets import Dataset

    from .arguments import CMLMTrainingArguments
    from .modeling import CMLMModel

_NAME = "settings.json"
_LATER = {"low_precision_layer_norm": False}  # settings that older runs did not record
_CONTENTS = ("model", "train_file", "held-out texts")  # settings whose values are fingerprints


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new run atomically."""
    with replacing(folder / _NAME) as draft:
        draft.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if a setting differs from that of the run to resume."""
    path = folder / _NAME
    if not path.exists():
        raise ValueError(f"expected output_dir to hold {_NAME} of the run to resume, got {folder} without it")
    try:
        before = {**_LATER, **json.loads(path.read_text(encoding="utf-8"))}
    except ValueError as error:
        raise ValueError(f"expected {path} to be as the run to resume wrote it, got no JSON: {error}") from error
    for name, value in json.loads(json.dumps(settings)).items():
        if before.get(name) == value:
            continue
        if name in _CONTENTS:
            rule = f"what it was in the run to resume, fingerprint {before.get(name)}"
            raise ValueError(f"expected {name} to be {rule}, got another, {value}")
        longer = " (to train longer, start from its model)" if name in ("epochs", "max_steps") else ""
        raise ValueError(f"expected {name} to be {before.get(name)}, as in the run to resume{longer}, got {value}")


def settings_of(options: PostTrainOptions, config: CMLMConfig, arguments: CMLMTrainingArguments) -> dict[str, Any]:
    """The settings, apart from the texts, that results depend on. Ranks may change if the sequences per step do not."""
    names = ("seed", "epochs", "max_steps", "batch_size", "max_tokens", "contrastive_batch_size", "learning_rate",
             "weight_decay", "warmup", "scheduler", "freeze_encoder", "whole_word", "torch_compile",
             "low_precision_layer_norm")  # fmt: skip
    kept = {name: getattr(options, name) for name in names}
    if kept["contrastive_batch_size"] is not None:
        kept["contrastive_batch_size"] *= arguments.world_size
    step = arguments.world_size * arguments.gradient_accumulation_steps
    batch = 1 if options.max_tokens is not None else options.batch_size
    name = "ranks × batch_size × gradient_accumulation"
    settings = {**asdict(config), **kept, name: step * batch, "bf16": arguments.bf16, "fp16": arguments.fp16}
    # With token batches, the number of batches per epoch is a multiple of the ranks, so the ranks affect the cuts.
    return settings if options.max_tokens is None else {**settings, "ranks": arguments.world_size}


def fingerprint_of_weights(model: CMLMModel, settings: str = "") -> str:
    """Fingerprint of all weights of the masked LM, and of `settings`."""
    digest = hashlib.sha256(settings.encode())
    for name, value in sorted(model.lm.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def fingerprint_of_tokens(rows: Dataset | None) -> str | None:
    """Fingerprint of all token ids, in order."""
    if rows is None:
        return None
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(10_000):
        ids = batch["input_ids"].combine_chunks()
        digest.update(ids.flatten().to_numpy().tobytes())
        digest.update(ids.value_lengths().to_numpy().tobytes())
    return digest.hexdigest()[:16]
