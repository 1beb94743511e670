# make demo    the main job on real data
# make test    the tests
# make lint    format, lint and types, in seconds
# make check   lint and tests: the one command before a push
# make docs    the site, in build/site; every link is checked
#
# Each sets up what it needs in .venv, once.

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
PYTEST_ARGS ?=

.PHONY: demo test lint check docs clean

demo: $(VENV)/.demo
	$(BIN)/python examples/digits.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

check: lint test

docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --strict

# A stamp is newer than pyproject.toml as long as nothing has to be installed.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[examples]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.demo

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "keras_allreduce needs Python 3.10 or later; received %s. Set PYTHON=/path/to/python3." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache
