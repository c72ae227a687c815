"""Few-shot fine-tuning: a classifier on k labelled texts per class, scored on texts it has not seen.

Plain `transformers.Trainer` on `AutoModelForSequenceClassification`. Nothing here depends on how a checkpoint was made, so
any two can be compared.

Example:
    >>> shots = draw(labels, shots=16, seed=0)
    >>> fine_tune("out/model", [texts[i] for i in shots], [labels[i] for i in shots], test_texts, test_labels)
    FewShotScore(accuracy=0.71, macro_f1=0.70, seconds=4.2)
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DivergedError
from .draws import classes_of
from .methods import Contrast

#: A text, or the two texts of a pair.
Text = str | tuple[str, str]


class FewShotScore(NamedTuple):
    """Scores on the test texts, from 0 to 1, and the time for training and scoring."""

    accuracy: float
    macro_f1: float
    seconds: float


def fine_tune(model_path: str | Path, train_texts: Sequence[Text], train_labels: Sequence[Hashable],
              test_texts: Sequence[Text], test_labels: Sequence[Hashable], *, epochs: float = 10,
              learning_rate: float = 2e-4, batch_size: int = 16, max_length: int = 128, seed: int = 42,
              bf16: bool = False, contrast: Contrast | None = None) -> FewShotScore:  # fmt: skip
    """Fine-tune a fresh classification head and the whole encoder, then score the test texts.

    Deterministic for a seed on one machine: it sets the head, the dropout and the order of the texts. Linear decay
    without warm-up. Texts of similar length share a batch, padded on the right to the longest, whatever the tokenizer's side.

    Args:
        model_path: folder or hub id of a checkpoint that AutoModelForSequenceClassification loads, with its tokenizer.
        train_texts, train_labels: the labelled texts (or pairs of texts), of at least two classes; labels may be any hashable
            values.
        test_texts, test_labels: the texts to score; their labels must occur among train_labels.
        epochs, learning_rate, batch_size, seed: as in `transformers.TrainingArguments`.
        max_length: maximum tokens per text; longer texts are truncated.
        bf16: autocast to bfloat16 in training and scoring.
        contrast: supervised contrast in addition to cross entropy; None: cross entropy alone.

    Raises:
        ValueError: sizes that differ, no text, fewer than two classes, or a test label that is not among train_labels.
        DivergedError: NaN scores.
    """
    import torch
    from sklearn.metrics import accuracy_score, f1_score
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        PrinterCallback,
        TrainingArguments,
        set_seed,
    )

    from .contrast import ContrastTrainer

    classes = _check(train_texts, train_labels, test_texts, test_labels)
    begin = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.padding_side = "right"  # on the left, positions and the head's input would depend on the batch
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_path, num_labels=len(classes), problem_type="single_label_classification", dtype=torch.float32,
        return_dict=True, output_hidden_states=False, output_attentions=False,  # predictions are the logits alone
    )  # fmt: skip
    if getattr(model.config, "type_vocab_size", 2) < 2:  # a BERT-style tokenizer numbers the texts of a pair regardless
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    train = _encode(tokenizer, train_texts, train_labels, classes, max_length)
    # Test texts of one length together, so that little is padded; the scores do not depend on the order.
    test = sorted(_encode(tokenizer, test_texts, test_labels, classes, max_length), key=lambda row: len(row["input_ids"]))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, learning_rate=learning_rate, per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=64, seed=seed, bf16=bf16, save_strategy="no", report_to="none",
            logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, train_sampling_strategy="group_by_length",
            use_cpu=not torch.accelerator.is_available(),  # the Trainer rejects bf16 on a CPU that it was not told to use
        )  # fmt: skip
        arguments._n_gpu = min(arguments.n_gpu, 1)  # on several GPUs nn.DataParallel would multiply the batch size
        trainer = ContrastTrainer(contrast, model, arguments, data_collator=DataCollatorWithPadding(tokenizer),
                                  train_dataset=train)  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        predicted = trainer.predict(test)
    truth, guess = predicted.label_ids, np.argmax(predicted.predictions, axis=-1)
    if not math.isfinite(float(np.sum(predicted.predictions))):
        raise DivergedError(f"fine_tune: NaN scores, from {model_path} at learning rate {learning_rate}")
    f1 = f1_score(truth, guess, average="macro", labels=np.unique(truth), zero_division=0)  # over the classes in the test set
    return FewShotScore(float(accuracy_score(truth, guess)), float(f1), time.perf_counter() - begin)


def _check(train_texts: Sequence[Text], train_labels: Sequence[Hashable], test_texts: Sequence[Text],
           test_labels: Sequence[Hashable]) -> list[Any]:  # fmt: skip
    for name, texts, labels in (("train", train_texts, train_labels), ("test", test_texts, test_labels)):
        if len(texts) != len(labels) or not texts:
            rule, got = f"as many as {name}_texts and at least one", f"{len(labels)} for {len(texts)} texts"
            raise ValueError(f"fine_tune: expected {name}_labels to be {rule}, got {got}")
    classes = classes_of(train_labels)
    if len(classes) < 2:
        raise ValueError(f"fine_tune: expected train_labels to be of at least two classes, got {classes}")
    if unseen := [label for label in classes_of(test_labels) if label not in classes]:
        raise ValueError(f"fine_tune: expected test_labels to be among {classes}, got {unseen}")
    return classes


def _encode(tokenizer: Any, texts: Sequence[Text], labels: Sequence[Hashable], classes: list[Any],
            max_length: int) -> list[dict[str, Any]]:  # fmt: skip
    columns = [list(texts)] if isinstance(texts[0], str) else [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    number = {label: i for i, label in enumerate(classes)}
    inputs = [{name: values[i] for name, values in encoded.items()} for i in range(len(texts))]
    return [{**row, "labels": number[label]} for row, label in zip(inputs, labels, strict=True)]
