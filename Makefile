# `make demo` and `make test` set everything up themselves; nothing outside .venv is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CUDA ?= 13
STAMP := $(VENV)/.installed
NATIVE := $(shell find kernels/csrc -type f) CMakeLists.txt
SOURCES := core kernels models cli benchmarks tests setup.py __init__.py

.PHONY: setup demo test lint format docs bench gpu clean

setup: $(STAMP) kernels/libmien.so

$(STAMP): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
ifeq ($(CUDA),12)
	$(BIN)/pip uninstall --quiet --yes nvidia-dali-cuda130
	$(BIN)/pip install --quiet --disable-pip-version-check 'nvidia-dali-cuda120>=2.4,<2.5'
endif
	$(BIN)/pip install --quiet --disable-pip-version-check 'setuptools>=77' 'cmake>=3.25' ninja
	touch $@

kernels/libmien.so: $(NATIVE) $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: setup
	$(BIN)/mien demo

# Two processes of one thread each: most tests have work for one thread only.
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/clang-format --dry-run --Werror $(shell find kernels/csrc tests/cuda_on_cpu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i $(shell find kernels/csrc tests/cuda_on_cpu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

docs: setup
	$(BIN)/python -m mien.cli.settings_page > docs/settings.md

bench: setup
	$(BIN)/mien bench all

# On a machine with a GPU: every test that uses one, each file in a process of its own (a failed capture
# can spoil those after it), then every benchmark. GPU_PYTHON=python3 where mien is installed already.
GPU_PYTHON ?= $(BIN)/python
gpu:
	status=0; for file in $$(grep -lE 'mark.gpu|triton_device' tests/test_*.py); do \
	    $(GPU_PYTHON) -m pytest -q $$file || status=1; done; exit $$status
	for part in ceilings kernels step train data roofline models; do \
	    $(GPU_PYTHON) -m mien.cli bench $$part || exit 1; done

clean:
	rm -rf build dist *.egg-info kernels/libmien.so
