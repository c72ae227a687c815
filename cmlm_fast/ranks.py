"""One command in several processes (`torchrun`, `accelerate launch`): one of them speaks, and an error of any ends them all.

Nothing here does anything in a run of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")
#: What a user can mend; anything else is a bug and keeps its traceback.
EXPECTED = (ValueError, OSError, ModuleNotFoundError)


def world_size() -> int:
    """Processes of this run, as the launcher set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def join() -> None:
    """Meet the other processes."""
    if world_size() > 1:
        from accelerate import PartialState

        gpu = torch.accelerator.is_available()
        PartialState(cpu=not gpu, **({} if gpu else {"backend": "gloo"}))


def leave() -> None:
    """Part from them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def in_turn(action: Callable[[], _T]) -> _T:
    """`action()`, first on each machine's first process, then on its others, which find the caches filled.

    Raises:
        ValueError: with the message of the first rank that failed, on all of them.
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
        messages: list[str | None] = [None] * world_size()
        dist.all_gather_object(messages, None if error is None else str(error))
        if message := next((message for message in messages if message is not None), None):
            raise ValueError(message) from error
    return result


def of_main(value: _T) -> _T:
    """The main process's value, on all of them."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]
