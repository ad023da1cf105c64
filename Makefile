# Needs only python3 and make.
#   make dev    install into .venv, then run a simulated fleet (ARGS="--port 8080" passes arguments on)
#   make test   the whole suite: format, lint, types, tests, real vLLM, containers where Podman is installed
#   make test-gpu  the tests that need real GPUs, and a report to send back (docs/gpu-tests.md)
#   make bench  compares cortex with nginx and other gateways; writes docs/benchmarks.md (ARGS="--quick" only prints)
#   make bench-cold          time that cortex and neuron add to an engine's start (ARGS="--engine vllm": real vLLM)
#   make bench-fleet         cortex with 1, 10, 100 and 1000 neurons (ARGS="--protocol-v1": protocol v1 neurons)
#   make bench-dashboard     what an open dashboard of 200 neurons costs cortex, and how smoothly it scrolls
#   make screenshots         the pictures of docs/dashboard.md again, of a simulated fleet (needs Chromium)
#   make bench-instructions  instructions per request and per chunk, compared with the record (ARGS="--record")
#   make test-compiled       the tests of the request path, compiled
#   make audit               known vulnerabilities of what is installed (pip-audit)
#   make wheel               a compiled wheel in dist/
#   make wheels              one for each CPython 3.10 to 3.13 on this machine; says which it skips
#   make deb                 a Debian package each for cortex and neuron in dist/ (docs/install.md)
#   make docs                the documentation as a site in build/site (ARGS=serve shows it while you edit)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CACHE  := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/cortex-neuron

# The stamp's name depends on pyproject.toml and Python: a second `make dev` starts at once, and a changed dependency is
# installed.
KEY       := $(shell { cat pyproject.toml; $(PYTHON) -VV; } 2>/dev/null | sha256sum | cut -c1-16)
RUN_STAMP := $(VENV)/.run-$(KEY)
DEV_STAMP := $(VENV)/.dev-$(KEY)

# Debian splits venv from python3: installed if root, otherwise explained.
define INSTALL_VENV
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv; \
	else \
		echo >&2 'this Python has no venv module: run  sudo apt-get install python3-venv  and repeat'; exit 1; \
	fi
endef

.PHONY: help dev docs test test-compiled test-gpu audit wheel wheels deb bench bench-cold bench-fleet bench-dashboard bench-instructions screenshots check lint types fmt install clean clean-cache
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile
	@echo 'make lint   ruff            make types  mypy --strict     make fmt          reformat and fix what ruff can'
	@echo 'make check  what CI runs    make clean  remove .venv      make clean-cache  remove $(CACHE)'

dev: $(RUN_STAMP)
	@exec $(BIN)/cortex dev $(ARGS)

test: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tests.environment
	$(BIN)/python -m $(if $(ARGS),pytest $(ARGS),tests.lanes)

# Tests that run through compiled modules; the rest is the same as in `make test`.
COMPILED_TESTS := $(addprefix tests/cortex/,http proxy metrics workers \
	$(addprefix control/test_,dead_core.py failover.py replicas.py shutdown.py))

# In a copy: a compiled module in the checkout would hide its source.
test-compiled: $(DEV_STAMP)
	rm -rf build/compiled
	CORTEX_COMPILE=yes $(BIN)/python -m pip install --quiet --no-deps --target build/compiled .
	cp -r tests benchmarks deploy docs pyproject.toml *.md LICENSE models.example.toml Makefile build/compiled
	cd build/compiled && $(abspath $(BIN))/python -m $(if $(ARGS),pytest -p no:cacheprovider $(ARGS),tests.lanes $(if $(LANES),--lanes $(LANES)) $(COMPILED_TESTS))

test-gpu: $(DEV_STAMP)
	$(BIN)/python -m tests.gpu $(ARGS)

audit: $(DEV_STAMP)
	$(BIN)/python -m tests.audit

wheel: $(RUN_STAMP)
	CORTEX_COMPILE=yes $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# Material announces its successor on every build.
docs: $(DEV_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs $(or $(ARGS),build --strict)

# Those on the PATH and pyenv's. A compiled wheel needs the headers of its Python (Debian: python3.X-dev).
HEADER := import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))

wheels: $(RUN_STAMP)
	@for version in 3.10 3.11 3.12 3.13; do \
		found=; \
		for python in $$(command -v python$$version) $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$version.*/bin/python$$version; do \
			if "$$python" -c '$(HEADER)' >/dev/null 2>&1; then found=$$python; break; fi; \
		done; \
		if [ -z "$$found" ]; then echo "skipped CPython $$version: not on this machine, or without its headers"; continue; fi; \
		CORTEX_COMPILE=$(or $(CORTEX_COMPILE),yes) $(BIN)/python -m pip --python "$$found" wheel --quiet --no-deps \
			--wheel-dir dist . || exit 1; \
		echo "built a wheel for CPython $$version ($$found) in dist"; \
	done

deb: $(RUN_STAMP)
	CORTEX_COMPILE=$(or $(CORTEX_COMPILE),yes) $(BIN)/python deploy/debian/build.py $(ARGS)

bench: $(DEV_STAMP)
	$(BIN)/python -m benchmarks $(or $(ARGS),--write)

bench-cold: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.cold_start $(ARGS)

bench-fleet: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.fleet_size $(ARGS)

bench-dashboard: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.dashboard $(ARGS)

screenshots: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.screenshots $(ARGS)

bench-instructions: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.instructions $(ARGS)

check: test

lint: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEV_STAMP)
	$(BIN)/mypy

fmt: $(DEV_STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python -m tests.contract.reference
	$(BIN)/python -m tests.contract.prose

install: $(DEV_STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo >&2 'Python 3.10 or newer required, for example make PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { $(INSTALL_VENV); }
	$(PYTHON) -m venv --clear $(VENV)

# --group needs pip 25.1, and Debian's is older.
$(RUN_STAMP): | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	CORTEX_COMPILE=no $(BIN)/python -m pip install --quiet --editable .
	@rm -f $(VENV)/.run-* && touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(BIN)/python -m pip install --quiet --group dev
	@rm -f $(VENV)/.dev-* && touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist

# About 5 GB: vLLM and the clients for the tests, models, container images.
clean-cache:
	rm -rf $(CACHE)
