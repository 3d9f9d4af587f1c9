# make demo: rebuild eight photographs from the gradient that a simulated client shares, and write a report
# make test: lint, types, and the whole test suite
# make faults: kill, interrupt and starve real runs, and see that nothing is lost
# make fuzz: at least 100,000 generated inputs to the parsers, counted in docs/reliability/; make -j2 fuzz on two cores
# make oldest, make newest: the test suite with the oldest versions that pyproject.toml allows, and with the newest there are
# make constraints: constraints.txt anew, from the versions of make test
# make docs: the documentation as a site, in site/
# make sbom, make audit-dependencies: what is installed (CycloneDX), and what is known to be vulnerable in it (needs a network)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

TOOLS := .venv-tools
#: Inputs of a parser whose share is 1 (tests/fuzz/conftest.py): by Hypothesis, and by changing bytes of good files
FUZZ_HYPOTHESIS ?= 2500
FUZZ_MUTATIONS ?= 10000
FUZZ_SEED := $(or $(FUZZ_SEED),$(shell date +%s))

.PHONY: demo test faults fuzz fuzz-hypothesis fuzz-mutations oldest newest constraints docs sbom audit-dependencies clean

demo: $(VENV)/.installed
	$(BIN)/gradleak audit --out demo --force

test: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile

faults: $(VENV)/.installed-test
	$(BIN)/python tests/faults.py --json docs/reliability/faults.json
fuzz: fuzz-hypothesis fuzz-mutations

fuzz-hypothesis fuzz-mutations: fuzz-%: $(VENV)/.installed-test
	mkdir -p docs/reliability
	GRADLEAK_FUZZ_EXAMPLES=$(if $(filter hypothesis,$*),$(FUZZ_HYPOTHESIS),$(FUZZ_MUTATIONS)) \
	GRADLEAK_FUZZ_COMMAND="make $@ FUZZ_HYPOTHESIS=$(FUZZ_HYPOTHESIS) FUZZ_MUTATIONS=$(FUZZ_MUTATIONS) FUZZ_SEED=$(FUZZ_SEED)" \
	GRADLEAK_FUZZ_REPORT=docs/reliability/$@.json \
	$(BIN)/pytest tests/fuzz -k "$(if $(filter hypothesis,$*),not )mutations" --hypothesis-seed=$(FUZZ_SEED)

oldest:
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet 'tomli; python_version < "3.11"'
	.venv-oldest/bin/python tools/lower_bounds.py test > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt '.[test]'
	.venv-oldest/bin/python -m pip uninstall --quiet --yes gradleak
	PYTHONPATH=$(CURDIR)/src .venv-oldest/bin/python -m pytest

newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --editable '.[test]'
	.venv-newest/bin/python -m pip freeze --exclude-editable
	.venv-newest/bin/python -m pytest

constraints: $(VENV)/.installed-test
	{ sed -n '/^[^#]/q;p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep '=='; } > .constraints.new
	mv .constraints.new constraints.txt

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

sbom: $(VENV)/.installed $(TOOLS)/.installed
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-format JSON --output-file sbom.json $(BIN)/python

audit-dependencies: $(VENV)/.installed $(TOOLS)/.installed
	$(BIN)/python -m pip freeze --exclude-editable > $(TOOLS)/installed.txt
	$(TOOLS)/bin/pip-audit --strict --disable-pip --no-deps --requirement $(TOOLS)/installed.txt || \
	{ code=$$?; echo "audit-dependencies: see above: a package is known to be vulnerable, or pypi.org could not be asked about it" >&2; exit $$code; }

$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet cyclonedx-bom pip-audit
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test,frameworks]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) $(TOOLS) .venv-oldest .venv-newest demo site sbom.json
