"""A `CMLMModel` on disk: a plain Hugging Face checkpoint, with the state of the contrast in separate files."""

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
    """Loading and saving of a `CMLMModel`."""

    lm: Any
    cmlm: CMLMConfig
    loss: CMLMLoss

    # transformers.Trainer reads this when it loads a checkpoint; checkpoints leave nothing out.
    _keys_to_ignore_on_save = None

    _pooling: Mapping[str, bytes | None] = {}  # sentence-transformers files of the starting checkpoint

    @classmethod
    def from_pretrained(cls, path: str | Path, config: CMLMConfig | None = None, **options: Any) -> Self:
        """Load a masked LM, or an encoder without an LM head, which then gets a new one.

        The new head is tied to the embeddings if the configuration ties them.

        Args:
            path: folder or hub id. If `save_pretrained` wrote it, the projection and learned temperatures are loaded as well.
            config: the objective; default: the one that `save_pretrained` wrote, else the preset "balanced".
            options: as for `AutoModelForMaskedLM.from_pretrained`; dtype defaults to float32, whatever the file's dtype, since
                optimizer steps are lost in 16 bits.

        Raises:
            ValueError: the checkpoint lacks encoder weights, or weights that its own objective needs; see also `CMLMModel`.
        """
        from transformers import AutoModelForMaskedLM
        from transformers.utils import logging as hf_logging

        if "torch_dtype" not in options:
            options.setdefault("dtype", torch.float32)
        resized = options.get("ignore_mismatched_sizes", False)
        options["ignore_mismatched_sizes"] = True  # mismatches are reported below
        verbosity = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()  # its table of missing weights takes 20 lines, the warning below one
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
        if model.cmlm.token_temperature != saved.token_temperature:  # the config asks for another one than was learned
            model.loss.token.temperature.reset()
        if model.cmlm.sequence_temperature != saved.sequence_temperature:
            model.loss.sequence.temperature.reset()
        model._pooling = read_pooling(path, **options)
        return model

    def save_pretrained(self, path: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write a plain Hugging Face checkpoint, safetensors, that loads without this package.

        The parts that only the contrast uses (objective, projection, learned temperatures) go into separate files next to it;
        so do the pooling files of sentence-transformers, if `from_pretrained` found any.

        Args:
            path: folder, made if missing.
            state_dict: this module's state, if it was gathered from several ranks.
        """
        from safetensors.torch import save_file

        state = self.state_dict() if state_dict is None else dict(state_dict)
        lm = {name.removeprefix("lm."): value for name, value in state.items() if name.startswith("lm.")}
        # RoBERTa's positions begin after the pad id in its configuration, which the Trainer overwrites with the tokenizer's.
        if (pad := self.pad_of_positions()) is not None:
            self.lm.config.pad_token_id = pad
        # Use the model's weight names, not those of the original file (LayerNorm.gamma in BERT's of 2018): loading a
        # checkpoint expects the model's.
        self.lm.save_pretrained(path, state_dict=lm, save_original_format=False)
        for name in (OBJECTIVE, _CONTRAST):  # remove an earlier model's files
            (Path(path) / name).unlink(missing_ok=True)
        if self.cmlm.token_weight + self.cmlm.sequence_weight > 0:  # with MLM alone the result is a plain starting checkpoint
            self.cmlm.save_pretrained(path)
        rest = {name: value.contiguous() for name, value in state.items() if not name.startswith("lm.")}
        if rest:
            save_file(rest, Path(path) / _CONTRAST)
        write_pooling(self._pooling, Path(path))

    def copy_contrast(self, source: Path, target: Path) -> None:
        """Copy what `save_pretrained` wrote next to the plain checkpoint to another folder."""
        for name in (OBJECTIVE, _CONTRAST):
            (target / name).unlink(missing_ok=True)
            if (source / name).exists():
                shutil.copy(source / name, target / name)
        write_pooling(self._pooling, target)

    def load_contrast(self, path: str | Path) -> list[str]:
        """Load projection and learned temperatures from a folder that `save_pretrained` wrote; returns the missing ones.

        Weights that the objective does not use are ignored, with a warning.

        Raises:
            ValueError: the projection in the file has another width, or the file is damaged.
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
        """The pad id after which RoBERTa's positions begin; None for encoders whose positions begin at 0."""
        pad = getattr(self.lm.base_model.embeddings, "padding_idx", None)
        return None if pad is None else int(pad)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load this module's own state, or that of a plain Hugging Face checkpoint, which covers the masked LM alone."""
        if not any(name.startswith("lm.") for name in state_dict):
            own = {name: value for name, value in self.state_dict().items() if not name.startswith("lm.")}
            state_dict = {**own, **{f"lm.{name}": value for name, value in state_dict.items()}}
        # A file stores tied weights once, under one of their names.
        names = dict(self.named_parameters(remove_duplicate=False))
        held = {id(names[name]): value for name, value in state_dict.items() if name in names}
        tied = {name: held[id(p)] for name, p in names.items() if id(p) in held}
        return super().load_state_dict({**tied, **state_dict}, strict=strict, assign=assign)
