# Everything from a fresh clone: needs Python 3.10 to 3.13, make, and a package index that pip can reach.
#   make demo    the main job on the built-in model      make test    the whole test suite
#   make lint    style, types and import order           make bench   the benchmarks
# Another interpreter: make demo PYTHON=python3.12      Options for the command: make demo ARGS=--quick

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
ARGS   ?=

BIN   := $(VENV)/bin
READY := $(VENV)/.ready
LOG   := $(VENV)/install.log
PIP   := $(BIN)/python -m pip install --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench setup clean

help:
	@sed -n '2,4s/^# *//p' Makefile

demo: $(READY)
	@$(BIN)/postalign demo $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	@status=0; \
	$(BIN)/ruff check src tests $(wildcard scripts benchmarks examples) || status=1; \
	$(BIN)/pyright --pythonpath $(BIN)/python || status=1; \
	$(BIN)/lint-imports --no-logo || status=1; \
	exit $$status

# those that need no data but ours, about an hour; the others say in their heads what they take
bench: $(READY)
	@set -e; for name in products decoding merge_memory report_load; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py $(ARGS); done

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null || \
	  { echo "error: postalign needs Python 3.10 to 3.13; name one with PYTHON=, e.g. make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 2; }
	@echo "Setting up $(VENV), once: torch, transformers and the rest (a few minutes)" >&2
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "error: could not make $(VENV); install the venv module of $(PYTHON) (Debian: python3-venv)" >&2; exit 1; }
	@{ $(PIP) '$(TORCH)' && $(PIP) -c constraints.txt -e '.[all,dev]'; } >$(LOG) 2>&1 || \
	  { grep -i error $(LOG) | tail -n 3 >&2; echo "error: the installation failed; the log is $(LOG), and the same command tries again" >&2; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache
