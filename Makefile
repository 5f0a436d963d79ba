# Everything a user or developer types; works from any folder: make -C path/to/lora-gpt2 demo
ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
VENV ?= $(ROOT).venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test check test-slow bench docs clean
.DEFAULT_GOAL := help

help:           ## list the targets
	@grep -E '^[a-z-]+: .*##' $(ROOT)Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: $(ROOT)pyproject.toml $(ROOT)constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint $(ROOT)constraints.txt --editable $(ROOT)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint $(ROOT)constraints.txt --editable "$(ROOT)[dev]"
	@touch $@

demo: $(VENV)/.installed ## train three adapters on the bundled base, swap them, measure them
	@cd $(ROOT) && $(BIN)/lora-gpt2 demo

test: $(VENV)/.installed-dev ## run the tests
	@cd $(ROOT) && $(BIN)/python -m pytest

check: $(VENV)/.installed-dev ## format, lint, types, import directions, generated docs, tests
	@cd $(ROOT) && $(BIN)/ruff format --check . && $(BIN)/ruff check .
	@cd $(ROOT) && $(BIN)/mypy
	@cd $(ROOT) && $(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports
	@cd $(ROOT) && $(BIN)/python tools/write_docs.py --check
	@cd $(ROOT) && $(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev ## run the slow tests: full-size models
	@cd $(ROOT) && $(BIN)/python -m pytest -m slow -n 0

bench: $(VENV)/.installed ## measure start-up and quality over domains on this machine
	@cd $(ROOT) && $(BIN)/lora-gpt2 bench startup

docs: $(VENV)/.installed-dev ## write the generated parts of the README
	@cd $(ROOT) && $(BIN)/python tools/write_docs.py

clean:          ## remove the virtual environment and caches
	rm -rf $(VENV) $(ROOT).pytest_cache $(ROOT).mypy_cache $(ROOT).ruff_cache
