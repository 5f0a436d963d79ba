# Everything a user or developer types; works from any folder: make -C path/to/lora-gpt2 demo
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := "$(BIN)/python" -m pip --disable-pip-version-check

.PHONY: help demo test test-fast lint check test-slow bench docs clean
.DEFAULT_GOAL := help

help:           ## list the targets
	@grep -E '^[a-z-]+: .*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(VENV)/.installed ## train three adapters on the bundled base, swap them, measure them
	@$(BIN)/lora-gpt2 demo

test: $(VENV)/.installed-dev ## run the tests
	@$(BIN)/python -m pytest

test-fast: $(VENV)/.installed-dev ## run what two minutes allow: the laws of every module, no commands, servers and shape checks
	@JAXTYPING_DISABLE=1 $(BIN)/python -m pytest tests/unit tests/golden tests/contract/test_project.py --ignore tests/unit/store/test_faults.py

lint: $(VENV)/.installed-dev ## format, lint, types, import directions, documentation
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .
	@for system in linux darwin win32; do $(BIN)/mypy --platform $$system --cache-dir .mypy_cache/$$system || exit 1; done
	@$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports
	@$(BIN)/python tools/write_docs.py --check
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir .mkdocs_check

check: lint ## all of that, and the tests
	@$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev ## run the slow tests: full-size models
	@$(BIN)/python -m pytest -m slow -n 0

bench: $(VENV)/.installed ## measure start-up times on this machine
	@$(BIN)/lora-gpt2 bench startup

docs: $(VENV)/.installed-dev ## write the generated pages and build the documentation site in site/
	@$(BIN)/python tools/write_docs.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:          ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .mkdocs_check site
