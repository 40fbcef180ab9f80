# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

MINUTES ?= 60

.PHONY: demo test test-all lint bench gpu clean

demo: $(VENV)/ready
	$(BIN)/fastdistill demo --output demo-output --overwrite

# Two workers of one thread each: the tests are many small tensors.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready-for-bench
	$(BIN)/python -m pytest bench --benchmark-only --results bench/results

# On a machine with a GPU, in an environment that has the library: nothing is installed.
gpu:
	$(PYTHON) -m bench.gpu --out gpu-results --minutes $(MINUTES)

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[train,triton,dev]"
	touch $@

$(VENV)/ready-for-bench: $(VENV)/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[bench]"
	touch $@

clean:
	rm -rf $(VENV)
