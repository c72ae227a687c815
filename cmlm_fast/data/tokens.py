"""Tokenise texts into sequences: chunk long texts, truncate long pairs, number words for whole-word masks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from numbers import Integral
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

from ._errors import as_text_dataset, check_tokenizer, fail

logger = logging.getLogger(__name__)

_ENCODING = 1  # part of the cache key; increment it when `_encode` changes its output for the same input
_BATCH_BYTES = 1 << 21  # of texts processed together: a tokenizer's lists take about 45 times as much memory
_WHOLE, _CUT = 1, 2  # column `start` at a text's first sequence; 0 at the following ones


def tokenize_texts(dataset: Dataset | Sequence[str], tokenizer: Any, *, max_length: int | None = None, whole_word: bool = False,
                   num_proc: int | None = None) -> Dataset:  # fmt: skip
    """Tokenise texts into sequences of at most `max_length` tokens, each with its special tokens.

    A long text becomes several sequences of nearly equal length that together hold each of its tokens once. A long pair is
    truncated, the longer text first, and the number of truncated pairs is logged. A text without tokens (control characters
    only) is dropped, and the number of such texts is logged. The tokenizer's state is restored afterwards.

    Args:
        dataset: columns text (and text_pair), or a list of texts.
        tokenizer: Hugging Face tokenizer with a mask and a pad token.
        max_length: includes special tokens; default min(tokenizer.model_max_length, 512).
        whole_word: add unit_ids; needs a fast tokenizer that splits words.
        num_proc: processes; without them a fast tokenizer still uses its own threads.

    Returns:
        Dataset, one row per sequence: input_ids int32 [L], attention_mask int8 [L], token_type_ids int8 [L] if the tokenizer
        makes them, sample_id int64 (the row number; it decides the masks, so renumber the rows of concatenated data sets), and
        with whole_word unit_ids int32 [L]: 0 at special tokens added by the tokenizer (not at those written in the text),
        otherwise equal exactly within a word. Cached by `datasets` under dataset, tokenizer and options, except for a list of
        texts.

    Raises:
        ValueError: a tokenizer without mask or pad token, max_length without room for a token, whole_word with a
            tokenizer that has no words, or no sequence left.

    Example:
        >>> tokenize_texts(Dataset.from_dict({"text": ["to be or not"]}), tokenizer, max_length=4)["input_ids"]
        [[2, 70, 71, 3], [2, 72, 73, 3]]
    """
    check_tokenizer(tokenizer, "tokenize_texts")
    with _limits_kept(tokenizer):
        texts = as_text_dataset(dataset, "tokenize_texts").with_format(None)
        return _tokenize(texts, tokenizer, max_length, whole_word, num_proc)


@contextmanager
def _limits_kept(tokenizer: Any) -> Iterator[None]:
    """Restore truncation and padding: a fast tokenizer keeps those of its last call, and `save_pretrained` would write them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        backend.no_truncation()
        backend.no_padding()
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _tokenize(dataset: Dataset, tokenizer: Any, max_length: int | None, whole_word: bool, num_proc: int | None) -> Dataset:
    paired = "text_pair" in dataset.column_names
    # This call also resets the truncation and padding that a fast tokenizer keeps, on which the cache key depends.
    probe = _probe(tokenizer, dataset, paired)
    if max_length is None:
        max_length = min(int(tokenizer.model_max_length), 512)
    if not isinstance(max_length, Integral):
        raise fail("tokenize_texts", "max_length", "a whole number", repr(max_length))
    least = sum(probe["special_tokens_mask"]) + 1 + paired
    if max_length < least:
        raise fail("tokenize_texts", "max_length", f">= {least}, the special tokens and one of each text", max_length)
    if whole_word and (not tokenizer.is_fast or len(set(probe.word_ids()) - {None}) < 2):
        name = f"{type(tokenizer).__name__} {tokenizer.name_or_path!r}"
        raise fail("tokenize_texts", "tokenizer", "a fast tokenizer that splits words, for whole_word", name)
    types = {"input_ids": "int32", "attention_mask": "int8"}
    types |= {"token_type_ids": "int8"} if "token_type_ids" in probe else {}
    types |= {"unit_ids": "int32"} if whole_word else {}
    features = Features({name: ListOf(Value(kind)) for name, kind in types.items()} | {"start": Value("int8")})
    special = probe["special_tokens_mask"]
    around = ((*special, 0).index(0), (*special[::-1], 0).index(0))  # no 0 means that no text yields a token
    options = {"tokenizer": tokenizer, "max_length": max_length, "types": types, "special": sum(special),
               "around": around, "encoding": _ENCODING}  # fmt: skip
    encoded = dataset.map(_encode, batched=True, batch_size=rows_at_once(dataset, 1000), fn_kwargs=options, features=features,
                          num_proc=num_proc, remove_columns=dataset.column_names, desc="Tokenising")  # fmt: skip
    if len(encoded) == 0:
        raise fail("tokenize_texts", "dataset", "one with at least one token", f"{len(dataset)} texts without any")
    start = np.asarray(encoded.data.column("start"))
    if lost := len(dataset) - np.count_nonzero(start):
        logger.warning("%d of %d texts left no token and were dropped", lost, len(dataset))
    if cut := np.count_nonzero(start == _CUT):
        logger.warning("%d of %d pairs were longer than max_length = %d and were cut", cut, len(dataset), max_length)
    return encoded.remove_columns("start").add_column("sample_id", np.arange(len(encoded), dtype=np.int64))


def _probe(tokenizer: Any, dataset: Dataset, paired: bool) -> Any:
    """Encode two words (for a pair, twice) with their special tokens.

    The words come from the data if the tokenizer cannot spell English ones; if it can spell none, special tokens remain.
    """
    found = [dataset[name] for name in ("text", "text_pair") if name in dataset.column_names]
    for words in chain(["one two"], (f"{text} {text}" for text in chain(*found) if text)):
        probe = tokenizer(words, words if paired else None, return_special_tokens_mask=True, verbose=False)
        if not all(probe["special_tokens_mask"]):
            break
    return probe


def rows_at_once(dataset: Dataset, most: int) -> int:
    """Number of texts to process together, at most `most`; fewer for long documents."""
    mean = dataset.data.nbytes // max(len(dataset.data), 1)
    return min(most, max(1, _BATCH_BYTES // max(mean, 1)))


def _encode(batch: Mapping[str, Sequence[str | None]], *, tokenizer: Any, max_length: int, types: dict[str, str],
            special: int, around: tuple[int, int], encoding: int) -> pa.Table:  # fmt: skip
    """Encode a batch of texts as Arrow: lists of Python numbers would take as long as the tokenizer itself.

    Args:
        types: dtypes of the list columns.
        special: number of special tokens of a text (or a pair).
        around: number of special tokens before and after a text.
    """
    texts = [text or "" for text in batch["text"]]
    pairs = [text or "" for text in batch["text_pair"]] if "text_pair" in batch else None
    options = {"return_attention_mask": False, "verbose": False}
    encoded = tokenizer(texts, pairs, **options)
    made = [name for name in types if name != "attention_mask"]
    rows: dict[str, list[list[int]]] = {name: [] for name in made}
    start: list[int] = []
    for row, ids in enumerate(encoded["input_ids"]):
        source, at, cut = encoded, row, False
        if pairs is not None and len(ids) > max_length:
            longest_first = {"truncation": "longest_first", "max_length": max_length}
            source, at, cut = tokenizer([texts[row]], [pairs[row]], **longest_first, **options), 0, True
        if len(ids) == special:
            continue
        values = {name: source[name][at] for name in made if name in source}
        if "unit_ids" in types:
            values["unit_ids"] = _unit_ids(source.word_ids(at), source.sequence_ids(at))
        for name in made:
            rows[name] += _chunks(values[name], max_length, *around)
        start += [_CUT if cut else _WHOLE, *[0] * (len(rows["input_ids"]) - len(start) - 1)]
    edges = np.cumsum([0, *map(len, rows["input_ids"])], dtype=np.int32)
    flat = {name: np.fromiter(chain.from_iterable(rows[name]), types[name], edges[-1]) for name in made}
    flat["attention_mask"] = np.ones(edges[-1], np.int8)
    lists = {name: pa.ListArray.from_arrays(edges, flat[name]) for name in types}
    return pa.table({**lists, "start": pa.array(start, pa.int8())})


def _chunks(values: list[int], max_length: int, head: int, tail: int) -> list[list[int]]:
    """Split [head, content, tail] into sequences [head, share, tail], shares equal to within one token."""
    if len(values) <= max_length:
        return [values]
    end, room = len(values) - tail, max_length - head - tail
    count = -(-(end - head) // room)
    edges = [head + (end - head) * i // count for i in range(count + 1)]
    return [values[:head] + values[a:b] + values[end:] for a, b in pairwise(edges)]


def _unit_ids(words: list[int | None], texts: list[int | None]) -> list[int]:
    """0 at added special tokens, else 1 + word; the tokenizer restarts at 0 in a second text, these ids continue."""
    known = list(zip(words, texts, strict=True))
    second = 1 + max((word for word, text in known if word is not None and text == 0), default=-1)
    return [0 if word is None else 1 + word + (second if text == 1 else 0) for word, text in known]
