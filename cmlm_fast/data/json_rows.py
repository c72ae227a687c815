"""Read JSON rows: one object per line, or one list of objects or of strings; only the requested columns are kept.

The reader of `datasets` infers the types of all columns from a file's first 10 MB: it rejects other types later on, even in
columns that nobody asked for, and turns a text such as "2020-01-01" into a date.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

#: Python types that a column of each type may hold, apart from null. A column that starts out empty is read as text.
_HOLDS: dict[str, tuple[type, ...]] = {"string": (str,), "blank": (str,), "bool": (bool,), "int64": (int,),
                                       "double": (int, float)}  # fmt: skip
_KINDS = {frozenset[str](): "blank", frozenset({"str"}): "string", frozenset({"bool"}): "bool", frozenset({"int"}): "int64",
          frozenset({"float"}): "double", frozenset({"int", "float"}): "double"}  # fmt: skip


class ColumnError(ValueError):
    """Column `name` of a file does not hold `kind`; `str()` says what it holds."""

    def __init__(self, name: str, kind: str, found: str) -> None:
        super().__init__(found)
        self.name, self.kind = name, kind


def json_types(path: Path, asked: Collection[str]) -> dict[str, str]:
    """The type of each column, from the first 1000 rows and as many more as it takes to see all requested columns.

    Empty if there are no rows. Raises ValueError if one of the rows read is not JSON.
    """
    found: dict[str, set[str]] = {}
    for number, row in enumerate(_rows(path)):
        if number >= 1000 and found.keys() >= set(asked):
            break
        for name, value in row.items():
            found.setdefault(name, set()).update(() if value is None else (type(value).__name__,))
    return {name: _KINDS.get(frozenset(kinds), " or ".join(sorted(kinds))) for name, kinds in found.items()}


def read_json(path: Path, columns: Mapping[str, str]) -> Dataset:
    """Read the columns with these names and types, None where a row lacks one; cached by `datasets` until the file changes."""
    for name, kind in columns.items():
        if kind not in _HOLDS:
            raise ColumnError(name, "text, numbers, or true and false, one of them in all rows", kind)
    # Not a list: `datasets` would treat its items as shards.
    kept = {"path": str(path.resolve()), "columns": dict(columns), "state": file_state(path)}
    features = Features({name: Value("string" if kind == "blank" else kind) for name, kind in columns.items()})
    read: Dataset = Dataset.from_generator(_chosen, features=features, gen_kwargs=kept)
    return read


def file_state(path: Path) -> str:
    """A string that changes with every write to the file, even if its old modification time is restored."""
    state = path.stat()
    return f"{state.st_size}-{state.st_mtime_ns}-{state.st_ctime_ns}"


def _chosen(path: str, columns: Mapping[str, str], state: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_rows(Path(path)), 1):
        chosen = {name: row.get(name) for name in columns}
        for name, value in chosen.items():
            if value is not None and type(value) not in _HOLDS[columns[name]]:
                kind = _HOLDS[columns[name]][-1].__name__
                raise ColumnError(name, f"{kind} or nothing in all rows", f"{type(value).__name__} in row {number}")
        yield chosen


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        listed = first.lstrip().startswith("[")
        for number, value in enumerate(json.load(file) if listed else _lines(file), 1):
            if isinstance(value, str) and listed:
                value = {"text": value}
            if not isinstance(value, dict):
                raise ValueError(f"row {number} is not an object but {type(value).__name__}")
            yield value


def _lines(file: Any) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                rule = "neither a list of objects nor an object per line" if number == 1 else f"line {number}"
                raise ValueError(f"{rule}: {error.msg.removesuffix(' at')}") from None
