# `make run` and `make test` are all one needs; both first set up .venv (Python 3.11 or newer and pip, nothing else).
SHELL := /bin/sh
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
# `make run` needs few packages; everything that develops and tests the library needs all of them.
RUN_READY := $(VENV)/.ready-run
READY := $(VENV)/.ready
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -qq -c constraints.txt
# Small networks: one thread per process, one process per core (JOBS=0 for a single process).
JOBS ?= 2

# The oldest torch that pyproject.toml allows, and the tests that depend on torch the most.
OLDEST := $(shell sed -n 's/^ *"torch>=\([0-9.]*\),.*/\1/p' pyproject.toml)
TORCH_TESTS := tests/test_torch_internals.py tests/training tests/agents tests/storage/test_format.py tests/deploy

.PHONY: help run test test-oldest test-torch docs lint type format bench dist clean setup

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 13

run: $(RUN_READY) ## train SRPO on a real dataset and roll it out (minutes); ARGS="..." goes to the script
	$(PY) examples/01_train_and_run.py $(ARGS)

test: lint type ## lint, types and all tests; ARGS="tests/test_layers.py -k files" for some of them
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-oldest: ## the tests that depend on torch, with the oldest torch allowed (own environment, downloads gigabytes); ARGS as in test
	@$(MAKE) --no-print-directory test-torch TORCH="$(OLDEST).*"

test-torch: ## the same with another version: TORCH=2.14.1
	@test -n "$(TORCH)" || { echo "name a version: make test-torch TORCH=2.14.1"; exit 1; }
	@$(MAKE) --no-print-directory ".venv-torch-$(TORCH:.*=)/.ready" TORCH="$(TORCH)"
	.venv-torch-$(TORCH:.*=)/bin/python -c "import torch; print('torch', torch.__version__)"
	OMP_NUM_THREADS=1 .venv-torch-$(TORCH:.*=)/bin/python -m pytest -n $(JOBS) --dist loadfile $(or $(ARGS),$(TORCH_TESTS))

# As .venv, but for torch: its line in constraints.txt is left out.
.venv-torch-%/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; say which: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(@D)/bin/pip || { echo "Setting up $(@D): some minutes, once"; "$(PYTHON)" -m venv $(@D); }
	grep -v '^torch==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip --disable-pip-version-check install -qq -c $(@D)/constraints.txt "torch==$(TORCH)"
	$(@D)/bin/python -m pip --disable-pip-version-check install -qq -c $(@D)/constraints.txt -e ".[test]" "torch==$(TORCH)"
	@touch $@

docs: $(READY) ## build the documentation site into out/docs; every warning is an error
	HF_HUB_OFFLINE=1 $(PY) -m sphinx -W --keep-going -q -b html docs out/docs
	@echo "open out/docs/index.html"

lint: $(READY) ## ruff
	$(PY) -m ruff check --quiet .

type: $(READY) ## mypy, strict
	$(PY) -m mypy

format: $(READY) ## let ruff mend and format what it can
	$(PY) -m ruff check --quiet --fix .
	$(PY) -m ruff format .

bench: $(READY) ## how fast training and acting are, beside plain implementations (most of an hour); ARGS="..." goes to the script
	$(PY) zoo/benchmarks/speed.py $(ARGS)

dist: .venv-dist/.ready ## wheel and source distribution of the last commit, in dist/, checked; URL=https://... for an upload
	.venv-dist/bin/python .ci/make_dist.py $(if $(URL),--url "$(URL)")

.venv-dist/.ready: constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; say which: make dist PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(@D)/bin/pip || "$(PYTHON)" -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install -qq -c constraints.txt build setuptools twine
	@touch $@

clean: ## remove what builds and tests leave (not .venv, not data)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

setup: $(READY) ## only set up .venv, with everything that developing and testing need

# Done again when a dependency changes. Torch goes first: the version that constraints.txt holds, not one that another package asks for.
$(RUN_READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; say which: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(VENV)/bin/pip || { echo "Setting up $(VENV): a minute or two, once"; "$(PYTHON)" -m venv $(VENV); }
	$(PIP) torch
	$(PIP) -e ".[mujoco,plot,video]"
	@touch $@

$(READY): $(RUN_READY)
	$(PIP) -e ".[test]"
	@touch $@
