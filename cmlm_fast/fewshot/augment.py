"""EDA on token ids: insert, delete, swap, replace, with similar embeddings in place of a thesaurus (Wei and Zou 2019)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 1024  # rows of the similarity matrix at a time


def similar_tokens(embeddings: Tensor, tokens: Tensor, most: int = 10) -> dict[int, list[int]]:
    """For each of `tokens` (int64 [U]), the `most` others among them whose input embeddings have the largest cosine to its own.

    embeddings is [V, D]. Only `tokens` are candidates, because unused tokens of a vocabulary have embeddings too. The U×U
    matrix is computed _ROWS rows at a time.
    """
    tokens = tokens.unique()
    unit = F.normalize(embeddings.detach()[tokens].float(), dim=-1)
    found: dict[int, list[int]] = {}
    for begin in range(0, len(tokens), _ROWS):
        cosine = unit[begin : begin + _ROWS] @ unit.T
        own = torch.arange(len(cosine))
        cosine[own, begin + own] = float("-inf")
        nearest = tokens[cosine.topk(min(most, len(tokens) - 1), dim=1).indices]
        found |= dict(zip(tokens[begin : begin + _ROWS].tolist(), nearest.tolist(), strict=True))
    return found


class Eda:
    """Apply one random operation to the tokens of a `tokenize_texts` row; special tokens stay in place.

    insert    after a random token, a token similar to one of the text; n times
    delete    each token with probability `share`; at least one stays
    swap      two tokens of one text, n times
    replace   n tokens, each by a similar token

    n = max(1, round(share · tokens)).

    Args:
        similar: token -> similar tokens, from `similar_tokens`.
        special_ids: tokens that are left alone.
        seed: seed of a `numpy.random.default_rng`.
        max_length: maximum tokens per row.
        share: share of the tokens that an operation changes.

    Example:
        >>> eda = Eda(similar_tokens(embeddings, tokens), special_ids=(101, 102), seed=0, max_length=128)
        >>> eda({"input_ids": [101, 7592, 2088, 102], "attention_mask": [1, 1, 1, 1], "sample_id": 0})
    """

    def __init__(self, similar: dict[int, list[int]], special_ids: Collection[int], seed: int, max_length: int,
                 share: float = 0.1) -> None:  # fmt: skip
        self.similar = similar
        self.special = set(special_ids)
        self.random = np.random.default_rng(seed)
        self.max_length = max_length
        self.share = share
        self.operations: tuple[Callable[[list[tuple[int, ...]]], None], ...] = (
            self.insert, self.delete, self.swap, self.replace)  # fmt: skip

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The augmented row, with the same columns except unit_ids."""
        columns = [name for name in ("input_ids", "token_type_ids") if name in row]
        tokens = list(zip(*(map(int, row[name]) for name in columns), strict=True))
        if self._content(tokens):
            self.operations[self.random.integers(len(self.operations))](tokens)
        changed: dict[str, Any] = {"sample_id": row["sample_id"], "attention_mask": [1] * len(tokens)}
        for i, name in enumerate(columns):
            changed[name] = [token[i] for token in tokens]
        return changed

    def insert(self, tokens: list[tuple[int, ...]]) -> None:
        """Insert in place, as all operations work; tokens are (id, type)."""
        for _ in range(min(self._count(tokens), self.max_length - len(tokens))):
            content = self._content(tokens)
            at, source = self.random.choice(content, 2)
            tokens.insert(at + 1, (self._like(tokens[source][0]), *tokens[at][1:]))

    def delete(self, tokens: list[tuple[int, ...]]) -> None:
        content = self._content(tokens)
        gone = self.random.random(len(content)) < self.share
        gone[self.random.integers(len(content))] = False
        for at in np.asarray(content)[gone][::-1]:
            del tokens[at]

    def swap(self, tokens: list[tuple[int, ...]]) -> None:
        content = self._content(tokens)
        for _ in range(self._count(tokens)):
            one = int(self.random.choice(content))
            # Stay within one text, that is, between its special tokens.
            same = [at for at in content if not any(t[0] in self.special for t in tokens[min(one, at) : max(one, at)])]
            other = int(self.random.choice(same))
            tokens[one], tokens[other] = tokens[other], tokens[one]

    def replace(self, tokens: list[tuple[int, ...]]) -> None:
        content = self._content(tokens)
        for at in self.random.choice(content, self._count(tokens), replace=False):
            tokens[at] = (self._like(tokens[at][0]), *tokens[at][1:])

    def _content(self, tokens: list[tuple[int, ...]]) -> list[int]:
        return [at for at, token in enumerate(tokens) if token[0] not in self.special]

    def _count(self, tokens: list[tuple[int, ...]]) -> int:
        return max(1, round(self.share * len(self._content(tokens))))

    def _like(self, token: int) -> int:
        choices = self.similar.get(token) or [token]
        return int(self.random.choice(choices))
