# make demo is the place to start: it sets everything up in .venv and runs the demo.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The first interpreter that is new enough; say PYTHON=/path/to/python3 to choose another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help setup demo test lint bench clean

help:
	@echo "make setup   create .venv and install nopin in it"
	@echo "make demo    the same work pinned and on demand, side by side (under a minute)"
	@echo "make test    every test: unit, property, live, conformance"
	@echo "make lint    ruff, formatting, mypy --strict"
	@echo "make bench   what this machine can do, and how much of it nopin reaches"

setup: $(READY)

$(READY): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo "nopin needs Python 3.11 or newer and found none; install it, or run: make PYTHON=/path/to/python3" >&2; \
		exit 3; fi
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "python could not create $(VENV); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 3; }
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@echo "nopin is installed in $(VENV); to have it on your path: . $(BIN)/activate" >&2
	@touch $@

demo: setup
	@$(BIN)/nopin demo

test: setup
	@$(BIN)/python -m pytest

lint: setup
	@status=0; for check in "ruff check" "ruff format --check" "mypy --strict"; do \
		echo "$$check"; $(BIN)/$$check || status=1; done; exit $$status

bench: setup
	@$(BIN)/nopin bench floor
	@$(BIN)/nopin bench write_bw -s 1m
	@$(BIN)/nopin bench read_bw -s 1m
	@$(BIN)/nopin bench read_bw -s 1m --direct
	@$(BIN)/nopin bench write_bw -s 8
	@$(BIN)/nopin bench read_lat -s 8
	@$(BIN)/nopin bench fault
	@$(BIN)/nopin bench overcommit

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
