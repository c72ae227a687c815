"""Hands the CUDA kernels, on the CPU, wrong values that only they can see: each must stop the launch and state the rule.

    CMLM_FAST_LIBRARY=... python tests/cuda_host/refuse.py

Prints what was not refused; the last line has the number of these and of all cases.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cmlm_fast import complementary_mask, info_nce, token_contrastive, token_similarity

VOCABULARY = {"mask_token_id": 3, "vocab_size": 1000, "special_ids": (0, 1, 2, 3)}


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Pairs of words of a message and a call that must raise it."""
    ids, units = torch.arange(4, 14), torch.arange(10, dtype=torch.int32)
    for sampling in ("exact", "bernoulli"):
        options = {**VOCABULARY, "sampling": sampling, "backend": "cpp"}
        for cu in ([0, 5], [1, 10], [0, 7, 6, 10], [0, 11], [0, 12, 10]):
            sequences = torch.tensor(cu, dtype=torch.int32)
            yield "expected cu_seqlens to be non-decreasing", lambda s=sequences, o=options: complementary_mask(ids, s, **o)
        for bad in (1000, -1):
            wrong = ids.where(units != 6, torch.tensor(bad))[None]
            yield "expected input_ids to be in [0, vocab_size)", lambda w=wrong, o=options: complementary_mask(w, **o)
        wrong = units.where(units != 7, torch.tensor(-2, dtype=torch.int32))[None]
        yield "expected unit_ids to be >= 0", lambda w=wrong, o=options: complementary_mask(ids[None], unit_ids=w, **o)

    query, key, target = torch.randn(70, 8), torch.randn(90, 8), torch.arange(70)
    for way in ("tiles", "rows"):
        for bad in (90, -1, 1 << 40):
            wrong = target.where(target != 66, torch.tensor(bad))
            for function in (token_contrastive, token_similarity):
                yield (f"cmlm_fast::{function.__name__}: expected target to be in [0, M) or -100",
                       lambda f=function, w=wrong, way=way: on(way, f, query, key, w))  # fmt: skip
        for tau in (0.0, -1.0, float("inf"), float("nan")):
            temperature = torch.tensor(tau)
            for function, *args in ((token_contrastive, query, key, target), (token_similarity, query, key, target),
                                    (info_nce, query, query)):  # fmt: skip
                yield (f"cmlm_fast::{function.__name__}: expected temperature to be finite and > 0",
                       lambda f=function, a=args, t=temperature, way=way: on(way, f, *a, temperature=t))  # fmt: skip


def on(way: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    os.environ["CMLM_HOST_PATH"] = way
    return function(*args, **options, backend="cpp")


def main() -> None:
    torch.manual_seed(0)
    tried = accepted = 0
    for words, call in cases():
        tried += 1
        try:
            call()
            got = "no error"
        except RuntimeError as error:
            got = str(error)
        if words not in got:
            accepted += 1
            print(f"{words}: {got}")
    print(f"{accepted} of {tried}")


if __name__ == "__main__":
    main()
