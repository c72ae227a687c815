"""What a run that is resumed must have in common with the one that was cut: all that its numbers depend on.

`settings.json` in the output folder says it; the first run writes it before it trains.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .output import STAGING

_NAME = "settings.json"
_CONTENTS = ("model", "train_file", "held-out texts")  # whose values are fingerprints


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a run that begins, whole or not at all."""
    new = folder / f"{STAGING}settings"
    new.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    os.replace(new, folder / _NAME)


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError where a setting is another than that of the run to go on from."""
    path = folder / _NAME
    if not path.exists():
        raise ValueError(f"expected output_dir to hold {_NAME} of the run to resume, got {folder} without it")
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in json.loads(json.dumps(settings)).items():
        if before.get(name) == value:
            continue
        if name in _CONTENTS:
            rule = f"what it was in the run to resume, fingerprint {before.get(name)}"
            raise ValueError(f"expected {name} to be {rule}, got another, {value}")
        longer = " (to train longer, start from its model)" if name in ("epochs", "max_steps") else ""
        raise ValueError(f"expected {name} to be {before.get(name)}, as in the run to resume{longer}, got {value}")
