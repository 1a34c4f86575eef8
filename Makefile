# `make demo` and `make test` do all the set-up themselves: they need Python 3.11 to 3.13 and make, nothing else.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all lint docs reference audit clean
MAKEFLAGS += --no-builtin-rules

# TensorFlow 2.21 has no wheels for later Pythons; raise the upper bound when the pinned version has.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
ifndef PYTHON
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11; do \
	if "$$python" -c '$(SUPPORTED)' 2>/dev/null; then echo "$$python"; break; fi; done)
ifeq ($(PYTHON),)
PYTHON := python3
endif
endif

VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
# Most of a test is tracing, which takes one core; a file of tests shares what it has trained.
PYTEST_ARGS := -n 2 --no-loadscope-reorder

# Without bytecode files, every process would compile TensorFlow's modules again.
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# Also for the environments in which pip builds packages (the second name is that of newer versions of pip).
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

# uv installs in a part of the time that pip takes. It does not read pip's configuration (a mirror, a proxy), so where it
# cannot reach its index, pip installs. Some libraries ship templates that are no Python: that they do not compile is no
# failure. The tests of libraries are not compiled.
PIP_INSTALL := $(BIN)/python -m pip install -qq --no-compile -c constraints.txt
UV_INSTALL := $(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -b constraints.txt
INSTALL = $(PIP_INSTALL) uv && { $(UV_INSTALL) $(1) || { echo "uv failed: pip installs instead."; $(PIP_INSTALL) $(1); }; }
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true

# Neither the pinned versions nor, for Keras, TensorFlow and Ray, the upper bounds of pyproject.toml: what fails here
# says what has to change before the bounds can rise.
NEWEST := $(VENV).newest
UNPINNED := env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT $(NEWEST)/bin/python -m pip install -qq

# An earlier demo is replaced. A folder that holds anything else stays, and the command says what is in the way.
DEMO_HOLDS := phantoms|\.phantoms\.unfinished-[0-9a-f]+|dataset|run|evaluation|feature-cache
REMOVE_DEMO := if [ -d $(DEMO) ] && ! ls -A $(DEMO) | grep -qvxE '$(DEMO_HOLDS)'; then rm -rf $(DEMO); fi

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## set up, then phantom X-rays -> dataset -> training -> evaluation, in ./demo
	@$(REMOVE_DEMO)
	$(BIN)/cxr-dist demo --out $(DEMO)

test: lint ## set up, then all checks and the tests of every change
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: lint ## set up, then all checks and all tests, those for the night too
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "nightly or not nightly" --hypothesis-profile=nightly

lint: docs ## set up, then the checks that run nothing: style, types, direction of imports, links of the documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

reference: $(VENV)/.installed ## write the generated pages of docs/: configuration keys and commands
	$(BIN)/python -m cxr_dist.cli.reference docs

docs: $(VENV)/.installed-test ## set up, then build the documentation into build/docs; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

audit: ## look for known vulnerabilities of the pinned dependencies, all extras included
	@test -x $(VENV)/audit/bin/pip-audit || { "$(PYTHON)" -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install -qq pip-audit; }
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

.PHONY: test-newest
test-newest: $(VENV)/.made ## the tests of every change with the newest dependencies, in an environment of its own
	@"$(PYTHON)" -m venv --clear $(NEWEST)
	@$(UNPINNED) -e ".[test]"
	@$(UNPINNED) --upgrade keras tensorflow "ray[default,serve,train,tune]"
	$(NEWEST)/bin/python -m pip list
	$(NEWEST)/bin/python -m pytest $(PYTEST_ARGS)

clean: ## remove the environment, caches and the demo
	@$(REMOVE_DEMO)
	rm -rf $(VENV) $(NEWEST) *.egg-info build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find cxr_dist tfrecords_builder tune_configs tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "error: PYTHON $(PYTHON): is not Python 3.11 to 3.13; give one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

# What `test` installs is all that `demo` needs and more, so it counts for both.
$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing the dependencies into $(VENV): about 1 GB to download, two to five minutes, once."
	@$(call INSTALL,-e .)
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing the dependencies and the checks into $(VENV): about 1 GB to download, two to five minutes, once."
	@$(call INSTALL,-e ".[test]")
	@$(COMPILE)
	@touch $(VENV)/.installed $@
