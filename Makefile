# The only two commands of a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Containers often turn bytecode files off. Then each of the hundreds of processes of a test run, and each rank of the
# demo, compiles the whole package again.
export PYTHONDONTWRITEBYTECODE :=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.meditron-train-installed
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := pyproject.toml constraints.txt setup.py $(shell find csrc -type f)

.PHONY: help install demo test browser test-long test-wheel test-bounds test-gpu gpu test-slurm faults bench lint format docs docs-check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        the Meditron experiment in miniature, on the CPU, in a few minutes"
	@echo "make test        the tests, less the long ones (PYTEST_ARGS='-k layout' for some)"
	@echo "make test-long   the long ones: emulated kernels, fuzzing, kills, faults on ranks, more layouts, rarer cases"
	@echo "make test-wheel  the wheel alone in a clean environment: doctor, train, resume, convert, generate"
	@echo "make test-bounds the same with the lowest and the newest versions that pyproject.toml allows (gigabytes)"
	@echo "make browser     Chromium, for the tests that open a page in it (as root on Debian; they are skipped without)"
	@echo "make test-gpu    the tests that need a GPU"
	@echo "make gpu         every figure that one GPU can give, in nine minutes (GPU_OUT=folder, GPU_ARGS=--tiny on a CPU)"
	@echo "make test-slurm  a Slurm cluster on this machine and the short fault campaign on it (as root)"
	@echo "make faults      the long fault campaign, an hour or more; writes its table into docs/explanation/reliability.md"
	@echo "make bench       the measurements of docs/evidence/benchmarks.md"
	@echo "make lint        ruff, mypy, clang-format and shellcheck"
	@echo "make format      let ruff and clang-format write the layout of the code"
	@echo "make docs        the documentation as a site in build/docs, without a warning"
	@echo "make docs-check  check every command and file the documents name, and run what is marked to be run"
	@echo "make install     only make $(VENV)"
	@echo "make clean       remove what was built"

install: $(INSTALLED)

# The stamp depends on everything that changes what is installed, so that a pull is followed by a rebuild.
$(INSTALLED): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is too old: Python 3.11 or newer is needed; write: make PYTHON=python3.11 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch  # csrc/ is built against it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/meditron-train demo

# On the CPU also where there is a GPU, as megatron-core would use it; what needs one is for test-gpu. Two tests run at a
# time; tests/conftest.py says which stay together.
test: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-long: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -n 2 $(PYTEST_ARGS)

test-wheel: $(INSTALLED)
	$(BIN)/python -m tests.wheel.install pinned

test-bounds: $(INSTALLED)
	$(BIN)/python -m tests.wheel.install lowest newest

browser: $(INSTALLED)
	$(BIN)/python -m tests.browser install

test-gpu: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu $(PYTEST_ARGS)

GPU_OUT ?= build/gpu
gpu: $(INSTALLED)
	PYTHON=$(abspath $(BIN)/python) benchmarks/gpu/run.sh $(GPU_OUT) $(GPU_ARGS)

# Slurm comes from Debian's packages where this may install them; elsewhere the tests say why they are skipped.
test-slurm: $(INSTALLED)
	$(BIN)/python -m tests.slurm.cluster install
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm -m slurm -rs $(PYTEST_ARGS)

faults: $(INSTALLED)
	$(BIN)/python -m tests.slurm.cluster install
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m tests.faults.campaign faults.jsonl
	$(BIN)/python -m tests.faults.table faults.jsonl --write

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.planning
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.data_loading
	$(BIN)/python -m benchmarks.fused
	$(BIN)/python -m benchmarks.train_step

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/shellcheck -x launch/*.sh launch/*.sbatch benchmarks/gpu/*.sh .ci/run

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

docs-check: $(INSTALLED)
	$(BIN)/python -m tests.docs_check

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find meditron_train -name '*.so' -delete
	rm -f $(INSTALLED)
