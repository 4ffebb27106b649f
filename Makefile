# `make demo`, `make test` and `make docs` need nothing but Python 3.11 or newer and make.
# PYTHON names the interpreter; each candidate is asked for its version, because a name on the PATH may not run.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# `make test INSTALL="uv pip install"` takes uv, which installs into .venv by itself.
INSTALL ?= $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: demo test docs clean

demo: .venv/.installed
	$(BIN)/vitreg demo --out vitreg-out/demo

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/python -m pytest -q -n auto

docs: .venv/.docs
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs
	@echo open build/docs/index.html

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "vitreg needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml
	$(INSTALL) -q -e .
	touch $@

.venv/.dev: .venv/bin/python pyproject.toml
	$(INSTALL) -q -e ".[dev]"
	touch .venv/.installed $@

.venv/.docs: .venv/bin/python pyproject.toml
	$(INSTALL) -q -e ".[docs]"
	touch .venv/.installed $@

clean:
	rm -rf .venv vitreg-out build
