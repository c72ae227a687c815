"""Shared fixtures: real sentences, a tiny tokenizer trained on them, and a cache folder of the test run's own."""

from __future__ import annotations

import os
import tempfile
from itertools import product
from typing import Any

import pytest

# Read when `datasets` and `huggingface_hub` are first imported, hence before any test module is.
_cache = tempfile.TemporaryDirectory(prefix="cmlm_fast_tests_")
os.environ["HF_DATASETS_CACHE"] = _cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and forked workers do not mix

_WHO = ("The old gardener", "My neighbour's daughter", "A tired postman", "The village doctor", "Our youngest cousin",
        "The bookseller", "Every visitor", "The night watchman", "A clever fox", "The orchestra")  # fmt: skip
_DOES = ("carefully repaired", "never understood", "quietly admired", "often photographed", "finally discovered",
         "could not forget", "misplaced")  # fmt: skip
_WHAT = ("the broken fountain", "an unfinished letter", "the mountain railway", "a painting of the harbour",
         "the forgotten recipe", "her grandfather's telescope")  # fmt: skip
_END = ("before the rain came", "in the middle of winter", "without telling anyone", "on the way home")


def make_sentences() -> list[str]:
    """420 different English sentences, the same on every call."""
    return [f"{who} {does} {what}, {_END[i % 4]}." for i, (who, does, what) in enumerate(product(_WHO, _DOES, _WHAT))]


def make_tokenizer(sentences: list[str]) -> Any:
    """A BERT-like WordPiece tokenizer of about 200 tokens, small enough that long words split."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
               "mask_token": "[MASK]"}  # fmt: skip
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=list(special.values()), show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, model_input_names=["input_ids", "token_type_ids",
        "attention_mask"], **special)  # fmt: skip


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return make_sentences()


@pytest.fixture(scope="session")
def tiny_tokenizer(sentences: list[str]) -> Any:
    """PreTrainedTokenizerFast, about 200 tokens: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4."""
    return make_tokenizer(sentences)
