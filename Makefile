# `make demo` and `make test` need Python 3.11–3.13 and nothing done before them.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 3
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-real test test-quick test-servers lint bench install clean

demo: $(VENV)/.run  ## the whole loop on the planted world: five to seven minutes on two cores
	$(BIN)/staple run planted

demo-real: DTYPE = $(shell grep -qsE 'amx_bf16|avx512_bf16' /proc/cpuinfo && echo bfloat16 || echo float32)
demo-real: $(VENV)/.run  ## a real small model looks for a house style; downloads 180 MB
	$(BIN)/staple fetch smollm2-135m-instruct
	$(BIN)/staple fetch all-minilm-l6-v2
	$(BIN)/staple run house-style --set policy.dtype=$(DTYPE)
	$(BIN)/staple constitution show house-style
	$(BIN)/staple report house-style

test: $(VENV)/.dev  ## everything, on a CPU, without a network
	$(PYTEST)

test-quick: WORKERS = 2  # another one imports longer than it tests
test-quick: $(VENV)/.dev  ## the files of tests that were measured to take seconds
	$(PYTEST) -m "not slow"

test-servers: $(VENV)/.dev  ## the whole loop through servers with passwords, on Debian's Postgres
	STAPLE_TEST_SERVERS=1 $(BIN)/python docker/from_packages.py -- $(BIN)/python -m pytest tests/test_end_to_end.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy constitutions flows models tasks benchmarks docker/from_packages.py
	$(BIN)/mypy --explicit-package-bases --namespace-packages tests

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
