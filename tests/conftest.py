"""Shared fixtures: real sentences, a tiny tokenizer trained on them, and a cache folder of the test run's own."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

# With a worker on every core, waiting threads must sleep. NumPy, which computes products for Triton's interpreter, has threads
# that do not, so it gets only one. Both settings are read when torch and NumPy are imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU, Triton kernels run in Triton's interpreter; read when triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

os.environ["CMLM_FAST_TRITON_CONFIGS"] = ""  # test the shipped entries, not those tuned here

# Read when `datasets` and `huggingface_hub` are first imported, hence before any test module is.
_cache = tempfile.TemporaryDirectory(prefix="cmlm_fast_tests_")
os.environ["HF_DATASETS_CACHE"] = _cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and forked workers do not mix

_WHO = ("The old gardener", "My neighbour's daughter", "A tired postman", "The village doctor", "Our youngest cousin",
        "The bookseller", "Every visitor", "The night watchman", "A clever fox", "The orchestra")  # fmt: skip
_DOES = ("carefully repaired", "never understood", "quietly admired", "often photographed", "finally discovered",
         "could not forget", "misplaced")  # fmt: skip
_WHAT = ("the broken fountain", "an unfinished letter", "the mountain railway", "a painting of the harbour",
         "the forgotten recipe", "her grandfather's telescope")  # fmt: skip
_END = ("before the rain came", "in the middle of winter", "without telling anyone", "on the way home")


def make_sentences() -> list[str]:
    """420 different English sentences, the same on every call."""
    return [f"{who} {does} {what}, {_END[i % 4]}." for i, (who, does, what) in enumerate(product(_WHO, _DOES, _WHAT))]


def make_tokenizer() -> Any:
    """A BERT-like WordPiece tokenizer of 200 tokens, so few that long words split.

    It was trained on `make_sentences` once, since such training differs from run to run.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
               "mask_token": "[MASK]"}  # fmt: skip
    vocabulary = Path(__file__).with_name("vocabulary.txt").read_text(encoding="utf-8").split()
    words = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, model_input_names=["input_ids", "token_type_ids",
        "attention_mask"], **special)  # fmt: skip


_modules = 0


@pytest.fixture(autouse=True)
def _imports_are_no_garbage() -> None:
    """Exempt imported objects from garbage collection.

    `Trainer.train` ends with a collection, which would spend half a second on what torch and transformers made when imported.
    """
    global _modules
    if len(sys.modules) > _modules:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # otherwise leak checks at the exit of Python would report it all


@pytest.fixture(scope="session")
def script_folder(tmp_path_factory: Any) -> Any:
    """name -> the folder that `python tests/<name>.py FOLDER` filled. Each script serves one file, which one worker runs."""

    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        result = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
        assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
        return folder

    return run


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return make_sentences()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """PreTrainedTokenizerFast, 200 tokens: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4."""
    return make_tokenizer()


def make_lm(kind: str = "bert", vocabulary: int = 220, layers: int = 2, **options: Any) -> Any:
    """A masked LM of a few thousand parameters, of any supported kind, without dropout."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    heads = {"n_heads": 4, "dim": 32, "hidden_dim": 64, "n_layers": layers, "dropout": 0.0, "attention_dropout": 0.0}
    usual = {"num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
             "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    shape = heads if kind == "distilbert" else usual
    shape |= {"embedding_size": 16} if kind in ("electra", "albert") else {}
    special = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    size = {"vocab_size": vocabulary, "max_position_embeddings": 140}
    config = AutoConfig.for_model(kind, **{**size, **shape, **special, **options})
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(config)


@pytest.fixture
def tiny_lm() -> Any:
    """make_lm, for tests that want another kind."""
    return make_lm


@pytest.fixture(scope="session")
def tiny_rows(sentences: list[str], tiny_tokenizer: Any) -> Any:
    """The sentences as rows of `tokenize_texts`."""
    from datasets import Dataset

    from cmlm_fast.data import tokenize_texts

    return tokenize_texts(Dataset.from_dict({"text": sentences}), tiny_tokenizer, max_length=32)


@pytest.fixture
def tiny_checkpoint(tmp_path: Any, tiny_tokenizer: Any) -> str:
    """A folder with a tiny BERT masked LM and its tokenizer."""
    folder = tmp_path / "tiny-bert"
    make_lm().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sentence_file(tmp_path: Any, sentences: list[str]) -> str:
    """The sentences, one per line."""
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return str(path)
