"""Tile sizes by chip, bits of the dtype and shape class: data in configs.json, and what was tuned on this machine.

A chip is `sm_80`, `sm_90`, `sm_100`, `sm_120` (NVIDIA; others take the nearest older entry), `gfx942` (AMD) or `interpreter`.
Entries of the file that `cmlm_fast.kernels.tune` writes take precedence over the package's. That file is
`CMLM_FAST_TRITON_CONFIGS`, by default ~/.cache/cmlm_fast/triton.json (`XDG_CACHE_HOME` is respected); an empty variable means
none.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

_PATH = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class Tile:
    """One kernel's tile.

    Attributes:
        rows, cols: size of the tile of scores; for the products, `cols` is the strip of D.
        depth: step of the loop over the contracted dimension.
        warps, stages: as in Triton.
        group: row tiles that share their keys in L2.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8


@dataclass(frozen=True)
class Config:
    """Settings of the contrastive kernels.

    Attributes:
        scores: tile of the scores.
        products: `rows` is unused: a product's tile has the rows of a tile of scores.
        panel: (rows, keys) of the scores in memory at once, as weights of the gradients.
        statistics_panel: (rows, keys) whose partial statistics are in memory at once.
        precision: input precision of `tl.dot`.
    """

    scores: Tile
    products: Tile
    panel: tuple[int, int]
    statistics_panel: tuple[int, int]
    precision: str


#: chip → bits of the dtype → shape class → Config.
Table = dict[str, dict[str, dict[str, Config]]]


def shape_class(width: int) -> str:
    """"narrow" up to D = 128, "wide" above."""
    return "narrow" if width <= 128 else "wide"


def user_file() -> Path | None:
    """Where tuned entries are kept; None if none are wanted."""
    named = os.environ.get("CMLM_FAST_TRITON_CONFIGS")
    if named is not None:
        return Path(named) if named else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmlm_fast" / "triton.json"


def load(path: Path) -> Table:
    """The entries of a file."""
    try:
        return {
            chip: {bits: {shape: _config(entry) for shape, entry in shapes.items()} for bits, shapes in numbers.items()}
            for chip, numbers in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cmlm_fast.kernels: expected {path} to hold entries as configs.json does, got {error!r}") from error


def _config(entry: dict[str, Any]) -> Config:
    found = Config(Tile(**entry["scores"]), Tile(**entry["products"]), tuple(entry["panel"]), tuple(entry["statistics_panel"]),
                   entry["precision"])  # fmt: skip
    tiles = [(t.rows, t.cols, t.depth, t.warps, t.group) for t in (found.scores, found.products)]
    for size in (*tiles[0], *tiles[1], *found.panel, *found.statistics_panel):
        if not isinstance(size, int) or size < 1 or size & (size - 1):
            raise ValueError(f"a size that is no power of two: {size}")
    if min(found.scores.rows, found.scores.cols) < found.products.depth:
        raise ValueError(f"products of depth {found.products.depth} in smaller tiles of scores")
    return found


@cache
def table() -> Table:
    """The package's entries."""
    return load(_PATH)


@cache
def tuned() -> Table:
    """The entries of this machine's own file."""
    path = user_file()
    return load(path) if path is not None and path.exists() else {}


@cache
def config(chip: str, dtype: torch.dtype, shape: str) -> Config:
    """The tuned entry of a chip, else the package's, else that of the nearest older chip of the same maker."""
    bits = str(dtype.itemsize * 8)
    own = tuned().get(chip, {}).get(bits, {}).get(shape)
    if own is not None:
        return own
    entries = table()
    if chip not in entries:
        maker = "sm_" if chip.startswith("sm_") else "gfx"
        known = [name for name in entries if name.startswith(maker)]
        older = [name for name in known if _number(name) <= _number(chip)]
        chip = max(older, key=_number) if older else min(known, key=_number)
    return entries[chip][bits][shape]


def use(chip: str, dtype: torch.dtype, shape: str, entry: Config) -> None:
    """Use `entry` from now on, in this process."""
    tuned().setdefault(chip, {}).setdefault(str(dtype.itemsize * 8), {})[shape] = entry
    config.cache_clear()


def dump(entries: Table) -> str:
    """The text of a file of entries, with one line per tile."""
    plain = {chip: {bits: {shape: asdict(entry) for shape, entry in shapes.items()} for bits, shapes in numbers.items()}
             for chip, numbers in entries.items()}  # fmt: skip
    text = json.dumps(plain, indent=1)
    return re.sub(r"([\[{])\n\s+([^\[\]{}]+?)\n\s+([\]}])", lambda m: m[1] + re.sub(r"\s+", " ", m[2]) + m[3], text) + "\n"


def _number(chip: str) -> int:
    return int("".join(c for c in chip if c.isdigit()))
