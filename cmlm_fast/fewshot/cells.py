"""Finished cells: one line of JSON each, in a file that only grows by whole lines."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Cell = dict[str, Any]

#: The file's name.
CELLS = "cells.jsonl"

# Fields that a line needs to count as a cell.
_FIELDS = {"key", "dataset", "method", "shots", "draw", "accuracy", "macro_f1", "fine_tune_seconds", "post_train_seconds",
           "encoder_tokens", "setup_id", "method_id"}  # fmt: skip


def fingerprint(facts: Any) -> str:
    """16 hexadecimal digits of plain values; equal values give equal digits, whatever the order of a mapping."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint_rows(rows: Iterable[Any]) -> str:
    """As `fingerprint`, over many rows, one by one."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()[:16]


def read_cells(path: Path) -> list[Cell]:
    """The cells of a file, in order; lines that are not a cell, or that a crash cut short, are skipped with a warning."""
    if not path.exists():
        return []
    cells = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        cell = json.loads(line) if _is_json(line.encode()) else None
        if isinstance(cell, dict) and cell.keys() >= _FIELDS:
            cells.append(cell)
        elif line.strip():
            logger.warning("%s: line %d is not a cell and was skipped", path, number)
    return cells


def append_cell(path: Path, cell: Mapping[str, Any]) -> None:
    """Append one line, replacing a last line that was cut short, and flush it to disk. One process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(cell).encode() + b"\n"
    with path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        written = file.read()
        whole = written.rfind(b"\n") + 1
        if _is_json(written[whole:]):  # a whole line, lacking only its newline
            line, whole = b"\n" + line, len(written)
        file.truncate(whole)
        try:
            while line:  # a full disk may accept a part before it fails
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(whole)
            raise


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
