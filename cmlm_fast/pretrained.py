"""A `CMLMModel` on disk: a plain Hugging Face checkpoint, and beside it what belongs to the contrast alone."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import FILE as OBJECTIVE
from .config import CMLMConfig
from .losses import CMLMLoss
from .pooling import find_file, read_pooling, write_pooling

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

_CONTRAST = "contrast.safetensors"


class PretrainedModel(nn.Module):
    """How a `CMLMModel` is loaded and saved."""

    lm: Any
    cmlm: CMLMConfig
    loss: CMLMLoss

    # Read by transformers.Trainer when a checkpoint is loaded; nothing is left out of one.
    _keys_to_ignore_on_save = None

    _pooling: Mapping[str, bytes | None] = {}  # files of sentence-transformers that the start had

    @classmethod
    def from_pretrained(cls, path: str | Path, config: CMLMConfig | None = None, **options: Any) -> Self:
        """Load a masked LM, or an encoder without an LM head, which then gets one, tied to its embeddings
        where its configuration ties them.

        Args:
            path: folder or hub id. Of what `save_pretrained` wrote also the projection and learned temperatures.
            config: the objective; default: that of what `save_pretrained` wrote, else the preset "balanced".
            options: as for `AutoModelForMaskedLM.from_pretrained`; dtype is float32 by default, whatever the file's, since
                optimizer steps are lost in 16 bits.

        Raises:
            ValueError: the checkpoint lacks weights of the encoder, or what its own objective asks for; see also `CMLMModel`.
        """
        from transformers import AutoModelForMaskedLM
        from transformers.utils import logging as hf_logging

        if "torch_dtype" not in options:
            options.setdefault("dtype", torch.float32)
        resized = options.get("ignore_mismatched_sizes", False)
        options["ignore_mismatched_sizes"] = True  # the error is below
        verbosity = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()  # its table of missing weights says in 20 lines what follows in one
        try:
            lm, report = AutoModelForMaskedLM.from_pretrained(path, output_loading_info=True, **options)
        finally:
            hf_logging.set_verbosity(verbosity)
        for name, have, want in () if resized else sorted(report["mismatched_keys"]):
            rule = f"a checkpoint of the sizes in its configuration, {name} of {list(want)}"
            raise ValueError(f"CMLMModel: expected path to be {rule}, got {path} with {list(have)}")
        fresh = sorted(report["missing_keys"])
        if lost := [name for name in fresh if name.startswith(f"{lm.base_model_prefix}.")]:
            found = f"{path} without {len(lost)} of them ({', '.join(lost[:3])})"
            if other := sorted(report["unexpected_keys"]):
                found += f", but with {', '.join(other[:3])}"
            raise ValueError(f"CMLMModel: expected path to be a checkpoint with all weights of the encoder, got {found}")
        if fresh:
            tied = getattr(lm.get_output_embeddings(), "weight", None) is lm.get_input_embeddings().weight
            decoder = "its decoder tied to the embeddings" if tied else "its decoder random"
            logger.warning("%s has no LM head: made one, %s (new: %s)", path, decoder, ", ".join(fresh))
        ours = [file for name in (OBJECTIVE, _CONTRAST) if (file := find_file(path, name, **options))]
        folder = ours[0].parent if ours else Path(path)
        saved = CMLMConfig.of_checkpoint(folder)
        model = cls(lm, saved if config is None else config)
        missing = model.load_contrast(folder)
        if missing and config is None:
            rule = f"a folder whose {_CONTRAST} holds what its {OBJECTIVE} asks for"
            raise ValueError(f"CMLMModel: expected path to be {rule}, got {path} without {', '.join(missing)}")
        if model.cmlm.token_temperature != saved.token_temperature:  # another than what was learned is asked for
            model.loss.token.temperature.restart()
        if model.cmlm.sequence_temperature != saved.sequence_temperature:
            model.loss.sequence.temperature.restart()
        model._pooling = read_pooling(path, **options)
        return model

    def save_pretrained(self, path: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write a plain Hugging Face checkpoint, safetensors, that loads without this package.

        What belongs to the contrast alone, the objective, projection and learned temperatures, goes into files of its own
        beside it; so do the pooling files of sentence-transformers, where `from_pretrained` found some.

        Args:
            path: folder, made where missing.
            state_dict: this module's state, where it was gathered from several ranks.
        """
        from safetensors.torch import save_file

        state = self.state_dict() if state_dict is None else dict(state_dict)
        lm = {name.removeprefix("lm."): value for name, value in state.items() if name.startswith("lm.")}
        # RoBERTa's positions begin behind the pad id of its configuration, which the Trainer overwrites with the tokenizer's.
        if (pad := self.pad_of_positions()) is not None:
            self.lm.config.pad_token_id = pad
        # In the names that the model has, not in those of the file that it came from (LayerNorm.gamma in BERT's of 2018):
        # a checkpoint is read back by these.
        self.lm.save_pretrained(path, state_dict=lm, save_original_format=False)
        for name in (OBJECTIVE, _CONTRAST):  # of what stood there before
            (Path(path) / name).unlink(missing_ok=True)
        if self.cmlm.token_weight + self.cmlm.sequence_weight > 0:  # MLM alone leaves a start like any other
            self.cmlm.save_pretrained(path)
        rest = {name: value.contiguous() for name, value in state.items() if not name.startswith("lm.")}
        if rest:
            save_file(rest, Path(path) / _CONTRAST)
        write_pooling(self._pooling, Path(path))

    def copy_contrast(self, source: Path, target: Path) -> None:
        """Have in another folder what `save_pretrained` wrote beside the plain checkpoint."""
        for name in (OBJECTIVE, _CONTRAST):
            (target / name).unlink(missing_ok=True)
            if (source / name).exists():
                shutil.copy(source / name, target / name)
        write_pooling(self._pooling, target)

    def load_contrast(self, path: str | Path) -> list[str]:
        """Take projection and learned temperatures from a folder that `save_pretrained` wrote; returns what is not there.

        What is there and the objective has no place for is left out, with a warning.

        Raises:
            ValueError: the projection there has another width, or the file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = Path(path) / _CONTRAST
        try:
            held = load_file(file) if file.exists() else {}
        except SafetensorError as error:
            raise ValueError(f"CMLMModel: expected {file} to be a whole file of safetensors, got: {error}") from error
        try:
            report = super().load_state_dict(held, strict=False)
        except RuntimeError as error:
            rule = f"as wide as in {file}, or that file deleted"
            raise ValueError(f"CMLMModel: expected projection to be {rule}, got {self.cmlm.projection}") from error
        if report.unexpected_keys:
            logger.warning("%s: left out, since this objective has none: %s", file, ", ".join(report.unexpected_keys))
        return [name for name in report.missing_keys if not name.startswith("lm.")]

    def pad_of_positions(self) -> int | None:
        """The pad id behind which RoBERTa's positions begin; None for encoders whose positions begin at 0."""
        pad = getattr(self.lm.base_model.embeddings, "padding_idx", None)
        return None if pad is None else int(pad)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take this module's own state, or that of a plain Hugging Face checkpoint: of the masked LM alone."""
        if not any(name.startswith("lm.") for name in state_dict):
            own = {name: value for name, value in self.state_dict().items() if not name.startswith("lm.")}
            state_dict = {**own, **{f"lm.{name}": value for name, value in state_dict.items()}}
        # A file holds tied weights once, under one of their names.
        names = dict(self.named_parameters(remove_duplicate=False))
        held = {id(names[name]): value for name, value in state_dict.items() if name in names}
        tied = {name: held[id(p)] for name, p in names.items() if id(p) in held}
        return super().load_state_dict({**tied, **state_dict}, strict=strict, assign=assign)
