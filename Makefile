# On a fresh machine, `make demo` and `make test` do all the set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

MINUTES ?= 60

.PHONY: demo test test-all lint packages hub docs bench gpu clean

demo: $(VENV)/ready
	$(BIN)/fastdistill demo --output demo-output --overwrite

# The tests compute on many small tensors, so two workers of one thread each are fastest on two cores.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds the site in site/. Broken links are errors. The variable hides the theme's notice about its successor.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The oldest and the newest Python and torch that pyproject.toml allows: INTERPRETER=TORCH, or the newest torch.
PACKAGES ?= python3.10=2.10.0 python3.13
packages: $(VENV)/ready
	$(BIN)/python tests/packages.py $(PACKAGES)

# A kernel of the Hugging Face hub, in dist/hub.
hub:
	$(PYTHON) tests/hub.py dist/hub

bench: $(VENV)/ready-for-bench
	$(BIN)/python -m pytest bench --benchmark-only --results bench/results

# For a machine with a GPU and an environment that has the library. This target installs nothing.
gpu:
	$(PYTHON) -m bench.gpu --out gpu-results --minutes $(MINUTES)

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[train,integrations,triton,dev,docs]"
	touch $@

$(VENV)/ready-for-bench: $(VENV)/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[bench]"
	touch $@

clean:
	rm -rf $(VENV)
