# make help lists the targets. Everything runs in .venv, created on first use.
# VENV=<path> uses another environment (created if missing); VENV= the active one ($VIRTUAL_ENV, or the python on the PATH).

VENV ?= .venv
PYTHON ?= python3
# Workers of the tests; one thread each, which is fastest and steadiest for so small tensors.
JOBS ?= 2
PYTEST_ARGS ?=
GPU_ARGS ?=

# The stamp carries the name of this directory: one environment may serve several copies of the repository.
STAMP_NAME := .profit-installed$(subst /,-,$(CURDIR))
ifeq ($(strip $(VENV)),)
  ENVIRONMENT :=
  ifneq ($(strip $(VIRTUAL_ENV)),)
    PY := $(VIRTUAL_ENV)/bin/python
    STAMP := $(VIRTUAL_ENV)/$(STAMP_NAME)
  else
    PY := $(shell command -v python || command -v python3)
    # Not inside the environment, which may be the system's.
    STAMP := build/installed$(subst /,-,$(PY))
  endif
else
  PY := $(VENV)/bin/python
  ENVIRONMENT := $(PY)
  STAMP := $(VENV)/$(STAMP_NAME)
endif

CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')
PIP := PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip
DEMO := runs/digits_w4a4

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-isa gpu lint build install clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

demo: $(STAMP) ## train a 4-bit MobileNet on handwritten digits and write a report
	$(PY) -m profit train recipes/digits_w4a4.yaml --out $(DEMO) --resume
	@echo "Report: $(CURDIR)/$(DEMO)/report.html"

test: $(STAMP) ## the tests that are not marked slow
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-all: $(STAMP) ## all tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

ISA_TESTS := tests/ops tests/golden tests/profit/test_block.py tests/profit/test_block_training.py tests/profit/export

test-isa: $(STAMP) ## the tests that could depend on the processor, held to AVX2 and to baseline
	PROFIT_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 \
	    $(PY) -m pytest -n $(JOBS) --dist worksteal -m "not slow" -k "not triton and not test_static" $(PYTEST_ARGS) $(ISA_TESTS)
	PROFIT_CPU_ISA=baseline ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1 \
	    $(PY) -m pytest -n $(JOBS) --dist worksteal -m "not slow" -k "not triton and not test_static" $(PYTEST_ARGS) $(ISA_TESTS)

# Installs nothing and needs no network: it runs with the environment above where it exists, else with the python3 there is.
gpu: ## on a machine with a GPU: its tests and benchmarks, in 9 minutes; OUT=folder for the results
	@"$(if $(wildcard $(PY)),$(PY),$(PYTHON))" -m benchmarks gpu $(GPU_ARGS)

lint: $(STAMP) ## ruff, as configured in pyproject.toml
	$(PY) -m ruff check .

install: $(STAMP) ## the environment, with the package and all it needs

build: $(STAMP) ## the C++ kernels; only what changed is compiled
	$(PY) setup.py -q build_ext --inplace

clean: ## remove what was built, not the environment and not the runs
	rm -rf build dist *.egg-info profit_kernels/_cpu.*.so profit_kernels/_build_info.json .pytest_cache .ruff_cache .hypothesis
	rm -f "$(STAMP)"
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Installs once. After a change of the sources alone, only the kernels are compiled again.
# torch first: the kernels are compiled against the torch they will run under, hence --no-build-isolation.
$(STAMP): pyproject.toml setup.py $(CSRC) | $(ENVIRONMENT)
	@test -x "$(PY)" || { echo "error: no python found; install Python 3.11 or later, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(call require_python,$(PY))
	@$(PY) -m pip --version > /dev/null 2>&1 || { echo "error: $(PY) has no pip; run '$(PY) -m ensurepip', or use the default VENV=.venv" >&2; exit 1; }
	@echo "$(if $(filter-out $(CSRC),$?),Installing into $(PY:/bin/python=): a few minutes the first time,Compiling the C++ kernels)"
	@$(if $(filter-out $(CSRC),$?),\
	    $(call pip_install,"torch>=2.11" "setuptools>=77" wheel ninja) && \
	    echo "Compiling the C++ kernels; installing what training and the tests need" && \
	    $(call pip_install,--no-build-isolation -e ".[dev]"),\
	    $(PY) setup.py -q build_ext --inplace)
	@$(PY) -c "from profit_kernels import native; print(native.why_missing() or f'C++ kernels: ready ({native.isa()})')"
	@mkdir -p "$(dir $@)" && touch "$@"

# A checkout whose build outputs were removed is not installed, whatever the stamp says.
ifeq ($(wildcard profit_kernels/_build_info.json),)
$(STAMP): not-built
.PHONY: not-built
not-built:
endif

ifneq ($(ENVIRONMENT),)
$(ENVIRONMENT):
	@command -v "$(PYTHON)" > /dev/null || { echo "error: '$(PYTHON)' not found; install Python 3.11 or later, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(call require_python,$(PYTHON))
	@$(PYTHON) -c "import venv, ensurepip" 2> /dev/null || { echo "error: $(PYTHON) cannot create environments; install its venv module (Debian, Ubuntu: apt install python3-venv), or use an environment of your own: make VENV=/path/to/it" >&2; exit 1; }
	$(PYTHON) -m venv "$(VENV)"
endif

# pip tells what it downloads, with progress bars on a terminal. Only its warnings of package locations that do not exist, one a
# package where a configuration names some, are left out; what fails is pip's exit status, not that of the filter.
define pip_install
{ { status=$$({ { $(PIP) install $(1) < /dev/null 2>&1 >&3 3>&-; echo $$? >&4; } | \
    sed '/^WARNING: Location .* is ignored/d' >&2; } 4>&1); } 3>&1; [ "$$status" = 0 ]; }
endef

define require_python
$(1) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("error: Python 3.11 or later is needed, $(1) is %d.%d; name another: make PYTHON=/path/to/python3.11" % v[:2])'
endef
