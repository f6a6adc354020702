# SPDX-License-Identifier: MIT
# Everything happens in .venv, which the first target that needs it makes. `make` lists the targets.

PYTHON ?= python3
VENV   ?= .venv

bin    := $(VENV)/bin
python := $(bin)/python
pip    := $(python) -m pip install -qq --disable-pip-version-check
cpp    := $(shell find csrc examples tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help build demo test test-all lint format bench peers cuda-report clean
.PHONY: docs dist test-wheel

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The pinned packages, once for every change of the pins. --no-compile: Python compiles what it imports, not all of it.
$(VENV)/packages: requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  f"ffm_ext needs Python 3.10 or newer; $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.12")'
	@echo "installing requirements/dev.txt into $(VENV): a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@$(pip) --no-compile -r requirements/dev.txt
	@touch $@

# Makes `import ffm_ext` and `ffm-ext` work from anywhere, once for every change of the metadata.
$(VENV)/editable: $(VENV)/packages pyproject.toml
	@$(pip) --no-deps --no-build-isolation -e .
	@touch $@

build: $(VENV)/packages ## compile what has changed (ninja decides)
	@$(python) setup.py --quiet build_ext --inplace
	@$(MAKE) -s --no-print-directory $(VENV)/editable

demo: build ## train and time an FFM on data that comes with the package: half a minute once it is built
	$(python) -m ffm_ext demo

test: build ## the quick tests
	$(python) -m pytest -m "not slow" -n auto --maxprocesses 8 --dist worksteal

test-all: build ## every test
	$(python) -m pytest

lint: build ## ruff, mypy, clang-format, and the rules of csrc/
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/clang-format --dry-run -Werror $(cpp)
	$(python) tools/check_csrc.py
	$(bin)/validate-pyproject pyproject.toml
	$(bin)/check-manifest -q --no-build-isolation

format: $(VENV)/packages ## let ruff and clang-format lay out the code
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cpp)

docs: build ## the documentation site, in build/docs: warnings are errors, links are checked (Python 3.11 or newer)
	$(bin)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs
	$(bin)/linkchecker --config docs/linkchecker.ini --no-status build/docs/index.html

# In build environments of their own, as a user's pip has it, but with the pinned versions.
dist: $(VENV)/packages ## sdist, and a wheel from it, in dist/
	rm -rf dist
	PIP_CONSTRAINT=$(abspath requirements/dev.txt) $(python) -m build
	$(bin)/check-wheel-contents dist/*.whl

test-wheel: dist ## install that wheel in clean environments: extras, no compiler, two other torches (13 GB)
	FFM_EXT_WHEEL=$$(echo $(abspath dist)/*.whl) $(python) -m pytest tests/test_wheel.py

bench: build ## measure against the peers that are installed (ARGS=--quick: less); results in benchmark_results/
	$(python) -m benchmarks $(ARGS)

peers: $(VENV)/packages ## install the peers that `make bench` measures against
	PYTHON=$(abspath $(python)) benchmarks/install_peers.sh

cuda-report: ## build for CUDA; registers, shared memory and occupancy of each kernel
	@FFM_EXT_CUDA=1 $(MAKE) -s --no-print-directory build
	@$(python) tools/cuda_report.py

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info ffm_ext/*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
