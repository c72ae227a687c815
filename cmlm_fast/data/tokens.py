"""Texts to token sequences: long texts in chunks, long pairs cut, words numbered for whole-word masks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

from ._errors import check_tokenizer, fail, texts_of

logger = logging.getLogger(__name__)

_ENCODING = 1  # part of the cache key; raise it when `_encode` returns something else for the same input
_WHOLE, _CUT = 1, 2  # column start of a text's first sequence; 0 for its further ones


def tokenize_texts(dataset: Dataset | Sequence[str], tokenizer: Any, *, max_length: int | None = None, whole_word: bool = False,
                   num_proc: int | None = None) -> Dataset:  # fmt: skip
    """Token sequences of at most `max_length`, each with its special tokens.

    A long text becomes several sequences of nearly equal length that hold each of its tokens once. A long pair is cut,
    the longer text first; how many were cut is logged. A text that leaves no token (control characters only) is left
    out, with a logged count.

    Args:
        dataset: columns text (and text_pair), or a list of texts.
        tokenizer: Hugging Face tokenizer with a mask and a pad token.
        max_length: special tokens included; default min(tokenizer.model_max_length, 512).
        whole_word: add unit_ids; needs a fast tokenizer that splits words.
        num_proc: processes; without them a fast tokenizer still uses its own threads.

    Returns:
        Dataset, one row per sequence: input_ids int32 [L], attention_mask int8 [L], token_type_ids int8 [L] where the
        tokenizer makes them, sample_id int64 (the row; of data sets that are concatenated, number the rows anew: it decides
        the masks), and with whole_word unit_ids int32 [L]: 0 at special tokens, otherwise equal exactly within a word.
        Cached by `datasets` under dataset, tokenizer and options.

    Raises:
        ValueError: tokenizer without mask or pad token, max_length with no room for a token, whole_word with a
            tokenizer that knows no words, or no sequence left.

    Example:
        >>> tokenize_texts(Dataset.from_dict({"text": ["to be or not"]}), tokenizer, max_length=4)["input_ids"]
        [[2, 70, 71, 3], [2, 72, 73, 3]]
    """
    check_tokenizer(tokenizer, "tokenize_texts")
    dataset = texts_of(dataset, "tokenize_texts")
    paired = "text_pair" in dataset.column_names
    # A first call also resets truncation and padding, which a fast tokenizer keeps: the cache key depends on them.
    probe = tokenizer("one two", "one two" if paired else None, return_special_tokens_mask=True)
    if max_length is None:
        max_length = min(int(tokenizer.model_max_length), 512)
    least = sum(probe["special_tokens_mask"]) + 1 + paired
    if max_length < least:
        raise fail("tokenize_texts", "max_length", f">= {least}, the special tokens and one of each text", max_length)
    if whole_word and (not tokenizer.is_fast or len(set(probe.word_ids()) - {None}) < 2):
        name = f"{type(tokenizer).__name__} {tokenizer.name_or_path!r}"
        raise fail("tokenize_texts", "tokenizer", "a fast tokenizer that splits words, for whole_word", name)
    lists = {"input_ids": "int32", "attention_mask": "int8"}
    lists |= {"token_type_ids": "int8"} if "token_type_ids" in probe else {}
    lists |= {"unit_ids": "int32"} if whole_word else {}
    features = Features({name: ListOf(Value(kind)) for name, kind in lists.items()} | {"start": Value("int8")})
    options = {"tokenizer": tokenizer, "max_length": max_length, "columns": list(lists), "encoding": _ENCODING}
    encoded = dataset.map(_encode, batched=True, fn_kwargs=options, features=features, num_proc=num_proc,
                          remove_columns=dataset.column_names, desc="Tokenising")  # fmt: skip
    if len(encoded) == 0:
        raise fail("tokenize_texts", "dataset", "one with at least one token", f"{len(dataset)} texts without any")
    start = np.asarray(encoded.data.column("start"))
    if lost := len(dataset) - np.count_nonzero(start):
        logger.warning("%d of %d texts left no token and were dropped", lost, len(dataset))
    if cut := np.count_nonzero(start == _CUT):
        logger.warning("%d of %d pairs were longer than max_length = %d and were cut", cut, len(dataset), max_length)
    return encoded.remove_columns("start").add_column("sample_id", np.arange(len(encoded), dtype=np.int64))


def _encode(batch: Mapping[str, Sequence[str | None]], *, tokenizer: Any, max_length: int, columns: list[str],
            encoding: int) -> dict[str, list[Any]]:  # fmt: skip
    texts = [text or "" for text in batch["text"]]
    pairs = [text or "" for text in batch["text_pair"]] if "text_pair" in batch else None
    options = {"return_special_tokens_mask": True, "verbose": False}
    encoded = tokenizer(texts, pairs, **options)
    out: dict[str, list[Any]] = {name: [] for name in (*columns, "start")}
    for row in range(len(texts)):
        source, at, cut = encoded, row, False
        if pairs is not None and len(encoded["input_ids"][row]) > max_length:
            longest_first = {"truncation": "longest_first", "max_length": max_length}
            source, at, cut = tokenizer([texts[row]], [pairs[row]], **longest_first, **options), 0, True
        special = source["special_tokens_mask"][at]
        if all(special):
            continue
        values = {name: source[name][at] for name in columns if name in source}
        values["attention_mask"] = [1] * len(special)
        if "unit_ids" in columns:
            values["unit_ids"] = _unit_ids(source.word_ids(at), source.sequence_ids(at))
        for i, pieces in enumerate(_chunks(special, max_length)):
            for name in columns:
                out[name].append([value for piece in pieces for value in values[name][piece]])
            out["start"].append(0 if i else _CUT if cut else _WHOLE)
    return out


def _chunks(special: list[int], max_length: int) -> list[tuple[slice, ...]]:
    """Slices that cut [head, content, tail] into sequences [head, share, tail], shares equal to within one token."""
    length = len(special)
    if length <= max_length:
        return [(slice(0, length),)]
    head, tail = special.index(0), length - special[::-1].index(0)
    content, room = tail - head, max_length - (length - (tail - head))
    count = -(-content // room)
    edges = [head + content * i // count for i in range(count + 1)]
    return [(slice(0, head), slice(a, b), slice(tail, length)) for a, b in pairwise(edges)]


def _unit_ids(words: list[int | None], texts: list[int | None]) -> list[int]:
    """0 at special tokens, else 1 + word; the tokenizer starts anew at 0 in a second text, these ids count on."""
    known = list(zip(words, texts, strict=True))
    second = 1 + max((word for word, text in known if word is not None and text == 0), default=-1)
    return [0 if word is None else 1 + word + (second if text == 1 else 0) for word, text in known]
