# `make demo` and `make test` need nothing but python3 >= 3.11, a C++17 compiler and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# torch: the CPU build, so that nothing pulls gigabytes of CUDA unasked. On a GPU machine:
#   make demo TORCH="torch==2.13.0 triton==3.7.1" TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH       ?= $(if $(filter Linux,$(shell uname -s)),torch==2.13.0+cpu,torch==2.13.0)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP         := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PROMPT      ?= a red circle above a blue square
OUT         ?= demo.png

SOURCES := $(shell find twinflow_rt kernels csrc -type f -not -name '*.pyc' 2>/dev/null) pyproject.toml setup.py CMakeLists.txt

.PHONY: demo test bench lint clean check-packaging
demo: $(VENV)/.built
	$(BIN)/twinflow-rt generate "$(PROMPT)" --seed 0 -o $(OUT)

test: $(VENV)/.built $(VENV)/.test
	$(BIN)/python -m pytest

bench: $(VENV)/.built $(VENV)/.test
	$(BIN)/python -m pytest benches --benchmark-only -o testpaths=benches

lint: $(VENV)/.torch
	$(PIP) "ruff>=0.8" && $(BIN)/ruff check .

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"
	$(PIP) --retries 1 --timeout 15 --extra-index-url $(TORCH_INDEX) $(TORCH)
	touch $@

# Editable: Python changes need no rebuild; the native extension is rebuilt when its sources change.
$(VENV)/.built: $(VENV)/.torch $(filter-out %.py,$(SOURCES)) setup.py
	@echo "building twinflow-rt"
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.built pyproject.toml
	@echo "installing the test dependencies"
	$(PIP) --editable ".[test]"
	touch $@

# Every way a user may install it, each in a fresh environment; minutes, so not part of `make test`.
check-packaging:
	$(PYTHON) tests/check_packaging.py

clean:
	rm -rf $(VENV) build dist *.egg-info twinflow_rt/_native*.so twinflow_rt/libtwinflow*.so
