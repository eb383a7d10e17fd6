# Needs Python 3.11 (or newer: `make venv PYTHON=python3.12`) and make; everything else is installed into .venv.
PYTHON ?= python3.11
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
# NPROC: simulated devices that wait in collectives each hold a thread of one pool
PYTEST := XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu NPROC=32 \
	TF_CPP_MIN_LOG_LEVEL=2 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help venv demo demo-controls demo-short test test-slow test-kill test-aot bench-cpu lint format lock clean

help:
	@echo "make venv        install everything into .venv (CPU)"
	@echo "make demo        the whole recipe on the built-in formulary, on this machine's CPU"
	@echo "make demo-controls  the demo, then what its stages are compared with"
	@echo "make demo-short  the same recipe in a few steps"
	@echo "make test        tests; test-slow, test-kill and test-aot run the ones left out of it"
	@echo "make bench-cpu   a train step and decoding beside torch; fails when either got slower"
	@echo "make lint        ruff and pyright; format rewrites"
	@echo "make lock        write requirements.lock and requirements-plan.lock from .venv"
	@echo "make clean       remove caches and build folders (runs and .venv stay)"

venv: $(STAMP)

$(STAMP): pyproject.toml setup.py requirements.lock
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make venv: '$(PYTHON)' is missing, older than 3.11 or without venv;" \
	       "install Python 3.11, or name one: make venv PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq -r requirements.lock
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@

demo: venv
	$(BIN)/medreason run configs/recipes/formulary.yaml

demo-controls: venv
	$(BIN)/medreason run configs/recipes/formulary.yaml --controls

demo-short: venv
	$(BIN)/medreason run configs/recipes/formulary_short.yaml

test: venv
	$(PYTEST)

test-slow: venv
	$(PYTEST) -m slow

test-kill: venv
	$(PYTEST) -m kill

# libtpu, which `make venv` leaves out, compiles for TPUs without one.
test-aot: venv
	$(BIN)/python -m pip install -qq -r requirements-plan.lock
	$(PYTEST) -m aot

# On an idle machine: a train step and greedy decoding beside transformers and torch.
bench-cpu: venv
	$(BIN)/python benchmarks/cpu.py step --peers torch --at-least torch=0.8
	$(BIN)/python benchmarks/cpu.py decode --peers torch --at-least torch=3.0

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	$(BIN)/python tools/lock.py cpu export test > requirements.lock.new
	mv requirements.lock.new requirements.lock
	$(BIN)/python tools/lock.py plan > requirements-plan.lock.new
	mv requirements-plan.lock.new requirements-plan.lock
	@touch $(STAMP)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
