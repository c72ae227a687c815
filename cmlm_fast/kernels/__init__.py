"""Triton kernels of the ops: `kernels/<op>.py` holds the launchers `<op>` and `<op>_backward`, imported on first call.

    _scores.py     score tiles, candidates, row and column statistics, and the weights of the gradients
    _products.py   unit rows, the two products of the gradients, the backward pass of the normalisation
    _pairs.py      the order of the launches, shared by token_contrastive and info_nce
    _small.py      info_nce of few rows in one launch
    _philox.py     random words
    _configs.py    tile sizes by chip, dtype and shape class: data in configs.json
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor


def interpreted(tensor: Tensor) -> bool:
    """Whether kernels run interpreted, on the host: values are checked as well there, since that costs no synchronisation."""
    return not tensor.is_cuda


def on_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the first argument, whichever device is current."""

    @wraps(launcher)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):
            return launcher(first, *rest)

    return run


@cache
def _chip(device: int) -> str:
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def chip() -> str:
    """The key of the configurations: sm_80, sm_90, sm_100, gfx942, ... or "interpreter"."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    return _chip(torch.cuda.current_device() if torch.cuda.is_available() else -1)
