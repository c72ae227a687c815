"""Tuning in Triton's interpreter with a fake clock, which tests the selection and its file."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import astuple, replace

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests selection in the interpreter", allow_module_level=True)

import cmlm_fast.kernels.tune as tuning
from cmlm_fast.kernels import _configs
from cmlm_fast.kernels._configs import Tile, config, dump, load, table
from cmlm_fast.kernels.tune import candidates, tune

NOW = config("interpreter", torch.float32, "narrow")
BEST = replace(NOW, scores=Tile(64, 64, 32, 4, 3), products=Tile(64, 32, 32, 4, 3), panel=(128, 128))


@pytest.fixture
def tried(monkeypatch):
    """Three candidates per field, and no trace of them afterwards."""
    monkeypatch.setattr(tuning, "SCORES", ((32, 64, 32, 4, 3), (64, 64, 32, 4, 3)))
    monkeypatch.setattr(tuning, "PRODUCTS", ((32, 32, 4, 3), (64, 32, 4, 3)))
    monkeypatch.setattr(tuning, "PANELS", ((64, 128), (128, 128)))
    yield
    _configs.tuned.cache_clear()
    config.cache_clear()


def current():
    return config("interpreter", torch.float32, "narrow")


def clock(call):
    """Milliseconds, fewer for each field that equals that of BEST."""
    call()
    return 4 - sum(getattr(current(), field) == getattr(BEST, field) for field in ("scores", "products", "panel"))


def run(path, **options):
    return tune("cpu", dtype=torch.float32, shapes=((20, 70, 24),), path=path, **{"clock": clock, **options})


def test_the_fastest_of_each_field_is_kept_written_and_used(tried, tmp_path, monkeypatch):
    path = tmp_path / "folder" / "triton.json"
    assert run(path) == {"narrow": BEST} and current() == BEST
    assert load(path) == {"interpreter": {"32": {"narrow": BEST}}}
    monkeypatch.setenv("CMLM_FAST_TRITON_CONFIGS", str(path))  # as a later process finds it
    _configs.tuned.cache_clear()
    config.cache_clear()
    assert current() == BEST
    assert config("interpreter", torch.float32, "wide") == table()["interpreter"]["32"]["wide"]


def test_what_does_not_fit_or_errs_is_not_taken(tried, tmp_path, monkeypatch):
    class OutOfResources(Exception):
        pass

    real = tuning._call

    def call(*args):
        plain = real(*args)

        def one():
            if current().scores == BEST.scores:
                raise OutOfResources
            loss, *rest = plain()
            return (loss * 1.5 if current().panel == BEST.panel else loss), *rest

        return one

    monkeypatch.setattr(tuning, "_call", call)
    chosen = run(tmp_path / "t.json")["narrow"]
    assert chosen.products == replace(BEST.products, rows=chosen.scores.rows)
    assert chosen.scores != BEST.scores and chosen.panel != BEST.panel
    monkeypatch.setattr(tuning, "REFUSED", ())
    with pytest.raises(OutOfResources):
        run(tmp_path / "t.json")


def test_when_time_is_over_the_best_so_far_is_taken_and_other_entries_stay(tried, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(dump({"sm_90": {"16": {"wide": BEST}}}))
    assert run(path, seconds=0.0) == {"narrow": NOW}
    assert load(path) == {"sm_90": {"16": {"wide": BEST}}, "interpreter": {"32": {"narrow": NOW}}}


def test_candidates_fit_the_kernels():
    for chip, numbers in table().items():
        for shapes in numbers.values():
            for entry in shapes.values():
                for field in ("scores", "products", "panel"):
                    for candidate in candidates(entry, field):
                        assert load_text(dump({chip: {"16": {"wide": candidate}}}))


def test_the_nearest_tiles_are_tried_first():
    assert next(candidates(NOW, "scores")) == NOW
    changed = [sum(a != b for a, b in zip(astuple(NOW.scores), astuple(entry.scores), strict=True))
               for entry in candidates(NOW, "scores")]  # fmt: skip
    assert changed == sorted(changed) and changed[-1] > 1


def load_text(text):
    return _configs._config(next(iter(json.loads(text).values()))["16"]["wide"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [("not JSON", "JSONDecodeError"), ('{"sm_90": {"16": {"wide": {}}}}', "KeyError"), ("[1]", "AttributeError"),
     (dump({"sm_90": {"16": {"wide": replace(NOW, panel=(100, 128))}}}), "no power of two: 100")],
)  # fmt: skip
def test_a_bad_file_is_named(tmp_path, text, problem):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"expected .*bad.json to hold entries as configs.json does, got .*{problem}"):
        load(path)


def test_where_the_file_is(monkeypatch, tmp_path):
    assert _configs.user_file() is None  # as tests have it
    with pytest.raises(ValueError, match="expected path to be given"):
        tune("cpu")
    monkeypatch.setenv("CMLM_FAST_TRITON_CONFIGS", "/a/b.json")
    assert str(_configs.user_file()) == "/a/b.json"
    monkeypatch.delenv("CMLM_FAST_TRITON_CONFIGS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _configs.user_file() == tmp_path / "cmlm_fast" / "triton.json"


def test_a_chip_without_entries_takes_the_nearest_older_one():
    entries = table()
    nearest = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120", "gfx950": "gfx942"}
    for chip, like in nearest.items():
        assert config(chip, torch.bfloat16, "wide") == entries[like]["16"]["wide"]


def test_the_command_exists():
    run = subprocess.run([sys.executable, "-m", "cmlm_fast.kernels.tune", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "--seconds" in run.stdout
