"""Real processes without the cost of imports: a script imports everything once and forks what it runs."""

from __future__ import annotations

import faulthandler
import gc
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any

from tqdm.std import tqdm


def fork(action: Callable[[], Any], log: Path, **environment: str) -> int:
    """Run `action` in a forked process, its output appended to `log`; returns the process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    gc.freeze()  # imported objects are not garbage: see conftest.py
    _progress_bars_of_its_own()
    try:
        os.environ.update(environment)
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        faulthandler.enable(file=2)  # a process that crashes shows where
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _progress_bars_of_its_own() -> None:
    """Replace the bars' lock, a semaphore shared by forked processes: one killed while holding it would never release it."""
    kinds: list[type[tqdm[Any]]] = [tqdm]
    for kind in kinds:
        kind.set_lock(RLock())
        kinds.extend(kind.__subclasses__())


def wait(process: int) -> int:
    """The exit code of a forked process, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def fork_ranks(world: int, action: Callable[[], Any], log: Path) -> list[int]:
    """Fork `world` ranks with the environment that torchrun sets; each writes to its own log: log.0, log.1, ..."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [fork(action, log.with_suffix(f".{rank}"), RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(world)]
