# The two commands are `make demo` and `make test`; each sets up all that it needs in .venv and says what it does.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test lint types check-tests bench guard tls pressure monitor faults soak api docs man picture pins clean

help:
	@echo "make demo    move three guests on this machine: over TCP, through a pipe, into a file"
	@echo "make test    lint, types, tests"
	@echo "make bench   the figures, each beside its limit measured in the same run"
	@echo "make guard   what the guard between the engine and every channel costs"
	@echo "make tls     how fast tls+ is, beside what one core can encrypt"
	@echo "make pressure  a loaded machine, a slow sink, a cancel in the middle of a long final pass"
	@echo "make monitor  how fast the monitor answers while its machine migrates, onto four kinds of sink"
	@echo "make faults  transport x fault x phase: what the source does when the other end fails (minutes; root)"
	@echo "make soak    200 moves back and forth, with cancels and faults (minutes)"
	@echo "make api     write docs/api.md anew, from the docstrings"
	@echo "make docs    the site, into build/site"
	@echo "make man     man pages of all commands, into build/man"
	@echo "make picture record docs/migration.svg anew: a migration on a terminal"
	@echo "make pins    write requirements/constraints.txt anew: the versions that all else here installs"
	@echo "make clean   remove everything that make has made"

setup: $(STAMP)

$(STAMP): pyproject.toml requirements/constraints.txt kvmmig/__init__.py
	@echo "== setting up $(VENV) with $$($(PYTHON) --version) (once; takes about a minute)"
	@$(PYTHON) -c 'import sys; sys.exit("kvmmig needs Python 3.11 or newer; say make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt --editable '.[test]'
	@touch $@

demo: setup
	@echo "== kvmmig demo"
	@$(BIN)/kvmmig demo

lint: setup
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup
	@echo "== mypy --strict"
	@$(BIN)/mypy

check-tests: setup
	@echo "== pytest"
	@$(BIN)/python -m pytest -n 2 --dist loadfile

test: lint types check-tests

bench: setup
	@$(BIN)/python bench/speed.py
	@$(BIN)/python bench/guard.py

guard: setup
	@$(BIN)/python bench/guard.py

tls: setup
	@$(BIN)/python bench/tls.py

pressure: setup
	@$(BIN)/python bench/pressure.py

monitor: setup
	@$(BIN)/python bench/monitor_latency.py

faults: setup
	@$(BIN)/python -m tests.faults

soak: setup
	@$(BIN)/python bench/soak.py
	@echo "== 100,000 mutated streams, 100,000 hostile inputs to a monitor, and to one whose machine migrates"
	@$(BIN)/python -m pytest -q -m slow tests/stream tests/monitor

api: setup
	@$(BIN)/python -m tests.api.reference

docs: setup
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs . build/site
	@echo "open build/site/index.html"

man: setup
	@$(BIN)/python -m docs.man

picture: setup
	@$(BIN)/python -m tests.docs.picture

# In an environment of its own, where nothing holds a version back.
pins:
	@rm -rf build/pins && $(PYTHON) -m venv build/pins
	@build/pins/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@{ sed -n '/^#/p' requirements/constraints.txt; \
	   build/pins/bin/python -m pip freeze --disable-pip-version-check --exclude-editable; } > build/pins/new
	@mv build/pins/new requirements/constraints.txt

clean:
	rm -rf $(VENV) build dist .import_linter_cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
