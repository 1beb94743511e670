# make demo           the main job on real data
# make test           the tests of a push
# make test-fast      those for the loop of a developer
# make test-nightly   those of the schedule: packages, examples, clusters
# make test-seeded    whether the tests see seeded faults
# make test-versions  those for other versions, in environments of their own
# make lint           format, lint and types, in seconds
# make check          lint and tests: the one command before a push
# make docs           the site, in build/site; every link is checked
#
# Each sets up what it needs in .venv, once, with pip or with uv.

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
PYTEST_ARGS ?=
# Tests of a file share workers that they start.
BY_FILE = -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast test-nightly test-seeded test-versions lint check docs clean

demo: $(VENV)/.demo
	@$(SHARED) $(BIN)/python examples/digits.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(BY_FILE) -m 'not nightly' $(PYTEST_ARGS)

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto -m 'not slow and not nightly' \
		$(PYTEST_ARGS)

test-nightly: $(VENV)/.dev
	$(BIN)/python -m pytest $(BY_FILE) -m 'nightly or hypothesis' \
		--hypothesis-profile nightly $(PYTEST_ARGS)

test-seeded: $(VENV)/.dev
	$(BIN)/python tests/seeded_faults/run_seeded.py $(FAULTS)

test-versions: $(VENV)/.dev
	$(BIN)/python -m nox -s start versions

lint: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini
	@$(BIN)/python tests/measures.py --notes

check: lint test

docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --strict

# A stamp is newer than pyproject.toml as long as nothing has to be installed.
# One make at a time installs: another one that waited for the lock finds the
# stamp there.
ifdef LOCKED
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(call install,examples)
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(call install,dev)
	touch $@ $(VENV)/.demo
else
$(VENV)/.demo $(VENV)/.dev: pyproject.toml
	@$(LOCK) $(MAKE) --no-print-directory LOCKED=1 $@
endif

# Where there is no flock, two at once have to be started one after the other.
# The demo keeps others from installing under its feet.
FLOCK = $(shell command -v flock)
LOCK = $(if $(FLOCK),flock .venv.lock)
SHARED = $(if $(FLOCK),flock --shared .venv.lock)

# An environment made by uv has no pip.
define install
@echo "Installing keras_allreduce[$(1)] in $(VENV)"
@if $(BIN)/python -m pip --version >/dev/null 2>&1; \
	then $(BIN)/python -m pip install --quiet --editable ".[$(1)]"; \
	else uv pip install --quiet --python $(BIN)/python --editable ".[$(1)]"; fi
endef

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "keras_allreduce needs Python 3.10 or later; received %s. Set PYTHON=/path/to/python3." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .venv.lock .nox build *.egg-info .pytest_cache .mypy_cache .ruff_cache
