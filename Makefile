# make demo   sets up, and converts the example models
# make test   sets up, and runs the tests
# make lint   sets up, and checks style and types
PYTHON ?= python3
VENV ?= .venv
OUT ?= out/demo
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint setup clean

demo: $(VENV)/examples
	$(BIN)/python scripts/convert.py examples/models.yaml -o $(OUT) --jobs $(JOBS)
	@echo "The reports: $(OUT)/index.html"

test: $(VENV)/examples
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/examples

$(VENV)/ready: pyproject.toml constraints.txt bridge/runtime/_launch.pyx
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[rtx,examples,test]'
	@touch $@

$(VENV)/examples: $(VENV)/ready examples/requirements-no-deps.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r examples/requirements-no-deps.txt
	@touch $@

clean:
	rm -rf $(VENV) out
