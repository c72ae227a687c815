"""Folders checkpoint-N that are whole or absent, and what is found of them after a crash.

A checkpoint is written to a hidden folder beside its place, flushed to the disk, sealed by a manifest of sizes and CRC-32
sums, and renamed. So a process that is killed at any moment, or a machine that loses power, leaves whole checkpoints and
hidden rubbish; and what a disk damaged later is noticed before it is used.

    seal(folder, number)         manifest.json over all files, everything flushed
    publish(folder, target)      the rename
    damage(folder)               what is not as it was sealed, in words
    newest_whole(folder)         the newest checkpoint-N without damage
    rotate(folder, limit)        all but the newest `limit` go
    in_use(folder)               a lock that others see
    replacing(path)              the same for one file: whole or as it was

Which is newer is a number in the manifest, not N: a run that began anew in a folder of another is behind that at first.
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

#: Hidden folders beside the checkpoints begin so; any that is left of an earlier run is rubbish.
STAGING = ".saving-"
_MANIFEST = "manifest.json"
_CHUNK = 1 << 20


def checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders, in the order they were written, whole or not; those without a manifest last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[len("checkpoint-"):].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: (_number(path), step_of(path)))


def sealed(folder: Path) -> list[Path]:
    """Those of `checkpoints` that have a manifest."""
    return [path for path in checkpoints(folder) if _number(path) < math.inf]


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.rpartition("-")[2])


def next_number(folder: Path) -> int:
    """The number of the checkpoint that is written next in a folder of them."""
    return 1 + max((int(number) for number in map(_number, checkpoints(folder)) if number < math.inf), default=0)


def _number(checkpoint: Path) -> float:
    try:
        return int(json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8")).get("number", 0))
    except (OSError, ValueError, TypeError, AttributeError):
        return math.inf


def seal(folder: Path, number: int = 0) -> None:
    """Write manifest.json, the number and name -> [bytes, CRC-32] of every file below, and flush all of it to the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _crc(path)]
    with (folder / _MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"number": number, "files": files}, file, indent=1)
    flush(folder)


def flush(folder: Path) -> None:
    """Have files and folders below on the disk."""
    for path in (*folder.rglob("*"), folder):
        flush_one(path)


def publish(folder: Path, target: Path) -> None:
    """Rename a sealed folder to its place; one of that name, of an earlier run, makes room."""
    discard(target)
    os.replace(folder, target)
    flush_one(target.parent)


def discard(folder: Path) -> None:
    """Remove a folder; killed half-way, what remains has a hidden name."""
    if folder.exists():
        hidden = folder.with_name(f"{STAGING}old-{folder.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
        shutil.rmtree(hidden)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path to write to, which takes the place of `path` when the block ends without an error. Each process has its
    own, so that several may write the same file."""
    draft = path.with_name(f"{STAGING}{os.getpid()}-{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def in_use(folder: Path) -> Iterator[Callable[[], bool] | None]:
    """Inside, other processes see that the folder is used; yields a call that says whether this one alone does, and ends that
    use (it keeps the others out if so), or None where there is no such folder."""
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
    """None for a folder as it was sealed, else what differs first."""
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
    """The newest checkpoint-N without damage; one line is logged for each newer one that is passed over."""
    found = checkpoints(folder)
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is damaged (%s) and passed over", path, problem)
    return None


def rotate(folder: Path, limit: int | None, keep: str | None = None) -> None:
    """Remove all but `limit` checkpoints that were sealed: the newest, and `keep`, beside which the newest always stays. A
    limit of None or 0 removes none."""
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
    """Have one file on the disk, or the names of what lies in one folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
