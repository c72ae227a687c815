"""Read texts from a file or a saved folder into a `Dataset` with columns text (and text_pair)."""

from __future__ import annotations

import codecs
import csv
import glob
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from datasets import Dataset, DatasetDict, Features, Value, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError

from ._errors import TEXT_TYPES, fail
from .json_rows import ColumnError, file_state, json_types, read_json

# How `datasets` reads each format, except JSON. A BOM is not text, hence utf-8-sig. "NA" and "null" are words, so pandas must
# not read them as missing.
_CSV = {"encoding": "utf-8-sig", "na_filter": False}
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"encoding": "utf-8-sig", "features": Features({"text": Value("string")})}),
    ".csv": ("csv", {"sep": ",", **_CSV}),
    ".tsv": ("csv", {"sep": "\t", **_CSV}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_Read = Callable[[list[str]], Dataset]  # reads the columns with these names
_BLANK = "blank"  # a .csv or JSON column whose first rows are empty: text if requested, never chosen by default


def load_texts(path: str | Path, *, text_column: str | None = None, text_pair_column: str | None = None) -> Dataset:
    """Read the texts of a file, or of a folder saved with `datasets`, in order, as strings (or None).

    Args:
        path: .txt (one text per line), .csv or .tsv (with a header; texts may be quoted, and in a .tsv that is not quoted,
            quotation marks are text), .jsonl or .json (objects, or a list of strings), .parquet; all text is UTF-8. Or a
            folder written by `save_to_disk`, with one split or a split "train".
        text_column: column that holds the text; default: "text" or "sentence", or if neither exists, the only column of
            strings.
        text_pair_column: column that holds the second text of a pair, if any.

    Returns:
        Dataset with column text (and text_pair). The data is cached by `datasets`; a changed file is read again.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown suffix or column, a column that holds no text, no rows, bytes that are not UTF-8, or a file
            that does not parse; names the argument, the rule and the value. Columns of .csv, .tsv, .jsonl and .json get
            the type of their first 1000 rows (in JSON a requested column may start later); the contents of columns that
            are not requested do not matter.

    Example:
        >>> load_texts("pairs.csv", text_column="question", text_pair_column="answer").column_names
        ['text', 'text_pair']
    """
    dataset = read_columns(path, text_column, text_pair_column, {})
    strings = Features({name: Value("string") for name in dataset.column_names})
    return dataset if dataset.features == strings else dataset.cast(strings)


def read_columns(path: str | Path, text_column: str | None, text_pair_column: str | None,
                 others: Mapping[str, tuple[str, str]], split: str = "train") -> Dataset:  # fmt: skip
    """Read columns text (and text_pair), chosen as in `load_texts`, and `others`: new name -> (argument, column), any type.

    `split` is the split to read from a saved folder with several.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"load_texts: expected path to be an existing file or folder, got {path}")
    asked = {text_column, text_pair_column, *(column for _, column in others.values())} - {None}
    read, types = _open_folder(path, split) if path.is_dir() else _open_file(path, asked)
    for argument, column in others.values():
        if column not in types:
            raise fail("load_texts", argument, f"one of the columns {list(types)}", repr(column))
    taken = {column for _, column in others.values()} | {text_pair_column}
    if text_column is None:
        _check_separator(path, types)
    wanted = {"text": _choose_column(types, text_column, taken)}
    if text_pair_column is not None:
        wanted["text_pair"] = _check_column(types, "text_pair_column", text_pair_column)
    columns = {**{f"{name}_column": column for name, column in wanted.items()}, **dict(others.values())}
    owner: dict[str, str] = {}
    for argument, column in columns.items():
        if owner.setdefault(column, argument) != argument:
            raise fail("load_texts", argument, f"another column than {owner[column]}", repr(column))
    wanted |= {name: column for name, (_, column) in others.items()}
    return read(list(wanted.values())).rename_columns({old: new for new, old in wanted.items()})


def _choose_column(types: Mapping[str, str], given: str | None, taken: Collection[str | None]) -> str:
    if given is not None:
        return _check_column(types, "text_column", given)
    texts = [name for name, kind in types.items() if kind in TEXT_TYPES and name not in taken]
    usual = [name for name in ("text", "sentence") if name in types and name not in taken]
    if usual:  # if it holds no text, an error: never fall back to another column
        chosen = next((name for name in usual if name in texts), usual[0])
        return _check_column(types, "text_column", chosen, TEXT_TYPES)
    if len(texts) == 1:
        return texts[0]
    rule = "given, unless a column is named text or sentence, or exactly one holds text"
    raise fail("load_texts", "text_column", rule, f"columns {dict(types)}")


def _check_separator(path: Path, types: Mapping[str, str]) -> None:
    """Raise ValueError if the only column's name looks like several, joined by a separator that the suffix does not imply."""
    own, others = {".csv": ("commas", ";\t"), ".tsv": ("tabs", ",;")}.get(path.suffix.lower(), ("", ""))
    if len(types) == 1 and any(mark in name for name in types for mark in others):
        rule = f"a {path.suffix} with {own} between its columns, or text_column given"
        raise fail("load_texts", "path", rule, f"the one column {list(types)}")


def _check_column(types: Mapping[str, str], argument: str, name: str,
                  kinds: tuple[str, ...] = (*TEXT_TYPES, _BLANK)) -> str:  # fmt: skip
    if name not in types:
        raise fail("load_texts", argument, f"one of the columns {list(types)}", repr(name))
    if types[name] not in kinds:
        raise fail("load_texts", argument, "a column of text", f"{name!r} of type {types[name]}; columns {dict(types)}")
    return name


def _types(dataset: Dataset) -> dict[str, str]:
    return {name: str(getattr(kind, "dtype", kind)) for name, kind in dataset.features.items()}


def _open_folder(path: Path, split: str) -> tuple[_Read, dict[str, str]]:
    _check_name(path)
    try:
        saved = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise fail("load_texts", "path", "a file or a folder saved with datasets", path) from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:  # a file in it is not as `datasets` wrote it
        found = f"{path}: {type(error).__name__}: {' '.join(str(error).split())}"
        raise fail("load_texts", "path", "a folder saved with datasets that is whole", found) from error
    if isinstance(saved, DatasetDict):
        if split not in saved and len(saved) != 1:
            raise fail("load_texts", "path", f"a folder with a split {split!r} or one split", f"{path}: {list(saved)}")
        saved = saved[split] if split in saved else next(iter(saved.values()))
    if len(saved) == 0:
        raise fail("load_texts", "path", "a folder with at least one row", path)
    saved = saved.with_format(None)  # the format is saved with the folder and would change what a row is
    return saved.select_columns, _types(saved)


def _check_name(path: Path) -> None:
    if "::" in str(path):
        raise fail("load_texts", "path", "one without '::', which `datasets` takes for a file inside an archive", path)


def _open_file(path: Path, asked: Collection[Any]) -> tuple[_Read, dict[str, str]]:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise fail("load_texts", "path", f"a saved datasets folder or a file ending in {', '.join(_READERS)}", path)
    if path.stat().st_size == 0:
        raise fail("load_texts", "path", "a file that is not empty", path)
    reader, options = _READERS[suffix]
    if reader != "parquet":
        _check_utf8(path)
    types: dict[str, str] | None = None
    if reader == "json":
        with _named(path):
            types = json_types(path, asked)
        if not types:
            raise fail("load_texts", "path", "a file with at least one row", path)
        return partial(_read_json, path, types), types
    _check_name(path.resolve())
    with _named(path):
        if reader == "csv":
            if suffix == ".tsv" and not _uses_quotes(path):
                options = {**options, "quoting": csv.QUOTE_NONE}
            types = _csv_types(path, options)
            options = {**options, "features": Features({name: Value("string") for name in types})}
            if len(types) == 1:  # an empty line is an empty text; with several columns it is not a row
                options |= {"skip_blank_lines": False, "header": _blank_lines(path)}
        # Escaped, since `datasets` treats a name such as "part[1].txt" as a pattern. Its cache key covers only the file's path
        # and mtime, and `name`, which adds the file's state.
        files = {"train": glob.escape(str(path.resolve()))}
        builder = load_dataset_builder(reader, name=file_state(path), data_files=files, **options)
        builder.download_and_prepare()
        rows = builder.info.splits["train"].num_examples
        read = builder.as_dataset("train") if rows else None
    if read is None:
        raise fail("load_texts", "path", "a file with at least one row", path)
    return read.select_columns, types or _types(read)


def _read_json(path: Path, types: Mapping[str, str], columns: list[str]) -> Dataset:
    with _named(path):
        return read_json(path, {name: types[name] for name in columns})


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn an error from a file reader into one that names the file."""
    try:
        yield
    except (DatasetGenerationError, ValueError, OSError, RecursionError) as error:  # RecursionError: JSON nested too deeply
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno:  # for instance a full disk, not a fault of the file
            where = f"{datasets.config.HF_DATASETS_CACHE} (HF_DATASETS_CACHE names another folder)"
            raise OSError(cause.errno, f"load_texts: {path} could not be cached in {where}: {cause.strerror}") from error
        found = f"{path}: {' '.join(str(cause).split())}"
        rule = f"a valid {path.suffix.lower()} file"
        if isinstance(cause, ColumnError):
            rule = f"a file whose column {cause.name!r} holds {cause.kind}"
        raise fail("load_texts", "path", rule, found) from error


def _csv_types(path: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """Column types from the first 1000 rows; the file itself is read as strings, to keep a text such as "007" intact."""
    head = pd.read_csv(path, nrows=1000, sep=options["sep"], encoding=options["encoding"], keep_default_na=False,
                       na_values=[""], quoting=options.get("quoting", csv.QUOTE_MINIMAL))  # fmt: skip
    if not isinstance(head.index, pd.RangeIndex):  # pandas would use the surplus field as row names
        header = ", ".join(map(repr, head.columns))
        cause = "are its columns separated by semicolons?" if ";" in header else "is a comma in it not quoted?"
        raise ValueError(f"the first row has more fields than the header, {header}; {cause}")
    return {str(name): _csv_type(head[name]) for name in head.columns}


def _blank_lines(path: Path) -> int:
    """Number of blank lines before the header."""
    with path.open(encoding="utf-8-sig") as file:
        return sum(1 for _ in takewhile(lambda line: not line.strip(" \t\n"), file))


def _csv_type(column: pd.Series) -> str:
    if column.isna().all():
        return _BLANK
    return "string" if pd.api.types.is_string_dtype(column.dtype) else str(column.dtype)


def _uses_quotes(path: Path) -> bool:
    """Whether quotation marks in a .tsv quote fields; False if they are text.

    They are text if each line has the header's number of fields, at least two, and some field that begins with a mark is not
    quoted as a whole; or if a mark that begins a field has no closing mark. Read as quoted, such a field would swallow the
    lines that follow.
    """
    plain = False
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        width = next(file, "").count("\t")
        for line in file:
            if width == 0 or (line.count("\t") != width and line.strip()):
                return _is_quoted(path)
            if '"' in line and not plain:
                fields = line.rstrip("\r\n").split("\t")
                plain = any(field.startswith('"') and not _QUOTED.fullmatch(field) for field in fields)
    return not plain


def _is_quoted(path: Path) -> bool:
    """Whether every field that begins with a quotation mark ends with one, before a tab or the end of the line."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for _ in csv.reader(file, delimiter="\t", strict=True):
                pass
    except csv.Error:
        return False
    finally:
        csv.field_size_limit(before)
    return True


def _check_utf8(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with path.open("rb") as file:
        while True:
            chunk = file.read(1 << 20)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:  # error.object ends at the current file position
                offset = file.tell() - len(error.object) + error.start
                line += error.object[: error.start].count(b"\n")
                where = f"{path}: byte 0x{error.object[error.start]:02x} at offset {offset} (line {line})"
                raise fail("load_texts", "path", "a UTF-8 file", where) from error
            line += chunk.count(b"\n")
            if not chunk:
                return
