"""Tile sizes, by chip, width of the numbers and shape class: data in configs.json.

A chip is `sm_80`, `sm_90`, `sm_100` (NVIDIA; a newer chip takes the nearest older entry), `gfx942` (AMD) or
`interpreter`.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

_PATH = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class Tile:
    """One kernel's tile.

    Attributes:
        rows, cols: of the tile of scores; of the products, `cols` is the strip of D.
        depth: step of the loop over the contraction.
        warps, stages: as Triton means them.
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
    """What the contrastive kernels need to know.

    Attributes:
        scores: tile of the scores.
        products: `rows` is unused: a product's tile has the rows of a tile of scores.
        panel: (rows, keys) of scores that are in memory at once, as weights of the gradients.
        statistics_panel: (rows, keys) whose partial statistics are in memory at once.
        precision: of the dots, as `tl.dot` means it.
    """

    scores: Tile
    products: Tile
    panel: tuple[int, int]
    statistics_panel: tuple[int, int]
    precision: str


def shape_class(width: int) -> str:
    """"narrow" up to D = 128, "wide" above."""
    return "narrow" if width <= 128 else "wide"


@cache
def table() -> dict[str, dict[str, dict[str, Config]]]:
    """chip → bits of a number → shape class → Config."""
    return {
        chip: {bits: {shape: _config(entry) for shape, entry in shapes.items()} for bits, shapes in numbers.items()}
        for chip, numbers in json.loads(_PATH.read_text()).items()
    }


def _config(entry: dict) -> Config:
    return Config(Tile(**entry["scores"]), Tile(**entry["products"]), tuple(entry["panel"]),
                  tuple(entry["statistics_panel"]), entry["precision"])  # fmt: skip


@cache
def config(chip: str, dtype: torch.dtype, shape: str) -> Config:
    """The entry of a chip, or of the nearest older one of its maker."""
    return _entries(chip)[str(dtype.itemsize * 8)][shape]


def _entries(chip: str) -> dict[str, dict[str, Config]]:
    entries = table()
    if chip not in entries:
        maker = "sm_" if chip.startswith("sm_") else "gfx"
        known = [name for name in entries if name.startswith(maker)]
        chip = max([name for name in known if _number(name) <= _number(chip)] or known, key=_number)
    return entries[chip]


def install(chip: str, dtype: torch.dtype, shape: str, entry: Config) -> None:
    """Use `entry` from now on; a chip without entries of its own gets a copy of those it has used."""
    entries = table().setdefault(chip, {bits: dict(shapes) for bits, shapes in _entries(chip).items()})
    entries[str(dtype.itemsize * 8)][shape] = entry
    config.cache_clear()


def dump(entries: dict[str, dict[str, dict[str, Config]]]) -> str:
    """The text of configs.json, with one line a tile."""
    text = json.dumps({chip: {bits: {shape: asdict(entry) for shape, entry in shapes.items()}
                              for bits, shapes in numbers.items()} for chip, numbers in entries.items()}, indent=1)  # fmt: skip
    return re.sub(r"([\[{])\n\s+([^\[\]{}]+?)\n\s+([\]}])", lambda m: m[1] + re.sub(r"\s+", " ", m[2]) + m[3], text) + "\n"


def _number(chip: str) -> int:
    return int("".join(c for c in chip if c.isdigit()))
