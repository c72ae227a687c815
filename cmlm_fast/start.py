"""The checkpoint that a run starts from: tokenizer and model, loaded and checked against one another.

Every fault is a ValueError of one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import CMLMConfig
from .options import expect, first_line

if TYPE_CHECKING:
    from .modeling import CMLMModel

_LEAST = 8  # tokens of a sequence that positions must be left for


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint that can be post-trained; every fault is a ValueError of one line."""
    from transformers import AutoTokenizer

    path = Path(model)
    if path.exists():
        expect((path / "config.json").is_file(), "model", "a folder with a config.json, or a hub id", model)
    rule = "a folder, or a hub id that can be reached, with a tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # of others' code, which names no kinds
        raise ValueError(f"expected model to be {rule}, got {model}: {first_line(error)}") from error
    # transformers makes up a tokenizer of special tokens alone where a folder has none.
    expect(len(tokenizer) > len(tokenizer.all_special_ids), "model", rule, model)
    expect(tokenizer.mask_token_id is not None, "model", "one whose tokenizer has a mask token", model)
    return tokenizer


def load_model(model: str, config: CMLMConfig, trust_remote_code: bool = False) -> CMLMModel:
    """`CMLMModel.from_pretrained`; every fault is a ValueError of one line."""
    from .modeling import CMLMModel

    try:
        return CMLMModel.from_pretrained(model, config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above; a damaged file may raise anything
        rule = "a masked LM or an encoder that can be loaded"
        raise ValueError(f"expected model to be {rule}, got {model}: {first_line(error)}") from error


def check_vocabulary(model: CMLMModel, tokenizer: Any) -> None:
    """Raise ValueError where the tokenizer has ids that the model's embedding has no row for."""
    from .data import mask_settings

    rows, ids = len(model.lm.get_input_embeddings().weight), mask_settings(tokenizer)["vocab_size"]
    expect(ids <= rows, "model", f"one whose tokenizer has at most {rows} ids, the rows of its embedding", ids)


def sequence_length(model: CMLMModel, tokenizer: Any, asked: int | None, jitter: int) -> int:
    """The most tokens of a sequence; None asks for 128, or what the model takes where that is less.

    Raises ValueError where the model has no positions for as many, shifted by as many as `jitter`.
    """
    most = _most_tokens(model, jitter)
    rule = f"<= {most + jitter - _LEAST}, which leaves {_LEAST} positions of those the model has"
    expect(jitter == 0 or most >= _LEAST, "position_jitter", rule, jitter)
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
