# The two commands are `make demo` and `make test`; each sets up all that it needs in .venv and says what it does.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test lint types check-tests bench peers loaded guard image tls pressure monitor faults soak attack guests api docs man picture pins clean

help:
	@echo "make demo    move three guests on this machine: over TCP, through a pipe, into a file"
	@echo "make test    lint, types, tests"
	@echo "make bench   the figures, each beside its limit measured in the same run"
	@echo "make peers   kvmmig beside QEMU, idle and loaded (minutes; needs qemu-system-x86 and nasm); see bench/README.md"
	@echo "make guard   what the guard between the engine and every channel costs"
	@echo "make loaded  setup and rate over TCP, idle and beside busy processes, each beside a plain loop"
	@echo "make image   saving to an image and coming back from it, beside plain writes to the disk"
	@echo "make tls     how fast tls+ is, beside what one core can encrypt"
	@echo "make pressure  a loaded machine, a slow sink, a cancel in the middle of a long final pass"
	@echo "make monitor  how fast the monitor answers while its machine migrates, onto four kinds of sink"
	@echo "make faults  transport x fault x phase: what the source does when the other end fails (minutes; root)"
	@echo "make soak    200 moves back and forth, with cancels and faults (minutes)"
	@echo "make attack  torn images, killed saves, hostile clients, a fuzzer: an hour; make attack FUZZ=10 is shorter"
	@echo "make guests  assemble the built-in guests anew, with nasm"
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
	@$(BIN)/python -m compileall -q kvmmig transports # a package that is installed comes with its bytecode
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
	@$(BIN)/python -m pytest -n 4 --dist worksteal

test: lint types check-tests

bench: setup
	@$(BIN)/python bench/speed.py
	@$(BIN)/python bench/guard.py

peers: setup
	@$(BIN)/python -m bench.peers $(ARGS)

loaded: setup
	@$(BIN)/python -m bench.loaded $(ARGS)

guard: setup
	@$(BIN)/python bench/guard.py

image: setup
	@$(BIN)/python -m bench.image

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

# What a user's slip, a neighbour, a torn image or a stranger can do. FUZZ is seconds for each of the fuzzer's targets.
FUZZ ?= 300
attack: setup
	@echo "== every kind of attack, in its short form"
	@$(BIN)/python -m pytest -q -m "not slow" tests/stream tests/qmp tests/transports/test_saving*.py tests/transports/test_tls.py \
	    tests/transports/test_secret.py tests/cli/test_run_directory.py tests/cli/test_descriptors.py tests/fuzz
	@echo "== saves killed at random and at each system call, 10,000 torn images, 100,000 hostile inputs"
	@$(BIN)/python -m pytest -q -m slow tests/transports tests/stream tests/qmp tests/monitor tests/image
	@echo "== the fuzzer, $(FUZZ) s a target"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt --editable '.[fuzz]'
	@$(BIN)/python -m tests.fuzz --seconds $(FUZZ)

# A test holds each .bin to its .asm.
guests:
	@for source in kvmmig/guests/*.asm kvmmig/lab/missing_state/guests/*.asm kvmmig/machine/bios/bios.asm; do \
	    (cd "$$(dirname "$$source")" && name=$$(basename "$$source" .asm) && nasm -f bin -o "$$name.bin" "$$name.asm") || exit; done

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
	@build/pins/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,fuzz]'
	@{ sed -n '/^#/p' requirements/constraints.txt; \
	   build/pins/bin/python -m pip freeze --disable-pip-version-check --exclude-editable; } > build/pins/new
	@mv build/pins/new requirements/constraints.txt

clean:
	rm -rf $(VENV) build dist .import_linter_cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
