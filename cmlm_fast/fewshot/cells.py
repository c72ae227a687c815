"""Finished cells: one line of JSON each, in a file that only grows."""

from __future__ import annotations

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


def fingerprint(facts: Any) -> str:
    """16 hexadecimal digits of plain values; equal values, whatever their order in a mapping, give equal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint_rows(rows: Iterable[Any]) -> str:
    """The same of many rows, one by one."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()[:16]


def read_cells(path: Path) -> list[Cell]:
    """The cells of a file, in its order; a line that a crash cut short is skipped and named in a warning."""
    if not path.exists():
        return []
    cells = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            cell = json.loads(line)
        except json.JSONDecodeError:
            if line.strip():
                logger.warning("%s: line %d is no JSON and was skipped", path, number)
            continue
        cells.append(cell)
    return cells


def append_cell(path: Path, cell: Mapping[str, Any]) -> None:
    """Add one line by a single write, which other processes' lines cannot tear, and wait until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(cell) + "\n"
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size and _last_byte(file, size) != b"\n":
            line = "\n" + line  # behind what a crash cut short
        file.write(line.encode())
        os.fsync(file.fileno())


def _last_byte(file: Any, size: int) -> bytes:
    file.seek(size - 1)
    last: bytes = file.read(1)
    return last
