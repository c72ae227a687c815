"""What the public ops refuse, each in one line that names the argument, the rule and the value."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from cmlm_fast import (
    InfoNCELoss,
    TokenContrastiveLoss,
    complementary_mask,
    info_nce,
    mlm_cross_entropy,
    token_contrastive,
    token_similarity,
    varlen_attention,
)
from cmlm_fast.layers import use_fast_layers

Q, K, TARGET = torch.eye(3), torch.eye(3) + 0.1, torch.arange(3)
HEADS, CU, IDS = torch.zeros(3, 1, 4), torch.tensor([0, 3], dtype=torch.int32), torch.arange(5, 11).view(2, 3)


def mask(ids=IDS, cu=None, *, special_ids=(0, 1), **options):
    return complementary_mask(ids, cu, mask_token_id=3, vocab_size=30, special_ids=special_ids, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_contrastive(Q, K, None), "token_contrastive: expected target to be a tensor, got NoneType"),
        (lambda: token_contrastive(Q, K, TARGET, key_start=[0, 0, 0]), "expected key_start to be a tensor, got list"),
        (lambda: token_contrastive(Q, K, TARGET, temperature=None), "expected temperature to be a number, finite and > 0"),
        (lambda: info_nce(Q, K, temperature=1e-40), "expected temperature to be a number >= 1.2e-38, got 1e-40"),
        (lambda: info_nce(Q, K, temperature=torch.ones(1, device="meta")), "expected temperature to be on cpu like the rows"),
        (lambda: mask(special_ids=None), "expected special_ids to be a sequence or a tensor, got None"),
        (lambda: TokenContrastiveLoss(-1.0), "TokenContrastiveLoss: expected temperature to be a number, finite and > 0"),
        (lambda: InfoNCELoss(0.001, True), "InfoNCELoss: expected temperature to be a number, finite and > 0, at least 0.01"),
        (lambda: info_nce(Q, K, temperature="warm"), "finite and > 0, or a tensor, got warm"),
        (lambda: varlen_attention(HEADS, HEADS, HEADS, [0, 3]), "expected cu_seqlens to be a tensor, got list"),
        (lambda: varlen_attention(HEADS, HEADS, HEADS, CU, scale=torch.ones(())), "expected scale to be a number, which"),
        (lambda: varlen_attention(*[HEADS[..., :0]] * 3, CU), "varlen_attention: expected query to be"),
        (lambda: varlen_attention(HEADS, HEADS, HEADS, CU, scale="x"), "expected scale to be a number, got x"),
        (lambda: varlen_attention(HEADS, HEADS, HEADS, CU, dropout=None), "dropout to be a number in [0, 1), got None"),
        (lambda: varlen_attention(HEADS, HEADS, HEADS, CU, window=1.5), "window to be a whole number in [0, 2⁶³), got 1.5"),
        (lambda: varlen_attention(HEADS, HEADS, HEADS, CU, seed=1.5), "seed to be a whole number in [-2⁶³, 2⁶⁴), got 1.5"),
        (lambda: varlen_attention(HEADS, HEADS, HEADS, CU, seed=2**64), f"number in [-2⁶³, 2⁶⁴), got {2**64}"),
        (lambda: varlen_attention(HEADS, HEADS, HEADS, CU, seed=CU[:1]), "int64 of shape [], got torch.int32 [1]"),
        (lambda: mask(seed=None), "complementary_mask: expected seed to be a whole number in [-2⁶³, 2⁶⁴), got None"),
        (lambda: mask(step=1.5), "complementary_mask: expected step to be a whole number, got 1.5"),
        (lambda: complementary_mask(IDS, mask_token_id=None, vocab_size=30, special_ids=()),
         "complementary_mask: expected mask_token_id to be a whole number, got None"),
        (lambda: mask(torch.empty(2, 2**30, dtype=torch.int64, device="meta")),
         f"expected input_ids to be fewer than 2^31 tokens, what cu_seqlens can hold, got {2**31}"),
        (lambda: mask(cu=CU), "expected input_ids to be of shape [T] when cu_seqlens is given, got [2, 3]"),
        (lambda: mask(sample_ids=[0, 1]), "expected sample_ids to be a tensor, got list"),
        (lambda: mask(attention_mask=IDS > 0, eligible=IDS.float()), "expected eligible to be torch.bool, got torch.float32"),
        (lambda: mask(special_ids=(0, None)), "expected special_ids to be whole numbers of 64 bits, got [0, None]"),
        (lambda: mask(special_ids=(1.9,)), "expected special_ids to be whole numbers of 64 bits, got [1.9]"),
        (lambda: mask(special_ids=(2**63,)), f"expected special_ids to be whole numbers of 64 bits, got [{2**63}]"),
        (lambda: mask(rate="x"), "complementary_mask: expected rate to be a number in [0, 1], got x"),
        (lambda: mask(mask_share=None), "expected mask_share to be a number in [0, 1], got None"),
        (lambda: mask(seed=torch.tensor(1.5)), "expected seed to be a whole number in [-2⁶³, 2⁶⁴), got torch.float32 []"),
        (lambda: mask(seed=torch.tensor([1, 2])), "expected seed to be a whole number in [-2⁶³, 2⁶⁴), got torch.int64 [2]"),
        (lambda: mask(step=torch.tensor(2.0)), "expected step to be a whole number, got torch.float32 []"),
        (lambda: varlen_attention(HEADS, HEADS, HEADS, CU, window=2**70), f"in [0, 2⁶³), got {2**70}"),
        (lambda: token_contrastive(Q, K, TARGET, normalize="no"), "expected normalize to be True or False, got 'no'"),
        (lambda: token_similarity(Q, K, normalize=None), "expected normalize to be True or False, got None"),
        (lambda: info_nce(Q, K, symmetric=None), "info_nce: expected symmetric to be True or False, got None"),
        (lambda: info_nce(Q, K, temperature=torch.ones((), dtype=torch.complex64)), "temperature to be a real number, got"),
        (lambda: info_nce([[1.0]], K), "info_nce: expected z1 to be a tensor, got list"),
        (lambda: info_nce(Q, K, temperature=2**2000), "expected temperature to be a number <= 3.4e+38, got 1"),
        (lambda: token_contrastive(Q.to_sparse(), K, TARGET), "expected query to be a dense tensor, got torch.sparse_coo"),
        (lambda: mlm_cross_entropy(Q.to_sparse(), K, None, TARGET), "expected hidden to be a dense tensor, got torch.sparse"),
        (lambda: mlm_cross_entropy(Q, K[:0], None, TARGET), "expected weight to be of shape [V >= 1, D = 3], got [0, 3]"),
        (lambda: mlm_cross_entropy([[0.0]], K, None, TARGET), "mlm_cross_entropy: expected hidden to be a tensor, got list"),
        (lambda: mlm_cross_entropy(Q, K, 0.5, TARGET), "mlm_cross_entropy: expected bias to be a tensor, got float"),
        (lambda: mlm_cross_entropy(Q, K, None, None), "mlm_cross_entropy: expected target to be a tensor, got NoneType"),
        (lambda: mlm_cross_entropy(Q.long(), K.long(), None, TARGET), "hidden to be float32, bfloat16, float16 or float64"),
        (lambda: mlm_cross_entropy(Q, K, K[0].double(), TARGET), "bias to be torch.float32 like hidden, got torch.float64"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_special_ids_may_be_an_iterator():
    ids = torch.ones(4, 20, dtype=torch.int64)
    assert not mask(ids, special_ids=map(int, "01")).role.any() and mask(ids, special_ids=()).role.any()


def test_a_loss_knows_its_options_when_it_is_made():
    with pytest.raises(TypeError, match="schem"):
        InfoNCELoss(0.1, schem="cross")
    assert InfoNCELoss(np.float32(0.5), scheme="nt_xent")(Q, K).isfinite()


def test_a_temperature_may_be_any_number():
    assert torch.equal(info_nce(Q, K, temperature=np.float32(0.5)), info_nce(Q, K, temperature=0.5))


FUNCTIONS = [
    lambda x: token_contrastive(x, K, TARGET),
    lambda x: token_similarity(x, K),
    lambda x: info_nce(x, K),
    lambda x: varlen_attention(x[:, None], x[:, None], x[:, None], CU),
    lambda x: token_contrastive(Q, K, TARGET, temperature=x.abs().mean()),
    lambda x: token_similarity(Q, K, temperature=x.abs().mean()),
    lambda x: info_nce(Q, K, temperature=x.abs().mean()),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_mode_is_refused_not_zero(function):
    with pytest.raises(NotImplementedError, match=r"to be without a tangent \(there is no forward mode\)"):
        torch.func.jvp(function, (Q,), (torch.ones_like(Q),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="without a tangent"):
        function(forward_ad.make_dual(Q, torch.ones_like(Q)))
    with forward_ad.dual_level():
        function(Q)  # no tangent, no error


@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_mode_is_refused_by_compiled_code_too(function):
    inside = torch.compile(lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),)), backend="aot_eager")
    with pytest.raises(NotImplementedError, match="there is no forward mode"):
        inside(Q)
    with pytest.raises(NotImplementedError, match="there is no forward mode"):
        torch.func.jacfwd(torch.compile(function, backend="eager"))(Q)


def test_a_fast_layer_says_what_torchs_says():
    for width, bias in ((3, None), (4, torch.zeros(1)), (4, torch.zeros(5, dtype=torch.float64))):
        plain, fast = torch.nn.Linear(4, 5), torch.nn.Linear(4, 5)
        use_fast_layers(fast)
        said = []
        for layer in (plain, fast):
            if bias is not None:
                layer.bias = torch.nn.Parameter(bias)
            try:
                said.append(layer(torch.ones(2, width)).shape)
            except RuntimeError as error:
                said.append(str(error))
        assert said[0] == said[1]
