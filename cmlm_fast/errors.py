"""Exceptions that end a run early: stopped, diverged, or a failed write. `str()` of each is one line for the user."""

from __future__ import annotations

import errno
import signal

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
# safetensors and torch.save report a failed write as an exception of their own, with these words.
_DISK_WORDS = ("No space left", "os error 28", "File too large", "os error 27", "PytorchStreamWriter")


class Stopped(KeyboardInterrupt):
    """`signal` told the run to end. `str()` is one line that says what is kept."""

    def __init__(self, number: signal.Signals, kept: str | None = None) -> None:
        super().__init__(f"stopped by {number.name}" + (f"; {kept}" if kept else ""))
        self.signal, self.kept = number, kept


class DivergedError(ArithmeticError):
    """The loss or a weight is not finite. `str()` is one line: at which step, and what to resume from."""


class DiskError(OSError):
    """A write failed. `str()` is one line that says which, why, and what the folder still holds."""


def disk_reason(error: BaseException) -> str | None:
    """What an error says about the disk; None if it is about something else."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return error.strerror or str(error)
    text = str(error)
    if any(word in text for word in _DISK_WORDS):
        return next(iter(text.splitlines()), text)
    return None
