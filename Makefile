# `make quickstart` and `make test` are all that a fresh machine with Python >= 3.11 and make needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

# Every package has the release that constraints.txt names. An empty CONSTRAINTS resolves anew.
CONSTRAINTS ?= constraints.txt
INSTALL = $(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=--constraint %)
TESTS = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: quickstart test test-latest docs constraints lint clean

quickstart: $(VENV)/.runtime
	$(BIN)/python tools/quickstart.py

test: $(VENV)/.test
	$(TESTS) -n $(JOBS) --dist worksteal --ignore tests/exporters/openvino/test_exporter.py
	$(TESTS) tests/exporters/openvino/test_exporter.py  # OpenVINO ends a process that has run the others

test-latest:
	rm -rf .venv-latest
	$(MAKE) test VENV=.venv-latest CONSTRAINTS=

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

constraints:
	$(MAKE) .venv-latest/.lint VENV=.venv-latest CONSTRAINTS=
	.venv-latest/bin/python -m pip freeze --all --exclude-editable > constraints.txt

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.runtime: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade 'pip>=25.3'
	$(INSTALL) $(CONSTRAINTS:%=--build-constraint %) --editable '.[cpu]'
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(INSTALL) --group test
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(INSTALL) --group lint
	touch $@

clean:
	rm -rf $(VENV) .venv-latest build dist runs site
