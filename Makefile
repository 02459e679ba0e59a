# Each target sets up what it needs. PYTHON: any 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
KUBERNETES := 1.33.0
# Four processes of tests, since most of their time is waiting; each may run clusters of its own, of a gigabyte or two.
# A file's tests stay together, and the files in order: those with clusters come first, so that the end is made of short ones.
SPREAD := -n 4 --dist loadfile --no-loadscope-reorder

.PHONY: help demo serve test faults bench check format clean

help: ## what can be made
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):[^#]*## (.*)/make \1\t\2/' | expand -t 14

demo: $(READY) ## start a cluster, ask it about real pictures, check the answers
	$(BIN)/epd demo

serve: $(READY) ## run a cluster with the shipped model on port 5580 until Ctrl-C
	$(BIN)/epd up

test: $(READY) ## run the tests
	$(BIN)/python -m pytest $(SPREAD) $(PYTEST_ARGS)

faults: $(READY) ## break a cluster under load in every way we know, report what clients noticed
	$(BIN)/python -m tests.faults

bench: $(READY) ## measure everything, write BENCHMARKS.md
	$(BIN)/epd bench report

check: $(READY) ## lint, format, types, the files of deploy/ (the import rules are among the tests too)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_rules.py
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/docker-compose.yml deploy/multi-node/*.yml
	$(BIN)/kubernetes-validate --strict --quiet --kubernetes-version $(KUBERNETES) $(wildcard deploy/kubernetes/base/[!k]*.yaml)

format: $(READY) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache

# torch first and alone: asked for later, within a range, it would come as a newer build of several gigabytes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]'
	touch $(READY)
