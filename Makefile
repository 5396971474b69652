# `make demo` and `make test` need python3 >= 3.11 with venv, a C++17 compiler and make; the rest is
# installed into .venv. The second run of anything is quick.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# $(call step,what it does and about how long that takes,command): says the first, runs the second, says how long it took.
comma := ,
step = echo "$(strip $(1))"; began=$$(date +%s); { $(2); } && echo "  done in $$(($$(date +%s) - began)) s"

# torch: the CPU build, so that nothing pulls gigabytes of CUDA unasked. On a GPU machine:
#   make demo TORCH="torch==2.13.0 triton==3.7.1" TORCH_INDEX=https://download.pytorch.org/whl/cu130
# Building the GPU kernels of csrc/cuda: TWINFLOW_CUDA=AUTO (default: where nvcc is found), ON or OFF.
TORCH       ?= $(if $(filter Linux,$(shell uname -s)),torch==2.13.0+cpu,torch==2.13.0)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Processes that the tests run in; 0: this one alone.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(os.cpu_count(), 4))")

PROMPT ?= a blue circle left of a red square
OUT    ?= demo.png

NATIVE := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml

.PHONY: build demo test bench lint lint-cpp lock audit sanitize leaks check-packaging check-bounds clean
build: $(VENV)/.built

demo: $(VENV)/.built
	@echo "drawing \"$(PROMPT)\" with the model that ships along, into $(OUT)"
	@$(BIN)/twinflow-rt generate "$(PROMPT)" --seed 0 -o $(OUT)

test: $(VENV)/.built $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS)

bench: $(VENV)/.built $(VENV)/.test
	$(BIN)/python -m pytest benches --benchmark-only -o testpaths=benches -o python_files='bench_*.py' --benchmark-max-time=0.5

lint: $(VENV)/.lint $(VENV)/.test lint-cpp
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

CPP := $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.c')
TIDY := csrc/cpu/dispatch.cpp csrc/cpu/kernels.cpp csrc/bindings.cpp
X86  := $(if $(filter x86_64,$(shell uname -m)),-DTWINFLOW_X86)
INCLUDES = $(shell $(BIN)/python -c "import pybind11, sysconfig; \
  print('-isystem', pybind11.get_include(), '-isystem', sysconfig.get_path('include'))")
LIBTORCH = $(shell $(BIN)/python -c "import torch.utils.cpp_extension as c; \
  print(*(f'-isystem {path}' for path in c.include_paths()))" 2>/dev/null)
STB := $(addprefix -isystem ,$(wildcard /usr/include/stb))

# csrc/embed: Debian's nlohmann-json3-dev and libstb-dev are needed (docs/embedding.md).
lint-cpp: $(VENV)/.lint
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/clang-tidy --quiet $(TIDY) -- -std=c++17 -fopenmp -Icsrc/include -Icsrc/cpu $(INCLUDES) \
	  $(X86) -DTWINFLOW_ISA=twinflow_kernels_baseline
	$(BIN)/clang-tidy --quiet $(wildcard csrc/embed/src/*.cpp) -- -std=c++17 -Icsrc/embed/include $(LIBTORCH) $(STB)

# The native CPU kernels under the address, undefined-behaviour and thread sanitizers; minutes.
sanitize: $(VENV)/.built $(VENV)/.test
	mkdir -p build/sanitize
	PYTHON=$(BIN)/python sh tests/native/sanitize.sh all build/sanitize

# 2,000 generations: memory and open files stay where they are; minutes.
leaks: $(VENV)/.built $(VENV)/.test
	$(BIN)/python -m tests.reliability.leaks

# The versions that tests run with; UPGRADE=--upgrade takes the newest, else only what pyproject.toml asks for changes.
lock: $(VENV)/.lint
	echo "$(TORCH)" | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes $(UPGRADE) \
	  $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--extra-index-url $(TORCH_INDEX)) --extra test \
	  --no-emit-package torch --custom-compile-command "make lock" pyproject.toml - --output-file requirements/test.lock

# Known vulnerabilities of those versions, as PyPI's advisories (AUDIT=pypi) or osv.dev's (AUDIT=osv) have them; a
# package that the service knows nothing about fails. Needs that service: a plain mirror of PyPI has no advisories.
AUDIT ?= pypi
audit: $(VENV)/.lint
	$(BIN)/pip-audit --vulnerability-service $(AUDIT) --strict --disable-pip --require-hashes --requirement requirements/test.lock

# The lowest and the newest versions that pyproject.toml allows, each in a fresh environment; downloads gigabytes.
check-bounds: $(VENV)/.built $(VENV)/.lint
	$(BIN)/python tests/check_bounds.py

# Every way to install the package, each in a fresh environment; minutes, so not part of `test`.
check-packaging: $(VENV)/.built $(VENV)/.test
	$(BIN)/python tests/check_packaging.py

clean:
	rm -rf $(VENV) build dist *.egg-info twinflow_rt/_native*.so twinflow_rt/libtwinflow_cuda.so

# A wheel that pip finds by itself (PIP_FIND_LINKS, a mirror) comes first, then PyTorch's own index.
$(VENV)/.torch:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'python 3.11 or newer is needed: make PYTHON=...')"
	@$(call step,1 of 3: making a virtual environment in $(VENV)$(comma) seconds,$(PYTHON) -m venv $(VENV))
	@$(call step,2 of 3: installing $(TORCH)$(comma) minutes if it has to be downloaded, \
	  $(PIP) $(TORCH) 2>/dev/null || $(PIP) --extra-index-url $(TORCH_INDEX) $(TORCH))
	@touch $@

# Editable: Python changes need no rebuild, native sources are rebuilt when they change.
$(VENV)/.built: $(VENV)/.torch $(NATIVE)
	@$(call step,3 of 3: compiling twinflow_rt's C++ kernels$(comma) minutes,$(PIP) --editable .)
	@touch $@

# What an extra needs, without another build of the project: the tests' from the lock, which names all but torch.
$(VENV)/.test: $(VENV)/.torch requirements/test.lock
	@$(call step,installing what 'test' needs$(comma) minutes if it has to be downloaded, \
	  $(PIP) --no-deps --require-hashes --requirement requirements/test.lock)
	@touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	@$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['lint'], sep='\n')" > $@.txt
	@$(call step,installing what 'lint' needs,$(PIP) --requirement $@.txt)
	@touch $@
