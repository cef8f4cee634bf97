# make quick   is Muon better than AdamW here? the main job on real text, in minutes
# make test    ruff, mypy and every test
# make lint    ruff and mypy alone
# make clean   what these made (not ./runs, not the cached corpora)
#
# Each target makes what it needs in .venv; TORCH=keep uses the environment that is active, its torch included.

PYTHON ?= python3
TORCH ?= pinned

ifeq ($(TORCH),keep)
BIN :=
PIP := $(PYTHON) -m pip install -q
PINS :=
STAMPS := .stamps-keep
else
BIN := .venv/bin/
PIP := .venv/bin/python -m pip install -q
PINS := -c constraints.txt
STAMPS := .venv
endif

.PHONY: quick test lint format clean

quick: $(STAMPS)/lab
	$(BIN)muonlab compare muon adamw --quick

test: lint
	$(BIN)python -m pytest -n 2 --dist loadfile

lint: $(STAMPS)/dev
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy

format: $(STAMPS)/dev
	$(BIN)ruff check --fix .
	$(BIN)ruff format .

.venv/bin/python:
	$(PYTHON) -m venv .venv

ifeq ($(TORCH),keep)
$(STAMPS)/base:
	mkdir -p $(STAMPS) && touch $@
else
$(STAMPS)/base: constraints.txt | .venv/bin/python
	$(PIP) "$$(grep -E '^torch==' constraints.txt)"
	touch $@
endif

$(STAMPS)/lab: pyproject.toml constraints.txt | $(STAMPS)/base
	$(PIP) $(PINS) -e '.[lab]'
	touch $@

$(STAMPS)/dev: pyproject.toml constraints.txt | $(STAMPS)/base
	$(PIP) $(PINS) -e '.[lab,dev]'
	touch $@ $(STAMPS)/lab

clean:
	rm -rf .venv .stamps-keep .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
