"""The sweep that parity and registration tests run: op × backend × dtype × sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cmlm_fast._library import contracts
from cmlm_fast.backends import _SUFFIX, BACKENDS, available

EVERY = ("name", "suffix", "device", "dtype", "label")  # names of what `cases` makes, for pytest.mark.parametrize
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


#: Triton's interpreter takes seconds per sample. In tests of the registration, which is the same for every sample, and of the
#: order of programs, which it runs one by one, it runs only FEW; in tests of which gradients are asked for, only GRADIENTS, one
#: of them with several panels ("blocks").
FEW = ("sum-dot", "no-target", "nothing", "cross-rows", "labels-all-different", "nt_xent-one", "cross-none", "exact-paper",
       "bernoulli-8x128", "no-sequences", "odd-width", "dropout-window", "no-tokens", "ignored", "no-rows")  # fmt: skip
GRADIENTS = (*FEW, "blocks", "same-token", "cross-one-sided", "nt_xent-rows", "cold-nt_xent", "non-contiguous")


def cases(dtypes: tuple[torch.dtype, ...] | None = None, interpreted: tuple[str, ...] | None = None) -> list[Any]:
    """`(name, suffix, device, dtype, label)` of every op on every backend that can run here.

    Triton's interpreter runs only the samples that `interpreted` names, by default all.
    """
    found = []
    for name, contract in contracts.items():
        for device in DEVICES:
            backends = [backend for backend in BACKENDS if available(name, device)[backend] is None]
            for backend in backends:
                for dtype in contract.dtypes if dtypes is None else [d for d in contract.dtypes if d in dtypes]:
                    labels = [label for label, _ in contract.samples(dtype, torch.device(device))]
                    for label in labels:
                        if backend == "triton" and device == "cuda" and dtype == torch.float64 and label != labels[0]:
                            continue  # a kernel takes seconds to compile; the interpreter runs them all
                        if backend == "triton" and device == "cpu" and label not in (interpreted or labels):
                            continue
                        case = f"{name}-{backend}-{device}-{str(dtype)[6:]}-{label}"
                        marks = [pytest.mark.gpu] if device == "cuda" else []
                        found.append(pytest.param(name, _SUFFIX[backend], device, dtype, label, id=case, marks=marks))
    return found


def sample(name: str, dtype: torch.dtype, device: str, label: str) -> tuple[Any, ...]:
    """The arguments of one sample of an op."""
    return dict(contracts[name].samples(dtype, torch.device(device)))[label]
