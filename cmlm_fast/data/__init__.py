"""From text to batches: read, clean, split, tokenise, collate. Built on `datasets`, so all data is Arrow on disk.

    load_texts      file or saved folder      ->  columns text (and text_pair)
    load_labelled   the same, with labels     ->  columns text, label (and text_pair, paraphrase)
    clean_texts     drops blank and repeated rows and counts them
    split_evaluation                          ->  train, evaluation; whole texts, so no chunk leaks
    tokenize_texts  sequences <= max_length   ->  input_ids, attention_mask, (token_type_ids), sample_id, (unit_ids)
    CMLMDataCollator                          ->  padded tensors for the masked-view step
    TokenBudgetSampler                        ->  batches by tokens instead of by sequences
    RankShare       each rank's share of an epoch
    mask_settings   what `complementary_mask` needs to know about a tokenizer

Example:
    >>> texts, counts = clean_texts(load_texts("reviews.txt"))
    >>> train, evaluation = split_evaluation(texts, share=0.05, seed=42)
    >>> dataset = tokenize_texts(train, tokenizer, max_length=128)
    >>> batch = CMLMDataCollator(tokenizer)([dataset[0], dataset[1]])
    >>> complementary_mask(batch["input_ids"], attention_mask=batch["attention_mask"],
    ...                    sample_ids=batch["sample_ids"], **mask_settings(tokenizer))
"""

from .budget import TokenBudgetSampler, sequence_lengths
from .clean import TextCounts, clean_texts, split_evaluation
from .collate import CMLMDataCollator, mask_settings
from .labelled import load_labelled
from .load import load_texts
from .share import RankShare
from .tokens import tokenize_texts

__all__ = [
    "CMLMDataCollator",
    "RankShare",
    "TextCounts",
    "TokenBudgetSampler",
    "clean_texts",
    "load_labelled",
    "load_texts",
    "mask_settings",
    "sequence_lengths",
    "split_evaluation",
    "tokenize_texts",
]
