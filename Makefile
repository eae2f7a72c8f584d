# `make demo` and `make test` are all a newcomer needs: each makes its own environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NEWEST := .venv-newest

.PHONY: help demo test test-slow test-gpu test-browser test-hf-newest lint format typecheck bench bench-gpu bench-decode bench-train clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP) ## what LUCID does, in about three minutes on two cores
	$(BIN)/lucid demo

test: $(STAMP) lint typecheck ## everything but slow and GPU tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not gpu and not browser'

test-slow: $(STAMP) ## the tests that take longer
	$(BIN)/python -m pytest -m 'slow and not gpu and not browser'

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu -n 8 --dist loadgroup

test-browser: $(STAMP) ## `lucid inspect`'s page in a real browser: needs chromium or google-chrome (Debian: apt install chromium)
	$(BIN)/python -m pytest -m browser

test-hf-newest: ## the Hugging Face tests on the newest supported transformers, in an environment of its own
	$(PYTHON) -m venv $(NEWEST)
	grep -v '^transformers==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet -c $(NEWEST)/constraints.txt torch
	$(NEWEST)/bin/python -m pip install --quiet -c $(NEWEST)/constraints.txt -e '.[dev]' 'transformers==5.23.0'
	$(NEWEST)/bin/python -m pytest -n 2 -m 'not slow and not gpu and not browser' tests/hf

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP) ## mypy, strict, on the package
	$(BIN)/mypy

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## the CPU benchmark of the solve: CSV and plot in benchmarks/results
	$(BIN)/python -m benchmarks.solve

bench-decode: $(STAMP) ## the GPU benchmark of decoding beside softmax attention (needs a CUDA device)
	$(BIN)/python -m benchmarks.decode_gpu

bench-train: $(STAMP) ## the GPU benchmark of the 1B model's training step (needs a CUDA device)
	$(BIN)/python -m benchmarks.train_gpu

bench-gpu: $(STAMP) ## the GPU benchmark of the solve beside softmax attention (needs a CUDA device)
	$(BIN)/python -m benchmarks.solve_gpu

clean: ## remove the environments and caches (results/ stays)
	rm -rf $(VENV) $(NEWEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build dist
