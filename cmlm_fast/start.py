"""The checkpoint that a run starts from: tokenizer and model, loaded and checked against each other.

Every fault is a one-line ValueError.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import CMLMConfig
from .options import expect, first_line

if TYPE_CHECKING:
    from .modeling import CMLMModel

_MIN_POSITIONS = 8  # positions that must remain for the tokens of a sequence


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a checkpoint and check that it can be post-trained; every fault is a one-line ValueError."""
    from transformers import AutoTokenizer

    path = Path(model)
    if path.exists():
        expect((path / "config.json").is_file(), "model", "a folder with a config.json, or a hub id", model)
    rule = "a folder, or a hub id that can be reached, with a tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # third-party code, which may raise anything
        raise ValueError(f"expected model to be {rule}, got {model}: {first_line(error)}") from error
    # If a folder has no tokenizer, transformers makes one of special tokens alone.
    expect(len(tokenizer) > len(tokenizer.all_special_ids), "model", rule, model)
    expect(tokenizer.mask_token_id is not None, "model", "one whose tokenizer has a mask token", model)
    return tokenizer


def load_model(model: str, config: CMLMConfig, trust_remote_code: bool = False) -> CMLMModel:
    """`CMLMModel.from_pretrained`; every fault is a one-line ValueError."""
    from .modeling import CMLMModel

    try:
        return CMLMModel.from_pretrained(model, config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above; a damaged file may raise anything
        rule = "a masked LM or an encoder that can be loaded"
        raise ValueError(f"expected model to be {rule}, got {model}: {first_line(error)}") from error


def check_vocabulary(model: CMLMModel, tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer has ids without a row in the model's embedding."""
    from .data import mask_settings

    rows, ids = len(model.lm.get_input_embeddings().weight), mask_settings(tokenizer)["vocab_size"]
    expect(ids <= rows, "model", f"one whose tokenizer has at most {rows} ids, the rows of its embedding", ids)


def sequence_length(model: CMLMModel, tokenizer: Any, asked: int | None, jitter: int) -> int:
    """Maximum tokens per sequence; None asks for 128, or the model's maximum if that is less.

    Raises ValueError if the model has too few positions for them, shifted by up to `jitter`.
    """
    most = _most_tokens(model, jitter)
    rule = f"<= {most + jitter - _MIN_POSITIONS}, which leaves {_MIN_POSITIONS} positions of those the model has"
    expect(jitter == 0 or most >= _MIN_POSITIONS, "position_jitter", rule, jitter)
    if asked is None:
        return min(128, int(tokenizer.model_max_length), most)
    expect(asked <= most, "max_length", f"<= {most}, the positions the model has", asked)
    return asked


def _most_tokens(model: CMLMModel, jitter: int) -> int:
    most = getattr(model.config, "max_position_embeddings", None)
    if most is None:
        return 2**31
    pad = model.pad_of_positions()
    return int(most) - jitter - (0 if pad is None else pad + 1)
