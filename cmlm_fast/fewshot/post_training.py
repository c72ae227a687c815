"""One post-training run of the experiment: the same texts, steps, order and encoder tokens for every method."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, set_seed

from ..data import CMLMDataCollator, clean_texts, tokenize_texts
from ..modeling import CMLMModel
from ..trainer import CMLMTrainer, CMLMTrainingArguments
from .augment import Eda, similar_tokens
from .methods import Method
from .paired import PairCollator, PairedModel

#: File next to the weights: steps, encoder_tokens, seconds.
FACTS = "post_training.json"


@dataclass(frozen=True)
class Schedule:
    """Length, batch size and learning rate; fields as in `PostTrainOptions`."""

    epochs: float
    max_steps: int
    batch_size: int
    learning_rate: float
    warmup: float


class UnlabelledTexts:
    """The train texts without labels, tokenised once for each form that a method needs.

    Args:
        dataset: columns text (and text_pair, paraphrase).
        tokenizer, max_length: as for `tokenize_texts`.
    """

    def __init__(self, dataset: Dataset, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.dataset, _ = clean_texts(dataset)
        self._all = dataset

    @cached_property
    def plain(self) -> Dataset:
        """Rows of `tokenize_texts`."""
        return self._rows(self._texts("text", "text_pair"))

    @cached_property
    def words(self) -> Dataset:
        """As `plain`, with unit_ids."""
        return self._rows(self._texts("text", "text_pair"), whole_word=True)

    @cached_property
    def paraphrases(self) -> Dataset:
        """A row for each text that has a paraphrase, truncated if too long; columns partner_* hold the paraphrase.

        A repeated text takes the first paraphrase among its rows.
        """
        pairs, _ = clean_texts(self._all.filter(lambda row: bool((row["paraphrase"] or "").strip())))
        cut: dict[str, Any] = {"truncation": True, "max_length": self.max_length}
        texts = [[text or "" for text in pairs[name]] for name in ("text", "text_pair") if name in pairs.column_names]
        rows = self.tokenizer(*texts, **cut)
        partner = self.tokenizer(pairs["paraphrase"][:], **cut)
        columns = {name: rows[name] for name in rows if name != "attention_mask"}
        columns |= {f"partner_{name}": partner[name] for name in columns}
        mask = [[1] * len(ids) for ids in columns["input_ids"]]
        return Dataset.from_dict({**columns, "attention_mask": mask, "sample_id": range(len(mask))})

    @cached_property
    def tokens(self) -> int:
        """Number of tokens in all texts."""
        return sum(map(len, self.plain["input_ids"]))

    def _texts(self, *names: str) -> Dataset:
        return self.dataset.select_columns([name for name in names if name in self.dataset.column_names])

    def _rows(self, texts: Dataset, **options: Any) -> Dataset:
        return tokenize_texts(texts, self.tokenizer, max_length=self.max_length, **options)


class CountingTrainer(CMLMTrainer):
    """CMLMTrainer that counts the tokens its encoder has seen, without pads."""

    encoder_tokens = 0

    def mask(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """As CMLMTrainer's, and count: the encoder sees two views of each sequence, or every sequence of a pair once."""
        attended = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if attended is None else int(attended.sum())
        self.encoder_tokens += tokens * (1 if "two" in batch else 2)
        return super().mask(batch, step)


def post_train(start: Path, texts: UnlabelledTexts, method: Method, schedule: Schedule, *, seed: int, bf16: bool,
               folder: Path, passing: bool = False) -> dict[str, Any]:  # fmt: skip
    """Post-train `start` by `method` and atomically write `folder`, a plain checkpoint; returns its FACTS.

    The facts include `passing`: the folder is to be removed once its cells are done, even by a later run.

    Each method passes 2 · epochs · texts.tokens tokens through its encoder: each text in two views, or both texts if the
    second view is another text. Paraphrases longer or shorter than their texts get fewer or more steps to compensate.

    Raises:
        errors.DivergedError: the loss is not finite.
    """
    begin = time.perf_counter()
    steps = schedule.max_steps
    rows = texts.words if method.whole_word else texts.plain
    if steps == -1:
        steps = math.ceil(schedule.epochs * math.ceil(len(rows) / schedule.batch_size))
    if method.second == "paraphrase":
        budget = steps * 2 * texts.tokens / math.ceil(len(rows) / schedule.batch_size)
        rows = texts.paraphrases
        seen = sum(map(len, rows["input_ids"])) + sum(map(len, rows["partner_input_ids"]))
        steps = max(1, round(budget * math.ceil(len(rows) / schedule.batch_size) / seen))
    set_seed(seed)
    paired = method.second != "masked"
    model = (PairedModel if paired else CMLMModel).from_pretrained(start, method.objective)
    collator: Any = CMLMDataCollator(texts.tokenizer, packed=model.takes_packed)
    if paired:
        collator = PairCollator(collator, _partner(method, texts, model, seed))
    gpu = torch.accelerator.is_available()
    folder.parent.mkdir(parents=True, exist_ok=True)
    arguments = CMLMTrainingArguments(
        str(folder.parent), max_steps=steps, per_device_train_batch_size=schedule.batch_size, bf16=bf16, seed=seed,
        learning_rate=schedule.learning_rate, warmup_steps=schedule.warmup, weight_decay=0.01, save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not gpu, dataloader_pin_memory=gpu,
    )  # fmt: skip
    trainer = CountingTrainer(model, arguments, train_dataset=rows, processing_class=texts.tokenizer, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    result = trainer.train()
    facts = {"steps": result.global_step, "encoder_tokens": trainer.encoder_tokens,
             "seconds": round(time.perf_counter() - begin, 2), "passing": passing}  # fmt: skip
    save(model, texts.tokenizer, facts, folder)
    return facts


def save(model: CMLMModel, tokenizer: Any, facts: dict[str, Any], folder: Path) -> None:
    """Write a plain checkpoint with its tokenizer and facts; the folder appears only once it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder.parent) as staging:
        whole = Path(staging) / folder.name
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        (whole / FACTS).write_text(json.dumps(facts) + "\n")
        try:
            whole.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process has made the same checkpoint
                raise


def _partner(method: Method, texts: UnlabelledTexts, model: CMLMModel,
             seed: int) -> Callable[[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    if method.second == "paraphrase":
        return _paraphrase
    embeddings = model.lm.get_input_embeddings().weight
    special = set(texts.tokenizer.all_special_ids) - {texts.tokenizer.unk_token_id}
    ids = torch.tensor(sorted({i for row in texts.plain["input_ids"] for i in row} - special))
    return Eda(similar_tokens(embeddings, ids), special, seed, texts.max_length)


def _paraphrase(row: dict[str, Any]) -> dict[str, Any]:
    partner = {name.removeprefix("partner_"): values for name, values in row.items() if name.startswith("partner_")}
    return {"sample_id": row["sample_id"], "attention_mask": [1] * len(partner["input_ids"]), **partner}
