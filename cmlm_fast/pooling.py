"""The files that tell sentence-transformers a checkpoint's pooling, carried over if the starting checkpoint has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

#: Settings of the encoder, by their current name and those of earlier versions.
_FILES = ("config_sentence_transformers.json", *(f"sentence_{kind}_config.json" for kind in (
    "bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")))  # fmt: skip
_OF_A_MODULE = ("config.json", "cnn_config.json", "lstm_config.json", "model.safetensors", "pytorch_model.bin")
_WHERE = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")


def find_file(model: str | Path, name: str, **options: Any) -> Path | None:
    """Path of file `name` of checkpoint `model` (a folder or hub id); None if it has none.

    `options` are those of `from_pretrained`; the ones that say where to find a file are used.
    """
    from transformers.utils import cached_file

    where = {name: value for name, value in options.items() if name in _WHERE}
    found = cached_file(model, name, _raise_exceptions_for_missing_entries=False,
                        _raise_exceptions_for_connection_errors=False, **where)  # fmt: skip
    return None if found is None else Path(found)


def read_pooling(model: str | Path, **options: Any) -> dict[str, bytes | None]:
    """Read modules.json of checkpoint `model` (a folder or hub id) and the files it names.

    Those are settings and weights of each module after the encoder (pooling, Dense, ...). A module without files is a folder
    with None. Empty if there is no modules.json: `SentenceTransformer` then takes the mean over tokens.

    `options` are those of `from_pretrained`; the ones that say where to find a file are used.

    Raises:
        ValueError: modules.json is not a list of modules with their paths, or names a path outside the checkpoint, where
            `write_pooling` would write.
    """
    modules = _read(model, "modules.json", options)
    if modules is None:
        return {}
    found: dict[str, bytes | None] = {"modules.json": modules, **{name: _read(model, name, options) for name in _FILES}}
    for module in filter(None, _paths(modules, model)):
        if PurePosixPath(module).is_absolute() or ".." in PurePosixPath(module).parts:
            raise ValueError(f"expected modules.json of {model} to name folders below it, got {module}")
        found[f"{module}/"] = None
        for name in _OF_A_MODULE:
            found[f"{module}/{name}"] = _read(model, f"{module}/{name}", options)
    return {name: contents for name, contents in found.items() if contents is not None or name.endswith("/")}


def write_pooling(files: Mapping[str, bytes | None], folder: Path) -> None:
    """Write what `read_pooling` found to a checkpoint."""
    for name, contents in files.items():
        if contents is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).write_bytes(contents)


def _paths(modules: bytes, model: str | Path) -> list[str]:
    try:
        listed = json.loads(modules)
    except ValueError:
        listed = None
    if not isinstance(listed, list) or not all(isinstance(each, dict) and isinstance(each.get("path"), str) for each in listed):
        rule = "a list of modules, each with its path"
        raise ValueError(f"expected modules.json of {model} to be {rule}, got {modules[:80].decode(errors='replace')}")
    return [each["path"] for each in listed]


def _read(model: str | Path, name: str, options: Mapping[str, Any]) -> bytes | None:
    found = find_file(model, name, **options)
    return None if found is None else found.read_bytes()
