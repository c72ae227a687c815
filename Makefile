# make setup | demo | test | chaos | sanitize | cuda-link | bench | compare | gpu | clean: each works alone from a fresh clone,
# with Python >= 3.10, gcc and make.
#
#   make PYTHON=python3.12 setup        another interpreter (.venv is recreated)
#   make setup PIP_ARGS='--extra-index-url URL'    for instance an index of CPU-only torch builds

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
# constraints.txt stays a relative path: pip splits on spaces, and the clone's path may contain one. --no-compile: Python
# compiles what it imports; pip would compile every file of every package, a third of its time.
INSTALL := $(PY) -m pip install --disable-pip-version-check -q --no-compile -c constraints.txt $(PIP_ARGS)
MADE := $(VENV)/.made-with-$(notdir $(PYTHON))
SOURCES := $(shell find csrc -type f 2>/dev/null)
SANITIZED := build/sanitize

.PHONY: setup demo test chaos lint sanitize cuda-link bench compare gpu clean
.DELETE_ON_ERROR:

setup: $(VENV)/.package

# The virtual environment. A distribution's Python may lack ensurepip; its own pip then installs pip into the new environment.
$(MADE):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"Python >= 3.10 needed, {sys.executable} is {v[0]}.{v[1]}; make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV) || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install -q pip; }
	@touch $@

# torch first, at the pinned version, so that later installs find it there.
$(VENV)/.torch: constraints.txt | $(MADE)
	$(INSTALL) torch
	$(INSTALL) setuptools pybind11 cmake ninja
	@touch $@

$(VENV)/.package: $(VENV)/.torch $(SOURCES) CMakeLists.txt setup.py pyproject.toml
	$(INSTALL) --no-build-isolation -e '.[demo,test]'
	@touch $@

demo: setup
	$(VENV)/bin/cmlm-fast demo

lint: setup
	$(PY) -m ruff check .
	$(PY) -m mypy

test: lint
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Kills a training run with SIGKILL at random moments and resumes it, until it ends bit-identical to an uninterrupted run.
KILLS ?= 12
chaos: setup
	OMP_NUM_THREADS=1 $(PY) tests/chaos.py --kills $(KILLS) --steps 60

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, driven by the parity tests. Python itself is not
# instrumented, so the runtime is preloaded, and memory that Python never frees is not reported.
sanitize: setup
	CMLM_FAST_SANITIZE=1 CMLM_FAST_CUDA=0 $(PY) setup.py -q build_ext
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 CMLM_FAST_LIBRARY=$(SANITIZED)/_C.so \
	  $(PY) -m pytest -q tests/test_parity.py

# Loads the CUDA library into a PyTorch with CUDA, in a separate environment under build/ (several GB), to check that it links
# and that every symbol is found. Needs no GPU and runs nothing.
CUDA_LINK := build/cuda-link
CUDA_TORCH ?= torch
cuda-link: setup
	$(PYTHON) -m venv --clear $(CUDA_LINK) || \
	  { $(PYTHON) -m venv --clear --without-pip $(CUDA_LINK) && $(PYTHON) -m pip --python $(CUDA_LINK)/bin/python install -q pip; }
	$(CUDA_LINK)/bin/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) '$(CUDA_TORCH)' numpy
	$(CUDA_LINK)/bin/python benchmarks/cuda_link.py cmlm_fast/_C_cuda.so
	rm -rf $(CUDA_LINK)

# Every op against its peers (five minutes on two cores): writes benchmarks/results, the docs' tables, the report in out/bench.
bench: setup
	$(PY) -m benchmarks --output benchmarks/results/cpu.json
	$(PY) -m benchmarks report benchmarks/results/cpu.json --docs

# Is the working tree slower than the previous commit (for a merge: the main it went into)? `make compare BASE=v0.1.0` names
# another base. In CI, COMPARE_ARGS selects a few shapes and a wide threshold.
BASE ?= HEAD^
COMPARE_ARGS ?=
compare: setup
	$(PY) -m benchmarks compare $(BASE) . $(COMPARE_ARGS)

# Everything that needs a GPU, into $(OUT); DRY=1: the steps that need none. Installs nothing: without .venv, uses $(PYTHON).
OUT ?= out
gpu:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m benchmarks.gpu --out "$(OUT)" $(if $(filter 1,$(DRY)),--dry)

clean:
	rm -rf build dist out *.egg-info $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find cmlm_fast -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
