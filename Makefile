# make quickstart    train, measure, slice and search a small model (under ten minutes on two cores)
# make test          every test
# make test-common   transformers' own common tests on our models (fetched from PyPI once)
# make bench         every benchmark, and the table in benchmarks/README.md (hours; MOSE_DATA=folder for real rows)
# make bench-quick   ratios that guard against regressions (under three minutes on two cores)
# make lint          ruff
# make lint-modeling transformers' linter of model files

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two processes of one thread each: tests are too small for more threads, and OMP's would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

.PHONY: quickstart test test-common bench bench-quick lint lint-modeling clean

quickstart: $(INSTALLED)
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) test-common ARGS=
	$(PYTEST) --ignore=tests/common $(ARGS)

test-common: $(INSTALLED)
	$(BIN)/python -m tests.common.prepare
	$(PYTEST) -q -rs tests/common $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group bench
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-quick: $(INSTALLED)
	$(BIN)/python benchmarks/run.py --quick $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint-modeling: $(INSTALLED)
	$(BIN)/python -m tests.common.structure

# The marker file, not the folder: an interrupted installation is repeated.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --constraint constraints.txt --group dev --editable .
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) .cache/transformers-tests build runs
