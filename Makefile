# make quickstart    train, measure, slice and search a small model (about ten minutes on two cores)
# make test          every test
# make lint          ruff

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test lint clean

quickstart: $(INSTALLED)
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The marker file, not the folder: an interrupted installation is repeated.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --constraint constraints.txt --group dev --editable .
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build runs
