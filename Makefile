# Every line here is documented in the README for those without make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check fast install install-dev clean

demo: install
	$(BIN)/python cli.py extract-vit
	$(BIN)/python cli.py train --k-txt 3 --name demo-$$(date +%Y%m%d-%H%M%S)
	$(BIN)/python cli.py train --k-txt 3 --control shuffled-images --epochs 3 --name shuffled-$$(date +%Y%m%d-%H%M%S)

test: install-dev check

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist loadfile

# What needs neither the real presets nor more than a few seconds a test.
fast: install-dev
	$(BIN)/pytest -n auto --dist loadfile -m 'not slow'

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
