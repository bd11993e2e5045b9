# make demo, make test, make test-long: each does all its own set-up in VENV
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test test-long lint
demo: $(VENV)/installed
	$(VENV)/bin/flowdistill demo

test: $(VENV)/installed-dev
	$(VENV)/bin/pytest -n auto --dist worksteal

test-long: $(VENV)/installed-dev
	$(VENV)/bin/pytest -n auto --dist worksteal -m long

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("flowdistill needs Python 3.11 or newer: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@
