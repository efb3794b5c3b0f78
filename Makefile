# One place for every command of the project; `make` alone lists them.
#
# Each target sets up what it needs: a virtual environment with the versions of requirements.lock. The stamps .core and
# .dev inside it say what is installed, so a second call is instant and a change of setup.py or of the lock installs anew.

# PYTHON: the interpreter of the environment. VENV: its folder. UV: "no" installs with pip alone, otherwise with uv where
# it is on the PATH or can be had from pip. SLOW: 1 runs the slow tests too. JOBS: processes that share the test files.
# PYTEST: more arguments for pytest.
PYTHON ?= python3
VENV ?= .venv
UV ?= auto
SLOW ?= 0
JOBS ?= 2
PYTEST ?=

BIN := $(VENV)/bin
MARKS := $(if $(filter 1,$(SLOW)),-m "",)

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint format bench lock clean check-python

help: ## List the commands
	@echo "make COMMAND, where COMMAND is one of"
	@awk -F ' *:.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "and these may follow: PYTHON=python3.13  VENV=folder  UV=no  SLOW=1  JOBS=4  PYTEST=\"-k word\""

quickstart: $(VENV)/.core ## Train a small GPT on Python's standard library, a few minutes on two CPU cores
	$(BIN)/python -m gptjax.main --config=experiments/quickstart.py --workdir=runs/quickstart

test: lint ## Lint, check types and run the tests; SLOW=1 for the slow ones too
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(MARKS) $(PYTEST)

lint: $(VENV)/.dev ## Check style, format and types; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check

format: $(VENV)/.dev ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.core ## Measure speed, memory and start-up of the quickstart's training step
	$(BIN)/python -m gptjax.bench --config=experiments/quickstart.py

lock: $(VENV)/.dev ## Pin the newest versions that fit together into requirements.lock
	$(BIN)/uv pip compile --upgrade --quiet --universal --python-version=3.11 --all-extras --no-header --no-annotate \
	  --output-file=requirements.lock setup.py

clean: ## Remove the virtual environment and every cache, never runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .pyrefly_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An interpreter that was asked for is never silently another one, and one that is too old says so before it fails.
check-python:
ifneq ($(origin PYTHON) $(wildcard $(BIN)/python),file $(BIN)/python)
	@version=$$($(PYTHON) -c 'import platform; print(platform.python_version())') || { \
	  echo "PYTHON=$(PYTHON) does not run; name a Python of 3.11 or newer, as in: make PYTHON=python3.13" >&2; exit 2; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "PYTHON=$(PYTHON) is Python $$version, and gptjax needs 3.11 or newer, as in: make PYTHON=python3.13" >&2; exit 2; }; \
	if [ -x $(BIN)/python ]; then \
	  there=$$($(BIN)/python -c 'import platform; print(platform.python_version())') || exit 2; \
	  [ "$$there" = "$$version" ] || { echo "PYTHON=$(PYTHON) is Python $$version, but $(VENV) was made with $$there;" \
	    "run make clean first, or keep both with VENV=.venv-$$version" >&2; exit 2; }; \
	fi
endif

# $(call set_up,REQUIREMENT): the virtual environment, and in it the requirement at the locked versions. pip has the last
# word: it knows certificates and mirrors from pip.conf, which uv does not read.
define set_up
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "installing $(1) with the versions of requirements.lock into $(VENV)"; \
	what="--quiet --constraint=requirements.lock --editable=$(1)"; pip="$(BIN)/python -m pip install"; uv=; \
	if [ "$(UV)" != no ]; then \
	  if command -v uv >/dev/null; then uv=uv; \
	  elif $$pip --quiet --constraint=requirements.lock uv 2>/dev/null; then uv=$(BIN)/uv; fi; \
	fi; \
	{ [ -n "$$uv" ] && $$uv pip install --python=$(BIN)/python $$what; } || $$pip $$what
endef

$(VENV)/.core: setup.py requirements.lock | check-python
	$(call set_up,.)
	@touch $@

$(VENV)/.dev: setup.py requirements.lock | check-python
	$(call set_up,.[dev])
	@touch $@ $(VENV)/.core
