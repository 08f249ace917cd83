# Each target prepares what it needs. On a fresh Linux machine with Python >= 3.11 and make: `make demo`, `make test`.

VENV   ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
# Where CPU-only torch wheels are, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu; empty: the default index.
TORCH_INDEX ?=
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  ?= .venv-bench
NAMES  ?= dataplane cancel

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test check format bench bench-env docs wheel clean

help:
	@echo "make install   virtual environment in $(VENV) with everything"
	@echo "make demo      platform up, two apps, cold and warm calls, scale to zero, down"
	@echo "make test      all tests"
	@echo "make check     ruff and mypy --strict"
	@echo "make bench     benchmarks ($(NAMES)); NAMES=... chooses, ARGS=--quick shortens"
	@echo "make bench-env environment of the systems we compare with, in $(PEERS)"
	@echo "make docs      checks the documentation: links, code blocks, command reference"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found; install it or set PYTHON=/path/to/python3.11." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing; on Debian: apt-get install python3-venv." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not e2e"
	$(BIN)/python -m pytest -n 2 --dist loadfile -m e2e

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-env: $(PEERS)/.installed

$(PEERS)/.installed: benchmarks/peers.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --requirement benchmarks/peers.txt
	@touch $@

bench: install bench-env
	for name in $(NAMES); do $(BIN)/python -m benchmarks.$$name $(ARGS) || exit 1; done

docs: install
	$(BIN)/python -m pytest tests/docs

wheel: install
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(PEERS) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
