"""One command in several processes (`torchrun`, `accelerate launch`): only one prints, and an error in any ends them all.

In a run of one process, all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")
_group: Any = None  # all ranks, with a long timeout: one may tokenise for hours while others wait; None: the default group
#: Errors that a user can fix; anything else is a bug and keeps its traceback.
EXPECTED = (ValueError, OSError, ModuleNotFoundError)


def world_size() -> int:
    """Number of processes in this run, as set by the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def join() -> None:
    """Join the process group."""
    global _group
    if world_size() > 1:
        from accelerate import PartialState

        gpu = torch.accelerator.is_available()
        PartialState(cpu=not gpu, **({} if gpu else {"backend": "gloo"}))
        _group = dist.new_group(backend="gloo", timeout=timedelta(days=7))


def leave() -> None:
    """Leave the process group."""
    global _group
    if dist.is_initialized():
        dist.destroy_process_group()
    _group = None


def in_turn(action: Callable[[], _T]) -> _T:
    """Run `action()` on each machine's first process, then on its others, which find the caches filled.

    Raises:
        ValueError: on all ranks, with the message of the first rank that failed.
    """
    if world_size() == 1:
        return action()
    result: Any = None
    first_here = int(os.environ.get("LOCAL_RANK", "0")) == 0
    for turn in (True, False):
        error: Exception | None = None
        if first_here is turn:
            try:
                result = action()
            except EXPECTED as caught:
                error = caught
        messages = [""] * world_size()
        dist.all_gather_object(messages, "" if error is None else str(error) or type(error).__name__, group=_group)
        if message := next(filter(None, messages), None):
            raise ValueError(message) from error
    return result


def broadcast_from_main(value: _T) -> _T:
    """The main process's value, on all processes."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, group=_group)
    return values[0]
