# Two commands do everything, in a fresh clone too: `make study` and `make test`.
# Each makes .venv when it is missing. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
BIN := .venv/bin
SOURCES := src tests benchmarks docs validation

# Real data lying beside the clone is used; otherwise the library downloads or takes its embedded digits.
ifneq ($(wildcard ../shared/data),)
export MANYHANDS_DATA ?= $(abspath ../shared/data)
endif
ifneq ($(wildcard ../shared/data/measured),)
export MANYHANDS_MEASURED ?= $(abspath ../shared/data/measured)
endif

# Many tests start processes and wait: three files at a time fill two cores. Alone: make test SIDE_BY_SIDE=
SIDE_BY_SIDE ?= -n 3 --dist loadfile

# Where compiled Python is not kept, every process that a test starts compiles the library anew, and pytest its tests.
test test-all: export PYTHONDONTWRITEBYTECODE :=

.PHONY: help study test test-all lint format bench validate
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

study: .venv/.stamp ## the small default study of this machine; prints where its report lies
	$(BIN)/manyhands study $(ARGS)

test: lint ## every check, and every test but the slow ones
	$(BIN)/pytest -m "not slow" $(SIDE_BY_SIDE) $(ARGS)

test-all: lint ## every check and every test
	$(BIN)/pytest $(SIDE_BY_SIDE) $(ARGS)

lint: .venv/.stamp ## format, lint, types and layers, without the tests
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: .venv/.stamp ## rewrite the source as the formatter wants it
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: .venv/.stamp ## every benchmark of benchmarks/, one after the other
	@set -e; for file in benchmarks/[!_]*.py; do echo "== $$file"; $(BIN)/python "$$file" $(ARGS); done

# Of a machine that does nothing else; half an hour. Published tables lie in the folder MANYHANDS_MEASURED.
validate: .venv/.stamp ## predictions against what was measured here and published
	$(BIN)/manyhands calibrate
	@set -e; for part in measured operators memory asynchronous published costs; do echo "== $$part"; $(BIN)/python -m validation.$$part $(ARGS); done

# The second line serves systems whose Python comes without ensurepip.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python .venv install --quiet pip; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,mpi,tensorboard]"
	@touch $@
