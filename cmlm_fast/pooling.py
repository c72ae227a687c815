"""The files by which sentence-transformers knows a checkpoint's pooling, carried along where the start had them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

_FILES = ("config_sentence_transformers.json", "sentence_bert_config.json")


def copy_pooling(model: str, folder: Path) -> None:
    """Copy modules.json and what it names from checkpoint `model` (a folder or hub id) to `folder`; none, none copied.

    That is settings and weights of each module behind the encoder (pooling, Dense, ...).

    Without them `SentenceTransformer(folder)` takes the mean over tokens.
    """
    modules = _file(model, "modules.json")
    if modules is None:
        return
    listed = json.loads(modules.read_text(encoding="utf-8"))
    files = ("config.json", "model.safetensors", "pytorch_model.bin")
    inner = [f"{module['path']}/{name}" for module in listed if module["path"] for name in files]
    for name in ("modules.json", *_FILES, *inner):
        source = _file(model, name)
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)  # a module without settings is a folder without files
        if source is not None:
            shutil.copyfile(source, target)


def _file(model: str, name: str) -> Path | None:
    if Path(model).is_dir():
        return Path(model) / name if (Path(model) / name).is_file() else None
    from transformers.utils import cached_file

    found = cached_file(model, name, _raise_exceptions_for_missing_entries=False,
                        _raise_exceptions_for_connection_errors=False)  # fmt: skip
    return None if found is None else Path(found)
