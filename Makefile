# make quickstart   set everything up and run an adapter's whole life on a real 135M model
# make test         set everything up and run the tests          (make test-all: the slow ones, too)
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
# Tests use one worker per core; torch gets one thread in each.
WORKERS ?= auto

.PHONY: setup quickstart test test-all lint format bench clean

setup: $(READY)

$(READY): scripts/setup constraints.txt pyproject.toml
	scripts/setup $(VENV)
	touch $@

quickstart: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" examples/quickstart/run

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu"

test-all: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python tests/benchmarks/run.py

clean:
	rm -rf $(VENV) .cache build
