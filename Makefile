PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: install demo test golden lint types docs

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# What depth buys, in five minutes on two cores: $(DEMO)/depth.png and depth.md. FLAGS are settings, such as --seed 1.
demo: install
	$(BIN)/python scripts/demo.py --out $(DEMO) $(FLAGS)

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Tiny runs of every kind of data under every rule, against what was recorded (tests/golden/record.py).
golden: install
	$(BIN)/python -m pytest -n 2 -m golden tests/golden

lint: install
	$(BIN)/ruff check looped tasks tests scripts
	$(BIN)/lint-imports

# The guide, into build/guide, to be opened at index.html; its search needs no server either.
# A warning is an error (not with --quiet, under which MkDocs counts none), and nothing is fetched.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# basedpyright brings a node of its own, 280 MB unpacked, so it is no part of the dev extra. PYTHONPATH, since it does not read
# the import hook of an editable install.
types: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[types]"
	PYTHONPATH="$(CURDIR)" PATH="$(CURDIR)/$(BIN):$$PATH" basedpyright --verifytypes looped --ignoreexternal
