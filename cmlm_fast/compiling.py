"""torch.compile for an encoder's repeated layers, one by one; the rest of the model runs uncompiled.

All layers share one compilation for any number of tokens: it takes seconds, and no batch triggers another. The op
varlen_attention is part of a layer's code; if PyTorch's attention kernels run instead, the layer is compiled once more, in
pieces around them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def compile_layers(lm: Any, backend: str = "inductor", mode: str | None = None) -> None:
    """Compile the encoder's layers when they are first called; parameters, names and hooks stay.

    Args:
        lm: a Hugging Face masked LM.
        backend, mode: as `torch.compile` takes them.

    Raises:
        ValueError: the encoder has no list of layers of one class.
    """
    for layer in repeated_layers(lm):
        layer.compile(dynamic=True, backend=backend, mode=mode)


def compile_checkpointed_layers(lm: Any, backend: str = "inductor", mode: str | None = None) -> None:
    """The same for layers with activation checkpointing, after it was enabled."""
    # PyTorch runs whatever it checkpoints uncompiled, unless that is compiled itself.
    run = torch.compile(_call, dynamic=True, backend=backend, mode=mode)
    for layer in repeated_layers(lm):
        layer._gradient_checkpointing_func = _inside(layer._gradient_checkpointing_func, run)


def repeated_layers(lm: Any) -> nn.ModuleList:
    """The encoder's longest list of modules of one class."""
    lists = [module for module in lm.base_model.modules() if isinstance(module, nn.ModuleList)]
    same = [found for found in lists if len({type(layer) for layer in found}) == 1]
    if not same:
        raise ValueError(f"compile_layers: expected lm to have a list of layers of one class, got {type(lm).__name__}")
    return max(same, key=len)


def _call(function: Any, *args: Any) -> Any:
    return function(*args)


def _inside(checkpoint: Any, run: Any) -> Any:
    """`checkpoint` for a function called through `run`."""

    @torch.compiler.disable
    def checkpoint_compiled(function: Any, *args: Any) -> Any:
        return checkpoint(run, function, *args)

    return checkpoint_compiled
