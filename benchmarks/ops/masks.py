"""Complementary masks: both views of a batch of ids, exact or bernoulli, token by token or in whole words."""

from __future__ import annotations

import warnings
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import cmlm_fast

from ..registry import Call, Op, Problem, Provider, Shape, Wrong, ours

MASK, SPECIAL, VOCABULARY, RATE = 4, (0, 2, 3, 4), 30_522, 0.15


@cache
def collator(whole_word: bool = False) -> Any:
    """transformers' masking collator with a vocabulary of BERT's size."""
    from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCABULARY - 5))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that whole words are only ever replaced by [MASK]
        return DataCollatorForLanguageModeling(
            BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}), whole_word_mask=whole_word
        )


def build(device: torch.device, B: int, L: int, sampling: str = "exact", words: bool = False) -> Problem:
    """B sequences of L ids, [CLS] first and [SEP] last; `words`: words of two tokens are masked whole."""
    ids = torch.randint(5, VOCABULARY, (B, L))
    ids[:, 0], ids[:, -1] = 2, 3
    units = (torch.arange(L) // 2).int().expand(B, L).contiguous() if words else None
    ids, units = ids.to(device), None if units is None else units.to(device)
    expected = cache(partial(_ours, "reference", ids, units, sampling))
    bytes_moved = float(ids.numel() * (8 + 8 + 8 + 1 + (4 if words else 0)))  # ids in, two views and a role out
    source = torch.ones(int(bytes_moved / 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def check(name: str, answer: Any) -> tuple[float, float | None] | None:
        if name.startswith("ours/"):
            if not all(torch.equal(a, b) for a, b in zip(answer, expected(), strict=True)):
                raise Wrong(f"{name}: its bits are not those of the reference")
        else:
            for view, labels in answer:
                check_view(name, ids, view, labels)

    return Problem({"B": B, "L": L, "sampling": sampling, "words": words}, device, (ids, units), (bytes_moved, "byte"),
                   bytes_moved, check, lambda: target.copy_(source), B * L * 8)  # fmt: skip


def check_view(name: str, ids: Tensor, view: Tensor, labels: Tensor) -> None:
    """Check a random view, which cannot be compared: it must change only what it labels, no special token, and about 15 %."""
    masked, special = labels != -100, torch.isin(ids, torch.tensor(SPECIAL, device=ids.device))
    share, slack = masked.sum() / (~special).sum(), 0.02 + 4 * (0.13 / ids.numel() * 2) ** 0.5
    right = torch.equal(view[~masked], ids[~masked]) and torch.equal(labels[masked], ids[masked])
    if not right or bool((masked & special).any()) or not abs(float(share) - RATE) < slack:
        raise Wrong(f"{name}: its view is no masked copy of the ids ({float(share):.1%} masked)")


def _ours(backend: str | None, ids: Tensor, units: Tensor | None, sampling: str) -> Any:
    return cmlm_fast.complementary_mask(ids, mask_token_id=MASK, vocab_size=VOCABULARY, special_ids=SPECIAL,
                                        unit_ids=units, sampling=sampling, backend=backend)  # fmt: skip


def _transformers(problem: Problem, told: bool = False) -> Call:
    """`torch_mask_tokens`, once per view; `told`: it is given the mask of special tokens and makes none in Python."""
    ids, units = problem.inputs
    special = torch.isin(ids, torch.tensor(SPECIAL)) if told or units is not None else None
    # Tokens of a word are adjacent: each is one letter long, and the next word begins after a blank.
    start = torch.arange(ids.shape[1]) + torch.arange(ids.shape[1]) // 2
    offsets = None if units is None else torch.stack([start, start + 1], -1).expand(*ids.shape, 2).contiguous()
    mask = collator(units is not None).torch_mask_tokens
    return lambda: [mask(ids.clone(), special, offsets) for _ in range(2)]


def _on_cpu(words: bool, problem: Problem) -> str:
    if problem.device.type != "cpu":
        return "masks on the CPU alone"
    if problem.sizes["words"] != words:
        return "this shape masks whole words" if problem.sizes["words"] else "masks whole words"
    needed = 3.0 * problem.sizes["B"] * problem.sizes["L"] ** 2  # it compares every pair of tokens in a sequence
    return f"would hold {needed / 1e9:.0f} GB: every pair of tokens" if words and needed > 4e9 else ""


def _shape(
    B: int, L: int, sampling: str = "exact", suite: str = "quick", sweep: str = "", words: bool = False
) -> Shape:
    label = f"{B}x{L} {sampling}" + " whole words" * words
    return Shape(label, {"B": B, "L": L, "sampling": sampling, "words": words}, suite, sweep)


OPS = (
    Op(
        "complementary_mask", "both masked views of a batch of ids",
        (
            _shape(16, 32, suite="smoke"), _shape(16, 32, "bernoulli", "smoke"), _shape(16, 32, suite="smoke", words=True),
            *(_shape(b, 128, sweep="B") for b in (64, 512, 4096)),
            _shape(64, 128, "bernoulli"), _shape(2048, 512), _shape(64, 128, words=True),
            *(_shape(4096, 512, sampling, "full") for sampling in ("exact", "bernoulli")),
            _shape(4096, 512, suite="full", words=True),
            *(_shape(32_768, 512, sampling, "full") for sampling in ("exact", "bernoulli")),
        ),
        build,
        (
            *ours("complementary_mask", lambda backend, p: partial(
                _ours, backend, *p.inputs, p.sizes["sampling"]), score_matrices=16),
            Provider("torch_mask_tokens", _transformers, unfit=partial(_on_cpu, False), score_matrices=8),
            Provider("torch_mask_tokens, told", partial(_transformers, told=True), unfit=partial(_on_cpu, False),
                     score_matrices=8),
            Provider("whole-word collator", _transformers, unfit=partial(_on_cpu, True)),
        ),
        lambda p: partial(_ours, None, *p.inputs, p.sizes["sampling"]),
        "Philox and, for exact sampling, a selection in each sequence",
    ),
)  # fmt: skip
