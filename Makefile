# `make demo` and `make test` set everything up in .venv first; a second run reuses it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: help setup demo test test-slow test-frame test-matrix lint format wheel bench
.PHONY: bench-engines bench-peers files pages notebooks transcripts docs release clean

# NNCF, the peer in INT8, wants a newer torch: an environment of its own.
NNCF ?= .venv-nncf
# Model-Optimizer and NNCF for bench-peers, each in an environment of its own.
PEERS ?= .venv-peers

# The site.
DOCS ?= .venv-docs
# Pages whose commands a script runs, and whose output it writes.
TRANSCRIPTS := docs/tutorial.md docs/orin.md docs/lost-points.md docs/slow-engine.md docs/detectors.md
# What builds and checks a release.
RELEASE ?= .venv-release

# One file of tests after the other in each process: what a file prepares is prepared once.
WORKERS ?= -n logical --maxprocesses 4 --dist loadfile

help:
	@echo 'make demo       a small BEVFusion from float to INT8: scores, speed, report'
	@echo 'make test       lint, type check and tests'
	@echo 'make test-slow  the tests that take minutes'
	@echo 'make test-frame the tests of a real nuScenes frame, in $$MMDET3D_QUANT_FRAME'
	@echo 'make test-matrix  the oldest and newest Python and torch, in environments of their own'
	@echo 'make wheel      the package with tools and configs, in dist/'
	@echo 'make release    sdist and wheel, checked, in dist/'
	@echo 'make files      docs/files.md: every module in a sentence'
	@echo 'make docs       the site, in site/'
	@echo 'make pages      the pages of docs/ that are written from code and data'
	@echo 'make transcripts  the commands of the pages that show their output, run again'
	@echo 'make notebooks  the notebooks, run from top to bottom'
	@echo 'make bench      the measurements in benchmarks/'
	@echo 'make bench-engines  speed of the INT8 files against float and NNCF'
	@echo 'make bench-peers  INT8 files by Model-Optimizer and NNCF beside ours'
	@echo 'make format     rewrite the code in the project style'

setup: $(READY)

$(READY): requirements/build.txt requirements/lock.txt requirements/compiler.txt
	@echo '== 1/5 virtual environment in $(VENV) ($(PYTHON))'
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v != (3, 11) and "Python 3.11 is needed, found %d.%d: make PYTHON=/path/to/python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	@echo '== 2/5 torch and build tools (2.5 GB, minutes)'
	$(PIP) -r requirements/build.txt -c requirements/lock.txt
	@echo '== 3/5 mmcv with its operators: compiled once, about 10 minutes on 2 cores; pip keeps the wheel'
	MMCV_WITH_OPS=1 MAX_JOBS=$${MAX_JOBS:-2} $(PIP) --no-build-isolation -c requirements/lock.txt mmcv==2.1.0
	@echo '== 4/5 everything else'
	$(PIP) -r requirements/lock.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@echo '== 5/5 the compiler of TensorRT for RTX, which needs no GPU'
	$(PIP) --no-deps -r requirements/compiler.txt
	@touch $@

demo: $(READY)
	$(BIN)/python tools/demo.py

test: $(READY) lint
	@echo '== tests'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-frame: $(READY)
	$(BIN)/python -m pytest -m frame

test-matrix: $(READY)
	$(BIN)/python tests/matrix.py

wheel: $(READY)
	rm -rf build
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

$(DOCS)/ready: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --disable-pip-version-check -r requirements/docs.txt
	@touch $@

docs: $(DOCS)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict
	@echo 'Look at it: python -m http.server -d site'

$(RELEASE)/ready: requirements/release.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --disable-pip-version-check -r requirements/release.txt
	@touch $@

release: $(RELEASE)/ready
	rm -rf build dist
	$(RELEASE)/bin/python -m build --outdir dist .
	$(RELEASE)/bin/twine check --strict dist/*

lint: $(READY)
	@echo '== lint, format and types'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

files: $(READY)
	$(BIN)/python -m tests.test_design

pages: $(READY)
	$(BIN)/python -m pages.licences
	$(BIN)/python -m pages.support
	$(BIN)/python -m pages.results
	$(BIN)/python -m pages.floors

notebooks: $(READY)
	$(BIN)/python -m pages.notebooks

transcripts: $(READY)
	$(BIN)/python -m pages.transcripts $(TRANSCRIPTS)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data/synthetic/synthetic.json: | $(READY)
	@echo '== synthetic nuScenes, 10 minutes on 2 cores'
	$(BIN)/python tools/make_synthetic_nuscenes.py --out data/synthetic --samples 160 --val-samples 80

bench: $(READY) data/synthetic/synthetic.json
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

$(NNCF)/bin/nncf-ready:
	@echo '== NNCF in $(NNCF)'
	$(PYTHON) -m venv $(NNCF)
	$(NNCF)/bin/python -m pip install --disable-pip-version-check nncf==3.4.0 openvino onnx
	@touch $@

bench-engines: $(READY) $(NNCF)/bin/nncf-ready
	$(BIN)/python benchmarks/engine_speed.py --nncf-python $(NNCF)/bin/python

bench-peers: $(READY) data/synthetic/synthetic.json
	$(BIN)/python benchmarks/peers.py --setup $(PEERS)

clean:
	rm -rf $(VENV) $(NNCF) $(PEERS) $(RELEASE) $(DOCS) site .venv-matrix work_dirs build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
