"""Tokenisation of texts into rows of ids for training."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch

from ..registry import Call, Op, Problem, Provider, Shape, Wrong

LENGTH = 128


@cache
def tokenizer() -> Any:
    """A WordPiece tokenizer of 8,000 pieces."""
    from transformers import BertTokenizerFast

    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"w{i}x" for i in range(4000)),
        *(f"##y{i}z" for i in range(4000)),
    ]
    return BertTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=LENGTH)


def build(device: torch.device, texts: int) -> Problem:
    """Texts of 5 to 60 words, of one to three pieces each: none is longer than the limit."""
    from datasets import Dataset

    draw = random.Random(0)

    def word() -> str:
        return f"w{draw.randrange(4000)}x" + "".join(
            f"y{draw.randrange(4000)}z" for _ in range(draw.choice((0, 0, 0, 1)))
        )

    lines = [" ".join(word() for _ in range(draw.randint(5, 60))) for _ in range(texts)]
    expected = tokenizer()(lines)["input_ids"]

    def check(name: str, rows: Any) -> None:
        if [list(row) for row in rows] != expected:
            raise Wrong(f"{name}: its ids are not the tokenizer's")

    tokens = float(sum(map(len, expected)))
    return Problem({"texts": texts}, device, (lines, Dataset.from_dict({"text": lines})), (tokens, "token"), 4 * tokens,
                   check, lambda: tokenizer()(lines))  # fmt: skip


def _ours(problem: Problem) -> Call:
    from cmlm_fast.data import tokenize_texts

    return lambda: _mapped(lambda: tokenize_texts(problem.inputs[1], tokenizer(), max_length=LENGTH))


def _map(problem: Problem) -> Call:
    encode = lambda batch: tokenizer()(batch["text"], truncation=True, max_length=LENGTH)  # noqa: E731
    return lambda: _mapped(lambda: problem.inputs[1].map(encode, batched=True, remove_columns=["text"]))


def _mapped(call: Any) -> Any:
    """The column of ids, recomputed: `datasets` would otherwise return what it cached."""
    import datasets

    cached, hidden = datasets.is_caching_enabled(), datasets.are_progress_bars_disabled()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    try:
        return call().with_format("numpy")["input_ids"]
    finally:  # both settings are process-wide
        if cached:
            datasets.enable_caching()
        if not hidden:
            datasets.enable_progress_bars()


def _one_by_one(problem: Problem) -> Call:
    return lambda: [tokenizer()(text, truncation=True, max_length=LENGTH)["input_ids"] for text in problem.inputs[0]]


OPS = (
    Op(
        "tokenize_texts", "texts to rows of token ids",
        (Shape("20 texts", {"texts": 20}, "smoke"), Shape("4000 texts", {"texts": 4000}),
         Shape("50000 texts", {"texts": 50_000}, "full")),
        build,
        (
            Provider("ours/python", _ours),
            Provider("datasets.map", _map),
            Provider("one text at a time", _one_by_one),
        ),
        _ours,
        "the tokenizer itself, of which it is a batched map",
        cpu_only="texts are tokenised on the CPU",
    ),
)  # fmt: skip
