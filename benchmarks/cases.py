"""Every benchmark of an op: what is timed, beside what, and the work that nothing can avoid.

A case builds its inputs when asked, checks the op against float64 first (a wrong op has no speed), and returns providers
that do the same job. `bench_ops` times them interleaved; `test_ops` hands them to pytest-benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

import cmlm_fast
from cmlm_fast._library import op
from cmlm_fast.testing import assert_no_worse_than_eager, eager_info_nce, eager_token_contrastive

Call = Callable[[], Any]


@dataclass(frozen=True)
class Bench:
    """What one case times.

    Attributes:
        providers: name → one call; "ours" is this package.
        ceiling: the part of the work that stays: the matrix products alone, or a copy of as many bytes.
        matrix_bytes: size of the score matrix that must not reach memory.
        output_bytes: gradients, and one float32 copy of the key's: what the op may hold besides.
    """

    providers: dict[str, Call]
    ceiling: Call | None = None
    matrix_bytes: int = 0
    output_bytes: int = 0


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    op: str
    label: str
    build: Callable[[], Bench] = field(repr=False)

    @property
    def id(self) -> str:
        """The name by which `--case` and `-k` find it."""
        return f"{self.op} {self.label}".replace(" ", "-")


def forward_backward(function: Callable[..., Any], *inputs: Any, **options: Any) -> Call:
    """One training use of a loss: forward, backward, gradients dropped."""
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        function(*inputs, **options).backward()

    return call


def leaf_rows(count: int, d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A Gaussian matrix that takes gradients."""
    return torch.randn(count, d).to(dtype).requires_grad_()


@cache
def bert_collator() -> Any:
    """transformers' masking collator with a vocabulary of BERT's size."""
    from transformers import BertTokenizerFast, DataCollatorForLanguageModeling

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(30_517))]
    return DataCollatorForLanguageModeling(BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}))


def complementary_mask(shape: tuple[int, int], sampling: str) -> Bench:
    """Both views, beside transformers' masking called once a view; 25 bytes a token is the least to move."""
    ids = torch.randint(5, 30_522, shape)
    mask = partial(cmlm_fast.complementary_mask, ids, mask_token_id=4, vocab_size=30_522, special_ids=(0, 2, 3, 4),
                   sampling=sampling)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(mask(), mask(backend="reference"), strict=True))
    special = torch.zeros(shape, dtype=torch.bool)
    source = torch.ones(25 * ids.numel() // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    providers: dict[str, Call] = {
        "ours": mask,
        "torch_mask_tokens": lambda: [bert_collator().torch_mask_tokens(ids.clone()) for _ in range(2)],
        "torch_mask_tokens told the special tokens": lambda: [
            bert_collator().torch_mask_tokens(ids.clone(), special) for _ in range(2)
        ],
    }
    return Bench(providers, ceiling=lambda: target.copy_(source))


def token_contrastive(d: int, dtype: torch.dtype, exclude: bool, n: int = 1024, m: int = 8192) -> Bench:
    """Scope `batch`: every anchor against every key."""
    query, key = leaf_rows(n, d, dtype), leaf_rows(m, d, dtype)
    words, target = torch.randint(0, 5000, (m,)), torch.randperm(m)[:n]
    tokens = (words[target], words) if exclude else (None, None)
    args = (query, key, target, torch.tensor(0.05), None, None, *tokens, True, "mean", True, True)
    assert_no_worse_than_eager("token_contrastive", "", args, nudges=0)
    q, k, p = query.detach(), key.detach(), torch.randn(n, m).to(dtype)
    providers: dict[str, Call] = {
        "ours": forward_backward(lambda *a: op("token_contrastive")(*a)[0], *args),
        "eager": forward_backward(eager_token_contrastive, *args),
        "torch.compile": forward_backward(torch.compile(eager_token_contrastive), *args),
    }
    outputs = (query.numel() + key.numel()) * query.element_size() + key.numel() * 4
    return Bench(providers, lambda: (q @ k.T, p @ k, p.T @ q), n * m * query.element_size(), outputs)


def token_contrastive_by_sequence(dtype: torch.dtype, m: int = 8192, length: int = 128, d: int = 384) -> Bench:
    """Scope `sequence`: the keys of a row are those of its sequence; the ceiling is their products alone."""
    target = torch.arange(0, m, 4)
    query, key = leaf_rows(target.numel(), d, dtype), leaf_rows(m, d, dtype)
    start = (target // length * length).int()
    args = (query, key, target, torch.tensor(0.05), start, start + length, None, None, True, "mean", True, True)
    assert_no_worse_than_eager("token_contrastive", "", args, nudges=0)
    q, k = (x.detach().view(m // length, -1, d) for x in (query, key))
    p = torch.randn(*q.shape[:2], length).to(dtype)
    providers: dict[str, Call] = {
        "ours": forward_backward(lambda *a: op("token_contrastive")(*a)[0], *args),
        "eager": forward_backward(eager_token_contrastive, *args),
    }
    return Bench(providers, lambda: (q @ k.mT, p @ k, p.mT @ q))


def info_nce(batch: int, scheme: str, symmetric: bool, d: int = 384) -> Bench:
    """Beside eager PyTorch and, where they have this scheme, the two libraries people use."""
    z1, z2 = leaf_rows(batch, d), leaf_rows(batch, d)
    args = (z1, z2, torch.tensor(0.05), None, scheme, symmetric, True, "mean", True, True)
    assert_no_worse_than_eager("info_nce", "", args, nudges=0)
    providers: dict[str, Call] = {
        "ours": forward_backward(cmlm_fast.info_nce, z1, z2, scheme=scheme, symmetric=symmetric),
        "eager": forward_backward(eager_info_nce, *args),
    }
    if scheme == "nt_xent" and batch <= 256:  # it holds 2B × 4B² numbers: 34 GB at B = 1024
        from pytorch_metric_learning.losses import NTXentLoss

        nt_xent, labels = NTXentLoss(temperature=0.05), torch.arange(batch).repeat(2)
        providers["pytorch-metric-learning"] = forward_backward(lambda a, b: nt_xent(torch.cat([a, b]), labels), z1, z2)
    elif not symmetric:
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        ranking = MultipleNegativesRankingLoss(model=torch.nn.Identity(), scale=20.0)
        providers["sentence-transformers"] = forward_backward(
            lambda a, b: ranking.compute_loss_from_embeddings([a, b], None), z1, z2
        )
    matrix = batch * batch * 4 * (4 if scheme == "nt_xent" else 1)
    return Bench(providers, matrix_bytes=matrix, output_bytes=2 * z1.numel() * 4)


def mlm_cross_entropy(n: int, v: int = 30_522, d: int = 384) -> Bench:
    """The LM head's loss at gathered rows, beside PyTorch's chunked linear cross entropy; the ceiling: its products."""
    hidden, weight, bias = leaf_rows(n, d), leaf_rows(v, d), torch.zeros(v, requires_grad=True)
    target = torch.randint(0, v, (n,))
    inputs = (hidden, weight, bias, target)
    h, w, p = hidden.detach(), weight.detach(), torch.randn(n, v)
    providers: dict[str, Call] = {
        "ours": forward_backward(cmlm_fast.mlm_cross_entropy, *inputs),
        "F.cross_entropy": forward_backward(lambda a, b, c, t: F.cross_entropy(F.linear(a, b, c), t), *inputs),
    }
    if hasattr(F, "linear_cross_entropy"):
        providers["F.linear_cross_entropy"] = forward_backward(
            lambda a, b, c, t: F.linear_cross_entropy(a, b, t, linear_bias=c), *inputs
        )
    return Bench(providers, lambda: (h @ w.T, p @ w, p.T @ h))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES = [
    *(
        Case("complementary_mask", f"{rows}x{length} {sampling}", partial(complementary_mask, (rows, length), sampling))
        for rows, length in ((64, 128), (4096, 512))
        for sampling in ("exact", "bernoulli")
    ),
    *(
        Case("token_contrastive", f"N=1024 M=8192 D={d} {_name(dtype)}" + " same-token excluded" * exclude,
             partial(token_contrastive, d, dtype, exclude))
        for d in (128, 384, 768)
        for dtype in (torch.float32, torch.bfloat16)
        for exclude in (False, True)
    ),
    *(
        Case("token_contrastive", f"sequence scope N=2048 M=8192 L=128 D=384 {_name(dtype)}",
             partial(token_contrastive_by_sequence, dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        Case("info_nce", f"B={batch} D=384 {scheme}" + " one-sided" * (not symmetric),
             partial(info_nce, batch, scheme, symmetric))
        for batch in (64, 256, 1024, 4096)
        for scheme, symmetric in (("cross", True), ("cross", False), ("nt_xent", True))
    ),
    *(Case("mlm_cross_entropy", f"N={n} V=30522 D=384 float32", partial(mlm_cross_entropy, n)) for n in (200, 2000)),
]  # fmt: skip
