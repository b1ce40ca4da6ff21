# One task file: people, CI and the commit hooks call these targets and nothing else.
# Each recipe is a line or two over commands that also work without make; CONTRIBUTING.md lists them.

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup course test check train lab run image up down publish smoke export lock clean

help: ## Show this list
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-8s %s\n", $$1, $$2 }'

setup: $(STAMP) ## Create .venv from requirements.lock (again only when the lock or pyproject.toml changed)

# uv installs the lock in seconds where pip takes minutes, so pip installs only uv, from its hashed lines in the lock.
# The project itself comes last and in editable mode: chapters, tests and commands import it from any folder.
$(STAMP): requirements.lock pyproject.toml
	@found=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); \
	if [ "$$found" != 3.11 ]; then \
	  echo "This project needs Python 3.11, but $(PYTHON) is $${found:-not there}." >&2; \
	  echo "Install Python 3.11, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@if [ -e $(BIN)/python ] && [ "$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" != 3.11 ]; then \
	  echo "$(VENV) was made by another Python. Remove it (rm -rf $(VENV)) and run make setup again." >&2; exit 1; fi
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || { sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.txt && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(VENV)/uv.txt; }
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

course: setup ## Run the chapters on the full data; notebooks and pages go to build/
	$(BIN)/python -m ops course

check: setup ## Lint, types, import layers, and that the generated modules match the chapters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m ops roundtrip

# The tests look at a course of their own: what a learner has built in artifacts/ neither helps nor hinders them.
test: check ## Everything that CI checks: check, every chapter through papermill, the tests
	rm -rf build/test
	$(BIN)/python -m ops course --build build/test --artifacts build/test/artifacts
	$(BIN)/python -m pytest

train: setup ## Train, pass the gates and package the releases
	$(BIN)/python -m ops train

lab: setup ## Open the book in JupyterLab
	$(BIN)/jupyter lab chapters/01_blueprint.ipynb

run: setup ## Serve the released model on port 8000
	$(BIN)/python -m service

image: setup ## Build the service's image from this commit and print its size (needs Docker)
	$(BIN)/python -m ops image

up: setup ## Start Envoy and the service in containers, wait until they are ready, print the URLs (needs Docker)
	$(BIN)/python -m ops up

down: setup ## Stop and remove these containers
	$(BIN)/python -m ops down

publish: setup ## Copy reports into docs/ and renew the numbers and tables in the documents
	$(BIN)/python -m ops publish

smoke: setup ## Ask a running service for a prediction and check the answer
	$(BIN)/python -m ops smoke

export: setup ## Clean the chapters and write mlops_course from them
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

lock: setup ## Resolve both lock files again; UPGRADE=1 takes the newest allowed versions
	$(BIN)/python -m ops lock $(if $(UPGRADE),--upgrade,--no-upgrade)

clean: ## Remove build/ and the tools' caches; .venv and artifacts/ stay
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
