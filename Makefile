# `make demo` and `make test` need nothing but Python (3.10 to 3.13) and make: they create what they need in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo notebooks test lint types unit docs clean

demo: $(VENV)/.installed
	$(BIN)/python examples/compare.py

# Executes examples/notebooks/*.ipynb, and saves them with their outputs.
notebooks: $(VENV)/.installed
	$(BIN)/python examples/notebooks/execute.py

test: lint types unit docs

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

# Unit, multi-process and trainer tests, and the doctests of the package.
# And those of the trainer once more for a program that imports `pytorch_lightning`.
unit: $(VENV)/.installed
	$(BIN)/python -m pytest
	$(BIN)/python tests/other_namespace.py tests/strategies/test_powersgd.py tests/strategies/test_launch.py

docs: $(VENV)/.installed
	$(BIN)/sphinx-build -W --keep-going docs docs/_build

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[examples,tests,docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build docs/jupyter_execute docs/notebooks demo_results
