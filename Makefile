# Two commands on a machine that has Python 3.11 or later, make and git: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two workers with one thread each: the models of the tests are too small to profit from more threads.
WORKERS ?= 2
# The tests start hundreds of processes: each would compile the package anew where Python may not keep what it compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install quickstart test test-fast verify-kernels lint check-install docs format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/installed  ## make the environment in .venv with the tested versions

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV): some minutes, 2.7 GB (with CUDA more)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: install  ## the whole pipeline on a model small enough for two cores, in two to four minutes
	$(BIN)/rlhf run recipes/quickstart.yaml

test: install  ## all tests; those on real data say so where it is absent
	$(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal

test-fast: install  ## the tests that start no process and run no stage, in under three minutes on two cores
	$(BIN)/pytest -m "not slow" --numprocesses $(WORKERS) --dist worksteal

verify-kernels: install  ## all default cases of the attention kernels; their sources then count as verified
	RLHF_VERIFY_KERNELS=1 $(BIN)/pytest tests/attention/kernels --numprocesses $(WORKERS) --dist worksteal
	$(BIN)/python -m tests.attention.kernels.verified

lint: install  ## ruff, pyright, the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

check-install: install  ## the pinned set resolves as published, and the built wheel runs in a fresh environment
	$(BIN)/python .ci/check_install.py

docs: install  ## the documentation as a site in build/site; a broken link is an error
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python .ci/site.py

format: install  ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches, never a run
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis
