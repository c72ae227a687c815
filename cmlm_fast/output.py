"""The output folder: checked before the work, filled file by file, never left half-written.

A run writes `metrics.jsonl` and the Trainer's `checkpoint-N/` as it goes. Everything else is first written to a hidden
folder inside the output folder (hence on the same disk) and renamed into place once complete.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .checkpoints import STAGING, flush, flush_one, newest_whole, sealed
from .errors import DiskError, disk_reason

#: Written last: if it exists, the run is finished.
SUMMARY = "summary.json"
_CHUNK = bytes(1 << 20)
_BEGUN = ("metrics.jsonl", "settings.json")  # the only files of a run that ended before its first checkpoint
#: TensorBoard files of this run and earlier ones.
REPORTS = "runs"
# Exact names of the files that a checkpoint may have next to its config.json; other files in the folder are not ours.
_OF_A_MODEL = ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors", "pytorch_model.bin",
               "pytorch_model.bin.index.json", "pytorch_model-?????-of-?????.bin", "contrast.safetensors", "cmlm_config.json",
               "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt",
               "special_tokens_map.json", "added_tokens.json", "spiece.model", "sentencepiece.bpe.model", "modules.json",
               "config_sentence_transformers.json", "sentence_bert_config.json")  # fmt: skip
_PATIENCE = 5.0  # seconds to wait for a run that is just ending


def check_output(folder: Path, *, overwrite: bool, resume: bool) -> Path | None:
    """Check that `folder` may be written to; return the checkpoint to resume from. Writes nothing.

    Returns None without `resume`, or if the run has finished and its checkpoints are gone.

    Raises:
        ValueError: overwrite and resume together; a file where the folder should be; a non-empty folder and neither flag;
            resume without a checkpoint.
    """
    if overwrite and resume:
        raise ValueError("expected at most one of overwrite and resume, got both")
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.absolute().parents)):
        raise ValueError(f"expected output_dir to be a folder, or a path where one can be made, got {folder}")
    if resume:
        checkpoint = newest_whole(folder)
        if checkpoint is None and finished_run(folder) is None:
            rule = "a whole checkpoint-N to resume from (--overwrite starts over)"
            raise ValueError(f"expected output_dir to hold {rule}, got {folder}")
        return checkpoint
    there = [path.name for path in folder.iterdir()] if folder.exists() else []
    leftovers = (*_BEGUN, REPORTS) if _is_begun(folder) else ()
    if not overwrite and not all(name in leftovers or name.startswith(STAGING) for name in there):
        raise ValueError(f"expected output_dir to be new or empty (or give --overwrite or --resume), got {folder}")
    return None


def _is_begun(folder: Path) -> bool:
    """Whether settings.json was written by a run, and is not another file of that name."""
    try:
        return "token_weight" in json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


@contextmanager
def open_output(folder: Path, size: int, *, fresh: bool) -> Iterator[None]:
    """Make the folder, prove with a trial file that `size` bytes fit, and remove an earlier run's leftovers.

    Inside the block no other process can open the folder. `fresh` also removes earlier checkpoints (whose space counts as
    free), metrics and summary, which a later `--resume` would otherwise pick up; other files stay.

    Raises:
        DiskError: the trial file cannot be written; nothing new is left behind.
        ValueError: another process has the folder open.
    """
    created = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _unusable(folder, size, error, created) from error
    try:
        _lock(descriptor, folder)
        _clear(folder, size, created, fresh)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    """Raise ValueError if another process holds the folder, and still does after a few seconds."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise ValueError(f"expected output_dir to be used by no other run, got {folder}") from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return


def _clear(folder: Path, size: int, created: list[Path], fresh: bool) -> None:
    going = sealed(folder) if fresh else []
    freed = sum(path.stat().st_size for checkpoint in going for path in checkpoint.rglob("*") if path.is_file())
    size = max(size - freed, 0)
    try:
        with tempfile.TemporaryFile(dir=folder) as trial:
            _fill(trial, size)
    except OSError as error:
        raise _unusable(folder, size, error, created) from error
    for path in folder.glob(f"{STAGING}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in going:
        shutil.rmtree(path)
    if fresh:
        for name in (*_BEGUN, SUMMARY):
            (folder / name).unlink(missing_ok=True)


def _unusable(folder: Path, size: int, error: OSError, created: list[Path]) -> DiskError:
    for path in created:
        if path.exists():
            path.rmdir()
    rule = f"writable, with room for {size / 1e6:.0f} MB"
    return DiskError(f"expected output_dir to be {rule}, got {error.strerror or error}: {folder}")


def _fill(file: IO[bytes], size: int) -> None:
    """Allocate `size` bytes on disk: at once if the system can, else by writing them."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            return os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # the file system cannot do this
                raise
    for begin in range(0, size, len(_CHUNK)):
        file.write(_CHUNK[: size - begin])
    file.flush()


def finished_run(folder: Path) -> dict[str, Any] | None:
    """The summary of the run in this folder, if it has finished and all its files still exist.

    None if summary.json is damaged, or is another file of that name.
    """
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        whole = summary["files"] and all((folder / name).exists() for name in summary["files"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return summary if whole else None


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A hidden folder to write a checkpoint to; its entries are renamed into `folder` if the block ends without an error.

    Files of another checkpoint in `folder` that this one lacks are removed, since they would be loaded with it.
    """
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
    try:
        yield staging
        flush(staging)
        names = {path.name for path in staging.iterdir()}
        for path in [path for path in _of_a_model(folder) if path.name not in names]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == SUMMARY):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            if path.name == SUMMARY:
                flush_one(folder)  # the files it promises are on disk before it is
            os.replace(path, target)
        flush_one(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _of_a_model(folder: Path) -> list[Path]:
    """What a checkpoint in the folder consists of: files, and the modules that its modules.json names."""
    found = [path for pattern in _OF_A_MODEL for path in folder.glob(pattern) if path.is_file()]
    try:
        modules = [module["path"] for module in json.loads((folder / "modules.json").read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError):
        modules = []
    inside = [folder / name for name in modules if isinstance(name, str) and name == Path(name).name and name not in ("", "..")]
    return found + [path for path in inside if path.is_dir()]


@contextmanager
def disk_errors(folder: Path, kept: str | None = None) -> Iterator[None]:
    """Turn a failed write in the block into a DiskError that says what is `kept`; default: `what_is_kept(folder)`."""
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
    """Say what a run that ends early leaves behind, for its message."""
    if (summary := finished_run(folder)) is not None:
        return "the trained model is saved" + ("" if summary["held_out_before_after"] else ", without scores")
    found = sealed(folder)
    if not found:
        return "there is no checkpoint, the same command starts over"
    return f"{found[-1].name} is whole, continue with --resume"
