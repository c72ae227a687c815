"""The output folder: checked before the work, filled file by file, never left half-written.

A run writes `metrics.jsonl` and the Trainer's `checkpoint-N/` as it goes. Everything else is first written to a hidden
folder inside the output folder (so on the same disk) and renamed into place once all of it is there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .checkpoints import STAGING, checkpoints, flush, newest_whole

#: Written last of all: where it is, the run is finished.
SUMMARY = "summary.json"
_CHUNK = bytes(1 << 20)
_BEGUN = ("metrics.jsonl", "settings.json")  # all that is there of a run that ended before its first checkpoint
# What a checkpoint may have beside its config.json: weights, tokenizer, and modules of sentence-transformers.
_OF_A_MODEL = ("model*.safetensors*", "pytorch_model*.bin*", "contrast.safetensors", "cmlm_config.json", "tokenizer*",
               "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model",
               "sentencepiece.bpe.model", "modules.json", "config_sentence_transformers.json",
               "sentence_bert_config.json", "[0-9]_*")  # fmt: skip
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
# safetensors and torch.save report a failed write as an exception of their own, with these words.
_DISK_WORDS = ("No space left", "os error 28", "File too large", "os error 27", "PytorchStreamWriter")


class Stopped(KeyboardInterrupt):
    """The run was told to end by `signal`. `str()` is one line that says what is kept."""

    def __init__(self, number: signal.Signals, kept: str | None = None) -> None:
        super().__init__(f"stopped by {number.name}" + (f"; {kept}" if kept else ""))
        self.signal, self.kept = number, kept


class DivergedError(ArithmeticError):
    """The loss or a weight is not finite. `str()` is one line: at which step, and what can be gone on from."""


class DiskError(OSError):
    """A write failed. `str()` is one line that says which, why, and what the folder still holds."""


def check_output(folder: Path, *, overwrite: bool, resume: bool) -> Path | None:
    """Check that `folder` may be written to; return the checkpoint to resume from, if asked. Writes nothing.

    Raises:
        ValueError: overwrite and resume together; a file where the folder should be; a folder with something in it and
            neither flag; resume without a checkpoint.
    """
    if overwrite and resume:
        raise ValueError("expected at most one of overwrite and resume, got both")
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.absolute().parents)):
        raise ValueError(f"expected output_dir to be a folder, or a path where one can be made, got {folder}")
    if resume:
        checkpoint = newest_whole(folder)
        if checkpoint is None:
            rule = "a whole checkpoint-N to resume from (--overwrite begins anew)"
            raise ValueError(f"expected output_dir to hold {rule}, got {folder}")
        return checkpoint
    begun = (path.name in _BEGUN or path.name.startswith(STAGING) for path in (folder.iterdir() if folder.exists() else ()))
    if not overwrite and not all(begun):
        raise ValueError(f"expected output_dir to be new or empty (or give --overwrite or --resume), got {folder}")
    return None


def open_output(folder: Path, size: int, *, fresh: bool) -> None:
    """Make the folder, prove with a trial file that `size` bytes fit, and clear what an earlier run left behind.

    `fresh` also removes earlier checkpoints, metrics and summary, which a later `--resume` would otherwise take up; other
    files stay. Raises DiskError, and leaves nothing that was not there, when the trial file cannot be written.
    """
    created = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            _fill(trial, size)
    except OSError as error:
        for path in created:
            if path.exists():
                path.rmdir()
        rule = f"writable, with room for {size / 1e6:.0f} MB"
        raise DiskError(f"expected output_dir to be {rule}, got {error.strerror or error}: {folder}") from error
    for path in folder.glob(f"{STAGING}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if fresh:
        for path in checkpoints(folder):
            shutil.rmtree(path)
        for name in (*_BEGUN, SUMMARY):
            (folder / name).unlink(missing_ok=True)


def _fill(file: IO[bytes], size: int) -> None:
    """Take `size` bytes of the disk: at once where the system can, else by writing them."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            return os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # the file system cannot
                raise
    for begin in range(0, size, len(_CHUNK)):
        file.write(_CHUNK[: size - begin])
    file.flush()


def finished_run(folder: Path) -> dict[str, Any] | None:
    """The summary of the run whose folder it is, if that has ended and all that it wrote is still there."""
    if not (folder / SUMMARY).exists():
        return None
    summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return summary if all((folder / name).exists() for name in summary.get("files", ())) else None


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A hidden folder to write a checkpoint to. When the block ends without an error its entries are renamed into `folder`,
    and what `folder` has of another checkpoint and this one lacks goes: it would be loaded with it."""
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
    try:
        yield staging
        flush(staging)
        names = {path.name for path in staging.iterdir()}
        for path in [path for pattern in _OF_A_MODEL for path in folder.glob(pattern) if path.name not in names]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == SUMMARY):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def disk_errors(folder: Path, kept: str | None = None) -> Iterator[None]:
    """Turn a failed write inside the block into a DiskError that says what is kept; default: `what_is_kept`."""
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        reason = disk_reason(error)
        if reason is None:
            raise
        raise DiskError(f"could not write to {folder}: {reason}; {kept or what_is_kept(folder)}") from error


def what_is_kept(folder: Path) -> str:
    """What a run that ends early leaves, for its message."""
    found = checkpoints(folder)
    if not found:
        return "there is no checkpoint, the same command begins again"
    return f"{found[-1].name} is whole, continue with --resume"


def disk_reason(error: BaseException) -> str | None:
    """What an error says of the disk, if it is about that."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return error.strerror or str(error)
    text = str(error)
    if any(word in text for word in _DISK_WORDS):
        return next(iter(text.splitlines()), text)
    return None
