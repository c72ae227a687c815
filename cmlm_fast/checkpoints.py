"""Folders checkpoint-N that are whole or absent, and recovery after a crash.

A checkpoint is written to a hidden folder next to its final place, flushed to disk, sealed by a manifest of sizes and CRC-32
sums, and renamed. So a process killed at any moment, or a machine that loses power, leaves whole checkpoints and hidden
leftovers; and later damage by the disk is noticed before the checkpoint is used.

    seal(folder, number)         write manifest.json over all files and flush everything
    publish(folder, target)      rename into place
    damage(folder)               describe the first difference from what was sealed
    newest_whole(folder)         the newest checkpoint-N without damage
    rotate(folder, limit)        remove all but the newest `limit`
    in_use(folder)               a lock that other processes see
    replacing(path)              the same for one file: replaced as a whole or not at all

A number in the manifest says which checkpoint is newer, not N: a run that starts over in another run's folder has a smaller N
at first.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

#: Prefix of the hidden folders next to the checkpoints; those left by an earlier run can be removed.
STAGING = ".saving-"
_MANIFEST = "manifest.json"
_CHUNK = 1 << 20


def checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders in the order they were written, whole or not, those without a manifest last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[len("checkpoint-"):].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: (_number(path), step_of(path)))


def sealed(folder: Path) -> list[Path]:
    """The `checkpoints` that have a manifest."""
    return [path for path in checkpoints(folder) if _number(path) < math.inf]


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.rpartition("-")[2])


def next_number(folder: Path) -> int:
    """The number of the next checkpoint to be written in a folder."""
    return 1 + max((int(number) for number in map(_number, checkpoints(folder)) if number < math.inf), default=0)


def _number(checkpoint: Path) -> float:
    try:
        return int(json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8")).get("number", 0))
    except (OSError, ValueError, TypeError, AttributeError):
        return math.inf


def seal(folder: Path, number: int = 0) -> None:
    """Write manifest.json, with the number and name -> [bytes, CRC-32] of every file below, and flush everything to disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _crc(path)]
    with (folder / _MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"number": number, "files": files}, file, indent=1)
    flush(folder)


def flush(folder: Path) -> None:
    """Flush a folder, and all files and folders below it, to disk."""
    for path in (*folder.rglob("*"), folder):
        flush_one(path)


def publish(folder: Path, target: Path) -> None:
    """Rename a sealed folder into place, replacing a folder of that name from an earlier run."""
    discard(target)
    os.replace(folder, target)
    flush_one(target.parent)


def discard(folder: Path) -> None:
    """Remove a folder; if killed half-way, the rest has a hidden name."""
    if folder.exists():
        hidden = folder.with_name(f"{STAGING}old-{folder.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
        shutil.rmtree(hidden)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path to write to, which replaces `path` if the block ends without an error.

    Each process has its own, so that several may write the same file.
    """
    draft = path.with_name(f"{STAGING}{os.getpid()}-{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def in_use(folder: Path) -> Iterator[Callable[[], bool] | None]:
    """Show other processes that the folder is in use; yields None if there is no such folder.

    Otherwise yields a function that ends this use and says whether it was the only one; if so, it keeps others out.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield None
        return

    def alone() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        there = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
        yield alone if there else None
    finally:
        os.close(descriptor)


def damage(folder: Path) -> str | None:
    """None for a folder as it was sealed, else its first difference."""
    try:
        files = {str(name): (int(size), int(crc)) for name, (size, crc) in
                 json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"].items()}  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{_MANIFEST} is missing or cannot be read"
    for name, (size, _) in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
    for name, (_, crc) in files.items():
        try:
            if _crc(folder / name) != crc:
                return f"{name} has other bytes than were written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint-N without damage; logs one line for each newer one that is skipped."""
    found = checkpoints(folder)
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is damaged (%s) and passed over", path, problem)
    return None


def rotate(folder: Path, limit: int | None, keep: str | None = None) -> None:
    """Remove all but `limit` sealed checkpoints: the newest, and `keep`, in addition to which the newest one always stays.

    A limit of None or 0 removes none.
    """
    found = sealed(folder)
    if not limit:
        return
    kept = [path for path in found if keep is not None and path.resolve() == Path(keep).resolve()]
    if kept and kept[0] not in found[-limit:]:
        limit = max(limit - 1, 1)
    for path in found[:-limit]:
        if path not in kept:
            discard(path)


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def flush_one(path: Path) -> None:
    """Flush one file to disk, or the entries of one folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
