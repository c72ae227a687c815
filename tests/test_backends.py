"""Choosing a backend, loading the package, and what a pure-Python install still does."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys

import pytest
import torch

import cmlm_fast
from cmlm_fast import _library, backends
from cmlm_fast._library import contracts, op
from cmlm_fast.attention import packing_of
from cmlm_fast.backends import BACKENDS, CHOICES, Rule, preference, resolve
from cmlm_fast.layers import use_fast_layers
from cmlm_fast.machine import check_backend_here

CPU = torch.device("cpu")


def python(code, **environment):
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize("name", contracts)
def test_auto_takes_the_first_available_backend(name):
    reasons = cmlm_fast.available(name, "cpu")
    first = next(backend for backend in preference(name, "cpu") if reasons[backend] is None)
    assert resolve(name, CPU) is resolve(name, CPU, first)
    assert resolve(name, CPU, "reference") is op(name, "_reference")


def test_choices_are_well_formed_and_every_device_has_an_answer():
    for rules in CHOICES.values():
        assert rules[-1] == Rule(rules[-1].order)  # applies whenever no rule before it does
        for rule in rules:
            assert set(rule.order) <= set(BACKENDS) and rule.order[-1] == "reference"
            assert rule.op is None or rule.op in contracts
            assert not rule.min_size or (rule.op and rule.dtypes)
    assert preference("info_nce", "meta") == ("reference",)


@pytest.mark.parametrize("rule", [rule for rule in CHOICES["cuda"] if rule.min_size], ids=lambda rule: rule.op)
def test_on_a_gpu_the_choice_follows_dtype_and_size(rule, monkeypatch):
    monkeypatch.setattr(backends, "_why_unavailable", lambda *_: None)  # as if every backend were there
    monkeypatch.setattr(backends, "_resolved", {})
    device, dtype = torch.device("cuda"), rule.dtypes[0]

    def chosen(dtype, size, backend=None):
        return str(resolve(rule.op, device, backend, dtype, size)).split(".")[1]

    for _ in range(2):  # found, and remembered
        assert chosen(dtype, rule.min_size) == f"{rule.op}_{rule.order[0]}"
        assert chosen(dtype, rule.min_size - 1) == chosen(torch.complex64, rule.min_size) == rule.op
        assert chosen(dtype, rule.min_size, "reference") == f"{rule.op}_reference"
    with cmlm_fast.use_backend("cuda"):
        assert chosen(dtype, rule.min_size) == rule.op


def test_no_kernel_is_there_for_a_gpu_that_it_has_no_code_for(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "load_errors", {})
    monkeypatch.setattr(backends, "native_kernels", {("info_nce", "CUDA")})
    monkeypatch.setattr(backends, "_built_for", lambda: ("80-real", "90a-real", "120"))
    cases = {(7, 5): (False, False), (8, 6): (True, True), (9, 0): (True, True), (11, 0): (False, True), (12, 1): (True, True)}
    for capability, expected in cases.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda on, have=capability: have)
        reasons = cmlm_fast.available("info_nce", "cuda")
        assert (reasons["cuda"] is None, reasons["triton"] is None) == expected, capability
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda on: (7, 5))
    reason = "Triton kernels are built for 80, not for compute capability 7.5"
    assert cmlm_fast.available("info_nce", "cuda")["triton"] == reason


def test_gpus_of_two_kinds_in_one_machine_are_told_apart(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda on: (7, 5) if on.index == 1 else (9, 0))
    monkeypatch.setattr(backends, "load_errors", {})
    monkeypatch.setattr(backends, "native_kernels", {("info_nce", "CUDA")})
    monkeypatch.setattr(backends, "_built_for", lambda: ("90a-real",))
    monkeypatch.setattr(backends, "_resolved", {})
    for _ in range(2):  # found, and remembered
        names = [str(resolve("info_nce", torch.device("cuda", i))).split(".")[1] for i in (0, 1)]
        assert names == ["info_nce", "info_nce_reference"]
    assert [backends.available("info_nce", f"cuda:{i}")["cuda"] is None for i in (0, 1)] == [True, False]


@pytest.mark.parametrize("name", contracts)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_named_backend_runs_or_says_why_not(name, backend):
    reason = cmlm_fast.available(name, "cpu")[backend]
    if reason is None:
        assert resolve(name, CPU, backend) is not None
    else:
        with pytest.raises(RuntimeError, match=f"expected backend to be available, got '{backend}'"):
            resolve(name, CPU, backend)


def test_use_backend_nests_and_restores():
    auto = resolve("info_nce", CPU)
    with cmlm_fast.use_backend("reference"):
        assert resolve("info_nce", CPU) is op("info_nce", "_reference")
        with cmlm_fast.use_backend("auto"):
            assert resolve("info_nce", CPU) is auto
        assert resolve("info_nce", CPU) is op("info_nce", "_reference")
    assert resolve("info_nce", CPU) is auto
    with (
        pytest.raises(ValueError, match=r"expected backend to be auto or one of .*, got 'fast'"),
        cmlm_fast.use_backend("fast"),
    ):
        pass
    with pytest.raises(ValueError, match="expected op to be one of"):
        cmlm_fast.available("softmax")


@pytest.mark.parametrize(("backend", "suffix"), [(None, ""), ("cpp", ""), ("reference", "_reference"), ("cuda", None)])
def test_ops_in_the_place_of_functions_of_pytorch_heed_the_named_backend(backend, suffix):
    hidden, weight, target = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8), torch.tensor([1, 2, 3, -100])
    layer = torch.nn.Sequential(torch.nn.Dropout(0.5))
    use_fast_layers(layer)
    with cmlm_fast.use_backend(backend), torch.profiler.profile() as profile:
        losses = cmlm_fast.mlm_cross_entropy(hidden, weight, None, target)
        layer(hidden)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(hidden @ weight.T, target))
    ran = {event.key for event in profile.key_averages() if event.key.startswith("cmlm_fast::")}
    assert ran == (set() if suffix is None else {f"cmlm_fast::dropout{suffix}", f"cmlm_fast::softmax_loss{suffix}"})


@pytest.mark.parametrize("backend", ["reference", "cpp", "cuda"])
def test_on_a_gpu_functions_of_pytorch_are_replaced_by_kernels_alone(backend):
    with cmlm_fast.use_backend(backend):
        for name in ("dropout", "softmax_loss", "varlen_attention"):
            assert backends.replacement_op(name, torch.device("cuda")) is None


def test_environment_variable_names_the_backend():
    code = (
        "import torch; from cmlm_fast.backends import resolve; print(resolve('info_nce', torch.device('cpu')))"
    )
    assert "info_nce_reference" in python(code, CMLM_FAST_BACKEND="reference")


def test_a_name_that_is_none_is_said_by_every_op(monkeypatch):
    monkeypatch.setattr(backends, "_current", "cuda_")  # as the environment variable sets it
    replace = backends.replacement_op
    for call in (lambda: resolve("info_nce", CPU), lambda: replace("dropout", CPU), lambda: check_backend_here(None)):
        with pytest.raises(ValueError, match=r"expected backend to be auto or one of .*, got 'cuda_'"):
            call()


def test_without_kernels_everything_still_works():
    code = (
        "import torch, cmlm_fast as c; z = torch.eye(4); "
        "print(c.available('info_nce')['cpp']); print(round(c.info_nce(z, z, temperature=1.).item(), 4))"
    )
    assert python(code, CMLM_FAST_NATIVE="0").splitlines() == ["CMLM_FAST_NATIVE=0 is set", "0.7437"]
    code = "import torch; torch.version.cuda = '13.0'; from cmlm_fast import _library; print(_library.load_errors['_C_cuda'])"
    assert python(code, CMLM_FAST_NATIVE="0").strip() == "CMLM_FAST_NATIVE=0 is set"


def test_packed_attention_is_pytorchs_where_no_kernel_is():
    # Not the op's reference, which draws dropout's numbers in Python.
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    for backend, kind in (("auto", "PackingForOp"), ("reference", "PackingForOp"), ("cuda", "Packing")):
        with cmlm_fast.use_backend(backend):
            assert type(packing_of((3, 2), bounds)).__name__ == kind
    code = ("import torch; from cmlm_fast.attention import packing_of; "
            "print(type(packing_of((3, 2), torch.tensor([0, 3, 5], dtype=torch.int32))).__name__)")  # fmt: skip
    assert python(code, CMLM_FAST_NATIVE="0").strip() == "Packing"


def test_a_library_that_does_not_load_is_a_reason_not_an_error(tmp_path):
    (tmp_path / "broken.so").write_text("not a library")
    code = ("import warnings; warnings.showwarning = lambda message, *_: print(message); "
            "import cmlm_fast; print(cmlm_fast.available('info_nce')['cpp'])")  # fmt: skip
    warned, reason = python(code, CMLM_FAST_LIBRARY=str(tmp_path / "broken.so")).splitlines()
    assert reason.startswith("broken.so does not load: ") and warned == f"cmlm_fast: {reason}; without it ops are slower"
    assert "file too short" in reason  # the loader's message


@pytest.mark.skipif("_C" in _library.load_errors, reason="no compiled CPU kernels")
def test_a_library_of_other_schemas_is_not_loaded(monkeypatch):
    info = pytest.importorskip("cmlm_fast._build").build_info()
    assert info["schemas"] == _library.SCHEMAS
    monkeypatch.setattr(_library, "load_errors", {})
    monkeypatch.setattr(_library, "SCHEMAS", _library.SCHEMAS + 1)
    reason = "_C.so was built for another version of the package: install it again"
    with pytest.warns(UserWarning, match=re.escape(reason)):
        _library.load_kernels()
    assert _library.load_errors["_C"] == reason


def test_a_changed_schema_has_another_number():
    compiled = sorted(name for name in _library.registered if not name.endswith(("_reference", "_triton")))
    schemas = "\n".join(str(op(name)._schema) for name in compiled)
    digest = hashlib.sha256(schemas.encode()).hexdigest()[:12]
    assert digest == "d4ebfae2f17a", "raise SCHEMAS in _library.py and in csrc/module.cpp, then write the new digest here"


def test_import_is_light():
    code = (
        "import time, sys; begin = time.perf_counter(); import torch, numpy; start = time.perf_counter(); import cmlm_fast; "
        "print((time.perf_counter() - start) / (start - begin)); "
        "print([m for m in ('transformers', 'triton', 'datasets', 'typer', 'torch._dynamo') if m in sys.modules]); "
        "cmlm_fast.data.clean_texts; [getattr(cmlm_fast, name) for name in dir(cmlm_fast)]"
    )
    best = min(python(code).splitlines() for _ in range(3))
    assert best[1] == "[]" and float(best[0]) < 0.1


@pytest.mark.parametrize("build", ["whole", "without build_info"])
def test_a_backend_of_cuda_is_chosen_inside_torch_compile(build, monkeypatch):
    # As on a machine with a GPU: on CUDA tensors the choice asks what the library was built for.
    monkeypatch.delitem(_library.load_errors, "_C_cuda", raising=False)
    monkeypatch.setattr(backends, "native_kernels", {*_library.native_kernels, ("info_nce", "CUDA")})
    monkeypatch.setattr(backends, "_resolved", {})
    if build != "whole":
        monkeypatch.setitem(sys.modules, "cmlm_fast._build", None)

    def choose(x):
        backends.resolve("info_nce", torch.device("cuda"), "cuda", torch.float32)
        return x + 1

    torch._dynamo.reset()
    assert torch.compile(choose, fullgraph=True, backend="eager")(torch.zeros(())) == 1
    assert not backends._resolved  # otherwise compiled code would depend on what was found before, and be recompiled


def test_blocks_of_use_backend_that_end_in_another_order_leave_no_trace():
    outer, inner = cmlm_fast.use_backend("reference"), cmlm_fast.use_backend("cpp")
    before = backends._current
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert backends._current == "cpp"
    inner.__exit__(None, None, None)
    assert backends._current == before
