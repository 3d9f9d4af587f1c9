# make demo: rebuild eight photographs from the gradient that a simulated client shares, and write a report
# make test: lint, types, and the whole test suite
# make faults: kill, interrupt and starve real runs, and see that nothing is lost
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test faults clean

demo: $(VENV)/.installed
	$(BIN)/gradleak audit --out demo --force

test: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest

faults: $(VENV)/.installed-test
	$(BIN)/python tests/faults.py --json docs/reliability/faults.json

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) demo
