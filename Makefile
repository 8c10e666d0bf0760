# `make demo` and `make test` need Python 3.11 or newer, pip, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that share the tests. Each takes up to 3 GB.
WORKERS ?= 2

.PHONY: help demo fetch real test test-fast gpu runtimes packages vllm afternoon exported docs lint format clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first, by itself: with a range to choose from, pip may fetch another build of it
	$(BIN)/pip install --quiet -c constraints.txt torch
	# the name of earlier copies, whose metadata would register every plug-in again
	$(BIN)/pip uninstall -qq --yes bpkit
	rm -rf bpkit.egg-info
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.ready  ## decode real prompts under several policies and compare them
	$(BIN)/bpkit demo

fetch: $(VENV)/.ready  ## get the real model, once: 93 MB to download, 542 MB on disk; tests that need it run then
	$(BIN)/bpkit models fetch smollm2

real: fetch  ## the demo on it
	$(BIN)/bpkit demo --target smollm2 --products auto --limit 1

test: $(VENV)/.ready  ## every test, in a quarter of an hour on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: $(VENV)/.ready  ## without the tests marked `slow`
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow'

gpu: $(VENV)/.ready  ## what a GPU gives: texts, step times, graphs; eight minutes, without network; tiny sizes on a CPU
	$(BIN)/python -m recipes.gpu --json build/gpu.json

runtimes: $(VENV)/.ready build/runtimes/.ready  ## try the exported policies in other runtimes (needs npm and g++)
	BPKIT_RUNTIMES=all $(BIN)/python -m pytest tests/test_export_runtimes.py

build/runtimes/.ready: $(addprefix tests/runtimes/,install.sh package.json requirements.txt) docs/examples/runtimes/network.cpp
	PYTHON=$(BIN)/python tests/runtimes/install.sh
	touch $@

packages: build/packages/.ready  ## try what `bpkit new` makes, in an environment of its own with bpkit as a wheel
	PYTHON=build/packages/venv/bin/python sh tests/packages/wheel.sh
	build/packages/venv/bin/pip install --quiet --force-reinstall --no-deps build/packages/wheels/*.whl
	build/packages/venv/bin/python tests/packages/try_packages.py

vllm: build/vllm/.ready  ## try policies inside vLLM, in an environment of its own with vLLM's build for CPUs
	sh tests/vllm/run.sh python -m pytest tests/vllm

build/vllm/.ready: pyproject.toml $(addprefix tests/vllm/,install.sh requirements.txt)
	PYTHON=$(PYTHON) sh tests/vllm/install.sh
	touch $@

afternoon: build/packages/.ready  ## the road of a policy's author by the clock; writes docs/benchmarks/afternoon.json
	build/packages/venv/bin/python tests/packages/afternoon.py --json docs/benchmarks/afternoon.json

build/packages/.ready: pyproject.toml constraints.txt tests/packages/install.sh
	PYTHON=$(PYTHON) sh tests/packages/install.sh
	touch $@

exported: $(VENV)/.ready  ## export the shipped policies again: make exported TRACE=folder COST=costs.json
	$(BIN)/bpkit export forecast blockpilot ldlp ldlp_threshold specdecpp --trace $(TRACE) --cost $(COST) --recompute
	$(BIN)/bpkit export forecast:truncate=true --name forecast_truncate --trace $(TRACE) --cost $(COST) --recompute

docs: $(VENV)/.ready  ## the documentation as a site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

lint: $(VENV)/.ready  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
