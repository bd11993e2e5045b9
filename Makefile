# make demo, make check, make test, make test-long, make torture, make dist, make gpu: each does all its own set-up in VENV
# make check is for after every change, a minute: lint, types, and for 40 s the tests that the change can break, nearest first
# (--maxschedchunk 1: a worker that had many in store would leave out near ones when time is up)
# make torture strikes a hundred trainings by faults (tests/helpers/faults.py), half an hour, and writes the matrix in docs/SCALE.md
# make test is for before a commit, 8 minutes: all but what is marked long, which make test-long runs
# make dist builds the wheel and the source distribution
# make gpu GPU="--cifar100 npz:cifar100.npz": benchmarks/gpu.py with options; PYTHON_GPU=python3: by that Python, whose torch has CUDA and
# which has what pyproject.toml lists and pytest, and nothing is installed
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo check test test-long torture lint dist gpu
demo: $(VENV)/installed
	$(VENV)/bin/flowdistill demo

check: lint
	$(VENV)/bin/pytest -n auto --maxschedchunk 1 --affected --seconds 40

test: $(VENV)/installed-dev
	$(VENV)/bin/pytest -n auto --dist worksteal

test-long: $(VENV)/installed-long
	$(VENV)/bin/pytest -n auto --dist worksteal -m long

torture: $(VENV)/installed-dev
	$(VENV)/bin/python tests/torture.py --count 100 --out results/torture.json
	$(VENV)/bin/python docs/include.py

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/yamllint --strict .github

dist: $(VENV)/installed-dev
	rm -rf dist
	$(VENV)/bin/python -m build --quiet

gpu: $(if $(PYTHON_GPU),,$(VENV)/installed-dev)
	$(or $(PYTHON_GPU),$(VENV)/bin/python) benchmarks/gpu.py $(GPU)

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("flowdistill needs Python 3.11 or newer: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/installed-long: $(VENV)/installed-dev
	$(VENV)/bin/pip install --quiet --editable '.[dev,long]'
	touch $@
