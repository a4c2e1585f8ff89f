# The only two commands of a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.meditron-train-installed
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := pyproject.toml constraints.txt setup.py $(shell find csrc -type f)

.PHONY: help install demo test test-gpu test-slurm faults bench lint format docs docs-check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        the Meditron experiment in miniature, on the CPU, in a few minutes"
	@echo "make test        all tests (PYTEST_ARGS='-k layout' for some)"
	@echo "make test-gpu    the tests that need a GPU"
	@echo "make test-slurm  a Slurm cluster on this machine and the short fault campaign on it (as root)"
	@echo "make faults      the long fault campaign, an hour or more; writes its table into docs/reliability.md"
	@echo "make bench       the measurements of docs/benchmarks.md"
	@echo "make lint        ruff, mypy, clang-format and shellcheck"
	@echo "make format      let ruff and clang-format write the layout of the code"
	@echo "make docs        check every command and file the documents name"
	@echo "make install     only make $(VENV)"
	@echo "make clean       remove what was built"

install: $(INSTALLED)

# The stamp depends on everything that changes what is installed, so that a pull is followed by a rebuild.
$(INSTALLED): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is too old: Python 3.10 or newer is needed; write: make PYTHON=python3.11 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch  # csrc/ is built against it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/meditron-train demo

# On the CPU also where there is a GPU, as megatron-core would use it; what needs one is for test-gpu.
test: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-gpu: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu $(PYTEST_ARGS)

# Slurm comes from Debian's packages where this may install them; elsewhere the tests say why they are skipped.
test-slurm: $(INSTALLED)
	$(BIN)/python -m tests.slurm.cluster install
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm -m slurm -rs $(PYTEST_ARGS)

faults: $(INSTALLED)
	$(BIN)/python -m tests.slurm.cluster install
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m tests.faults.campaign faults.jsonl
	$(BIN)/python -m tests.faults.table faults.jsonl --write

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.data_loading
	$(BIN)/python -m benchmarks.fused
	$(BIN)/python -m benchmarks.train_step

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/shellcheck -x launch/*.sh launch/*.sbatch .ci/run

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

docs: docs-check

docs-check: $(INSTALLED)
	$(BIN)/python -m tests.docs_check

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find meditron_train -name '*.so' -delete
	rm -f $(INSTALLED)
