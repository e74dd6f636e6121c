# Every target builds .venv first if it is missing. `make demo` and `make test` need nothing but Python ≥ 3.11, make, gcc and git.
PYTHON ?= python3
DEMO_OUT ?= runs/demo
BIN := .venv/bin
INSTALLED := .venv/.installed
LINKS := .links/boldforge
FOLDERS := configs data_shards kernels pretrain finetune launch
# One thread per process: the tests start several processes on two cores, and threads that wait on each other cost minutes.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Here and not in pyproject.toml, because a GPU machine on which nothing can be installed may lack the plugin.
PYTEST := $(BIN)/python -m pytest -rs --timeout 300

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu bench bench-gpu lint clean

help:
	@echo "make demo       shard two real runs, pretrain, sweep, release, report (under 10 minutes on 2 cores)"
	@echo "make test       lint, types, layer contract and the fast tests"
	@echo "make test-slow  the tests that take longer than ten seconds each"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make bench      the figures in docs/, each on this machine, quick sizes"
	@echo "make bench-gpu  the scan on a CUDA device, every shape, beside mamba-ssm where it imports"
	@echo "make lint       ruff, mypy and the layer contract only"
	@echo "make clean      remove .venv, caches and build products; runs/ stays"

install: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml constraints.txt launch/install_torch.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11; run make PYTHON=python3.11 (or newer)."; exit 1; }
	@echo "Installing BoldForge and its dependencies into .venv (about two minutes, once) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python launch/install_torch.py constraints.txt
	@$(BIN)/python -m pip install --quiet --editable '.[dev]' -c constraints.txt
	@rm -rf .links && mkdir -p $(LINKS)
	@for folder in $(FOLDERS); do ln -s ../../$$folder $(LINKS)/$$folder; done
	@ln -s ../../launch/boldforge/__init__.py ../../launch/boldforge/py.typed $(LINKS)/
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/boldforge demo --out $(DEMO_OUT)

lint: $(INSTALLED)
	@echo "ruff: rules and format"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "mypy: types"
	@$(BIN)/mypy -p boldforge
	@echo "import-linter: layers import downwards only"
	@PYTHONPATH=.links $(BIN)/lint-imports

test: lint
	@echo "pytest: everything that is not marked slow, two files at a time"
	@$(ONE_THREAD) $(PYTEST) -m "not slow" -n 2 --dist loadfile

test-slow: $(INSTALLED)
	@$(ONE_THREAD) $(PYTEST) -m slow

# On a machine where nothing can be installed: PYTHONPATH=.links python3 -m pytest -m gpu
test-gpu: $(INSTALLED)
	@$(PYTEST) -m gpu

bench: $(INSTALLED)
	@for script in benchmarks/*.py; do \
		test -e "$$script" || { echo "benchmarks/ holds no script yet."; break; }; \
		echo "$$script"; $(ONE_THREAD) $(BIN)/python "$$script" --quick || exit 1; \
	done

# On a machine where nothing can be installed: PYTHONPATH=.links python3 benchmarks/scan.py --device cuda --json FILE
bench-gpu: $(INSTALLED)
	@mkdir -p runs
	@$(BIN)/python benchmarks/scan.py --device cuda --json runs/scan-gpu.json

clean:
	rm -rf .venv .links build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
