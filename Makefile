# Consilium: `make help` lists the targets.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(shell command -v python3.11 || command -v python3)

.DEFAULT_GOAL := help
.PHONY: help install demo test slow lint docs pictures lock bundle clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv and install the locked dependencies and this package (7 GB)

demo: $(STAMP)  ## simulate a consortium and run a whole study on it; options in ARGS="..."
	$(BIN)/consilium demo $(ARGS)

test: $(STAMP)  ## run the fast tests
	$(BIN)/python -m pytest -n 2

slow: $(STAMP)  ## run the slow tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "slow and not gpu"

lint: $(STAMP)  ## check style, types and who imports whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(STAMP)  ## build the pages of docs/ into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

pictures: $(STAMP)  ## take the pictures in docs/pictures anew; needs Chromium and PostgreSQL
	CONSILIUM_PICTURES="$(CURDIR)/docs/pictures" $(BIN)/python -m pytest -m slow tests/test_topology.py -k browser

lock: $(BIN)/uv  ## resolve the dependencies anew into requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11 --generate-hashes \
		--no-header --no-emit-index-url --no-annotate -o requirements.lock

bundle: $(STAMP)  ## make dist/bundle, which installs without a network; needs 12 GB, LOCK=... for another lock
	$(BIN)/python -m infra.lock requirements.lock > $(VENV)/runtime.lock
	PYTHON="$(BIN)/python" infra/scripts/bundle.sh dist/bundle "$(or $(LOCK),$(VENV)/runtime.lock)"

clean:  ## remove .venv, caches and builds; results of the demo stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find flows fusion infra modalities tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# uv reads how to build pyradiomics from pyproject.toml in the working directory.
$(STAMP): requirements.lock pyproject.toml $(BIN)/uv
	@command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || { \
		echo "make: found no C compiler, needed one to build pyradiomics; install gcc or clang." >&2; \
		exit 1; }
	$(BIN)/uv pip install --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

$(BIN)/uv:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
		echo "make: found no Python 3.11, needed it because pyradiomics builds on no later one;" \
			"install it, or name it with PYTHON=/path/to/python3.11." >&2; \
		exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
