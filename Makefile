# make quickstart    fine-tune the shipped model on your code, compare it with before, slice and search
# make test-fast     the quick tests (under a minute on two cores): what to run while editing
# make test          every test
# make fuzz          changed files for every reader; ARGS="--count 20000 --readers config,index"
# make faults        full disk, SIGTERM, SIGKILL and a read-only folder for every command that writes
# make lint          ruff, who may import whom, types
# make format        let ruff mend what it can
# make test-common   transformers' own common tests on our models (fetched from PyPI once)
# make docs          the documentation site, in build/docs
# make lint-modeling transformers' linter of model files
# make bench         every benchmark, and the table in benchmarks/README.md (hours; MOSE_DATA=folder for real rows)
# make bench-quick   fails if a ratio of small shapes is 1.3 times worse than the committed one (minutes)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two processes of one thread each: tests are too small for more threads, and OMP's would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: docs quickstart test test-fast test-common fuzz faults bench bench-quick lint format lint-modeling clean

quickstart: $(INSTALLED)
	$(BIN)/python examples/quickstart.py $(ARGS)

test-fast: $(INSTALLED)
	$(PYTEST) -q -m "not slow" --ignore=tests/common $(ARGS)

test: $(INSTALLED)
	$(MAKE) test-common ARGS=
	$(PYTEST) --ignore=tests/common $(ARGS)

test-common: $(INSTALLED)
	$(BIN)/python -m tests.common.prepare
	$(PYTEST) -q -rs tests/common $(ARGS)

fuzz faults: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz.$@ $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/docs $(ARGS)

lint-modeling: $(INSTALLED)
	$(BIN)/python -m tests.common.structure

bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group bench
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-quick: $(INSTALLED)
	$(BIN)/python benchmarks/run.py --quick $(ARGS)

# The marker file, not the folder: an interrupted installation is repeated.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --constraint constraints.txt --group dev --editable .[all]
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) .cache/transformers-tests build runs
