"""The sweep that parity and registration tests run: op × backend × dtype × sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cmlm_fast._library import contracts
from cmlm_fast.backends import _SUFFIX, BACKENDS, available

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


#: Samples of several tiles: seconds in Triton's interpreter.
MANY_TILES = ("63x1000", "rows-ranges", "blocks", "same-token", "cross-65")


def cases(dtypes: tuple[torch.dtype, ...] | None = None, values: bool = True) -> list[Any]:
    """`(name, suffix, device, dtype, label)` of every op on every backend that can run here. `values`: False for tests of
    the registration, which is the same for every sample, of what parity tests for each, or of the order of programs, which
    Triton's interpreter runs one by one: they need no sample of several tiles there."""
    found = []
    for name, contract in contracts.items():
        for device in DEVICES:
            backends = [backend for backend in BACKENDS if available(name, device)[backend] is None]
            for backend in backends:
                for dtype in contract.dtypes if dtypes is None else [d for d in contract.dtypes if d in dtypes]:
                    labels = [label for label, _ in contract.samples(dtype, torch.device(device))]
                    for label in labels:
                        if backend == "triton" and device == "cuda" and dtype == torch.float64 and label != labels[0]:
                            continue  # a kernel compiles for seconds; the interpreter runs them all
                        if not values and backend == "triton" and device == "cpu" and label in MANY_TILES:
                            continue
                        case = f"{name}-{backend}-{device}-{str(dtype)[6:]}-{label}"
                        marks = [pytest.mark.gpu] if device == "cuda" else []
                        found.append(pytest.param(name, _SUFFIX[backend], device, dtype, label, id=case, marks=marks))
    return found


def sample(name: str, dtype: torch.dtype, device: str, label: str) -> tuple[Any, ...]:
    """The arguments of one sample of an op."""
    return dict(contracts[name].samples(dtype, torch.device(device)))[label]
