# `make demo` and `make test` need Python 3.11–3.13 and nothing done before them.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench install clean

demo: $(VENV)/.run  ## the whole loop on the planted world: about three minutes on two cores
	$(BIN)/staple run planted

test: $(VENV)/.dev  ## everything, on a CPU, without a network
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy constitutions flows models tasks benchmarks

bench: $(VENV)/.dev  ## each figure beside what a user would pick instead
	$(BIN)/python -m benchmarks

install: $(VENV)/.run

# torch goes first and by its exact pin, so that no other package chooses a build of it
$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .staple mlruns mlflow.db
