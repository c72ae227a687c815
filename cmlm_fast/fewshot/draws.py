"""Draw the labelled texts: the same number from every class, by a seed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np


def draw(labels: Sequence[Hashable], shots: int, seed: int) -> list[int]:
    """Indices of `shots` texts of every class, in random order; the same for the same labels and seed.

    For a given seed, a smaller draw is a subset of a larger one. Raises ValueError if shots < 1 or a class has fewer texts.

    Example:
        >>> sorted(["a", "b", "a", "b"][i] for i in draw(["a", "b", "a", "b"], shots=1, seed=0))
        ['a', 'b']
    """
    if shots < 1:
        raise ValueError(f"draw: expected shots to be >= 1, got {shots}")
    random = np.random.default_rng(seed)
    chosen: list[int] = []
    for label in classes_of(labels):
        members = [i for i, other in enumerate(labels) if other == label]
        if len(members) < shots:
            raise ValueError(f"draw: expected shots to be <= {len(members)}, the texts labelled {label!r}, got {shots}")
        chosen += random.permutation(members)[:shots].tolist()
    return random.permutation(chosen).tolist()


def classes_of(labels: Sequence[Hashable]) -> list[Any]:
    """The distinct labels, sorted by type and value."""
    return sorted(set(labels), key=lambda label: (str(type(label)), label))
