# make demo   the main job on a generated scene        make test   the tests
# make thorough  more cases and sizes of the same
# make chaos  the tests that kill workers, drivers and nodes, and the table of tests/chaos/README.md from what they measured
# make lint   style, types, import contracts           make bench  the benchmarks, with their figures
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

FIGURES := $(VENV)/figures.jsonl

.PHONY: demo test thorough chaos lint bench install install-cluster

demo: install
	$(BIN)/geoseg demo

# Three processes on two cores, as many tests wait for servers; threads that wait must not spin then.
test: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "not chaos and not thorough" --numprocesses 3 --dist loadfile --no-loadscope-reorder

thorough: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "thorough and not chaos" --numprocesses 3 --dist loadfile --no-loadscope-reorder

chaos: install-cluster
	rm -f $(FIGURES)
	GEOSEG_FIGURES=$(abspath $(FIGURES)) $(BIN)/python -m pytest -m "chaos or figure"
	$(BIN)/python tests/kit/figures.py $(FIGURES) tests/chaos/README.md

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python tests/benchmarks/forward.py
	$(BIN)/python tests/benchmarks/end_to_end.py --side 4096
	$(BIN)/python tests/benchmarks/peers.py --side 4096
	$(BIN)/python tests/benchmarks/reading.py
	$(BIN)/python tests/benchmarks/flat.py size 4096 16384 400000

install: $(STAMP)

# Ray's job API comes with the extra; with it each private Ray starts an agent more, so the other tests go without.
install-cluster: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cluster,dev]'

# The pip module and constraints.txt: with torch pinned the CPU build is taken where one is at hand.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	rm -f $(VENV)/.installed-*
	touch $@
