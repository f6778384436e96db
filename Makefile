# `make quickstart` and `make test` are all that a fresh machine with Python >= 3.11 and make needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Many tests wait for servers and browsers, so three processes keep two cores busy.
JOBS ?= 3

# Every package has the release that constraints.txt names. An empty CONSTRAINTS resolves anew.
CONSTRAINTS ?= constraints.txt
INSTALL = $(BIN)/python -m pip install $(if $(CI),--quiet) $(CONSTRAINTS:%=--constraint %)
# The tests of GPUs need a second ONNX Runtime, which cannot be beside the one for CPUs.
GPU_RUNTIME = 'onnxruntime-gpu>=1.25; platform_system == "Linux" and platform_machine == "x86_64"'
OPENVINO = tests/exporters/openvino/test_exporter.py
FAST = $(addprefix tests/,data artefacts checkpoints cli project/test_imports.py project/test_faces.py)
TESTS = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: quickstart test test-fast test-stress test-latest docs constraints lint clean

quickstart: $(VENV)/.runtime
	$(BIN)/python tools/quickstart.py

# OpenVINO ends a process that has run the other tests, so its file has a process of its own.
test: $(VENV)/.test
	$(TESTS) $(OPENVINO) > $(VENV)/openvino.log 2>&1 & openvino=$$!; \
	$(TESTS) -n $(JOBS) --dist worksteal -m 'not stress' --ignore $(OPENVINO); tests=$$?; \
	wait $$openvino; openvino=$$?; cat $(VENV)/openvino.log; exit $$((tests || openvino))

test-fast: $(VENV)/.test
	$(TESTS) -n $(JOBS) --dist worksteal -m 'not slow and not stress' $(FAST)

test-stress: $(VENV)/.test
	$(TESTS) -m stress

test-latest:
	rm -rf .venv-latest
	$(MAKE) test VENV=.venv-latest CONSTRAINTS=

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

constraints:
	$(MAKE) .venv-latest/.lint VENV=.venv-latest CONSTRAINTS=
	{ .venv-latest/bin/python -m pip freeze --all --exclude-editable; \
	  .venv-latest/bin/python -m pip freeze --path .venv-latest/onnxruntime-gpu; } > constraints.txt

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.runtime: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed")'
	@echo 'Installing into $(VENV). New packages on Linux, x86-64:     download   on disk'
	@echo '  torch                                                   0.6 GB    1.1 GB'
	@echo '  the CUDA libraries and triton that torch requires       2.5 GB    4.3 GB'
	@echo '  onnxruntime, timm, scikit-learn and 40 others           0.2 GB    0.5 GB'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade 'pip>=25.3'
	$(INSTALL) $(CONSTRAINTS:%=--build-constraint %) --editable '.[train,cpu,serve]'
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	@echo 'Installing what the tests need: 1.8 GB on disk.'
	$(INSTALL) $(CONSTRAINTS:%=--build-constraint %) --editable '.[all]' --group test
	$(INSTALL) --no-deps --upgrade --target $(VENV)/onnxruntime-gpu $(GPU_RUNTIME)
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(INSTALL) --group lint
	@touch $@

clean:
	rm -rf $(VENV) .venv-latest build dist runs site
