# `make demo` and `make test` need nothing but Python 3.11 or 3.12 and make.
# PYTHON names the interpreter; each candidate is asked for its version, because a name on the PATH may not run.
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/.installed
	$(BIN)/vitreg demo --out vitreg-out/demo

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/python -m pytest -q -n auto

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "vitreg needs Python 3.11 or 3.12; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check -q -e .
	touch $@

.venv/.dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[dev]"
	touch .venv/.installed $@

clean:
	rm -rf .venv vitreg-out
