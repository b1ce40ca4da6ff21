# One task file: people, CI and the commit hooks call these targets and nothing else.
# Each recipe is a line or two over commands that also work without make; CONTRIBUTING.md lists them.

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup tools course test check train lab run bench image up down smoke push audit sbom promote rollback history publish export lock clean

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

# What tests need and Python packages cannot bring. Already there: nothing is done, and no right is needed.
# Prometheus and Alertmanager come from the images that docker-compose.yml names: packages of distributions are older.
PROMETHEUS_IMAGE ?= prom/prometheus:v3.5.3
ALERTMANAGER_IMAGE ?= prom/alertmanager:v0.33.1
tools: ## Install wrk (Debian and Ubuntu) and, from their images, prometheus, promtool and amtool, if they are missing
	command -v wrk || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install --yes -qq --no-install-recommends wrk; }
	for one in prometheus@$(PROMETHEUS_IMAGE) promtool@$(PROMETHEUS_IMAGE) amtool@$(ALERTMANAGER_IMAGE); do \
	  command -v $${one%%@*} || { id=$$(docker create $${one#*@}) && docker cp $$id:/bin/$${one%%@*} - | $(SUDO) tar -x -C /usr/local/bin; \
	    docker rm $$id > /dev/null; command -v $${one%%@*}; } || exit 1; done

course: setup ## Run the chapters on the full data; notebooks and pages go to build/
	$(BIN)/python -m ops course

check: setup ## Lint, types, import layers, workflows, and that the generated modules match the chapters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --persona pedantic --quiet .github/workflows
	$(BIN)/python -m ops roundtrip

# The tests look at a course of their own: what a learner has built in artifacts/ neither helps nor hinders them.
test: check ## Everything that CI checks: check, every chapter through papermill, the tests
	rm -rf build/test
	$(BIN)/python -m ops course --build build/test --artifacts build/test/artifacts
	$(BIN)/python -m pytest --junitxml=build/test/junit.xml

train: setup ## Train, pass the gates and package the releases
	$(BIN)/python -m ops train

lab: setup ## Open the book in JupyterLab
	$(BIN)/jupyter lab chapters/01_blueprint.ipynb

run: setup ## Serve the released model on port 8000
	$(BIN)/python -m service

bench: setup ## Compare speed and size with other servers of the same model (needs wrk)
	$(BIN)/python -m ops bench

image: setup ## Build this commit's images, print their size; ARCHIVE=FILE also saves them (needs Docker)
	@mkdir -p build
	$(BIN)/python -m ops image $(if $(ARCHIVE),--archive "$$ARCHIVE")

up: setup ## Start service, Envoy and what watches them, print the URLs; CHANNEL=prod runs that release (needs Docker)
	$(BIN)/python -m ops up $(if $(CHANNEL),--channel "$$CHANNEL") $(if $(STORE),--store "$$STORE")

down: setup ## Stop and remove these containers; VOLUMES=1 deletes their samples too
	$(BIN)/python -m ops down $(if $(VOLUMES),--volumes)

# Values that somebody types into a form reach these commands as variables of the shell ($$X), never as its text.
push: setup ## Push this commit's images to REGISTRY, once; ARCHIVE=FILE loads them, OUTPUT=FILE gets the digest
	@test -n "$$REGISTRY" || { echo "name the registry, without http://: make push REGISTRY=ghcr.io/NAME" >&2; exit 2; }
	@case "$$REGISTRY" in *://*) echo "REGISTRY is host/name, without http://: make push REGISTRY=ghcr.io/NAME" >&2; exit 2;; esac
	$(BIN)/python -m ops push --registry "$$REGISTRY" \
	  $(if $(ARCHIVE),--archive "$$ARCHIVE") $(if $(OUTPUT),--output "$$OUTPUT")

audit: setup ## Look for known vulnerabilities of every locked package (asks PyPI)
	$(BIN)/python -m ops audit

# The warning says that a lock is a flat list, without what needs what.
sbom: setup ## Write the list of the service's packages, in CycloneDX format, to build/sbom/
	mkdir -p build/sbom
	$(BIN)/python -W ignore::UserWarning -m cyclonedx_py requirements service/requirements.lock \
	  --pyproject pyproject.toml --output-reproducible --output-file build/sbom/service.cdx.json

promote: setup ## Check release DIGEST where it runs (URL) and move channel TO; also NOTE, BY, STORE
	@test -n "$$DIGEST" || { echo "name the release: make promote DIGEST=sha256:… TO=staging (make history lists them)" >&2; exit 2; }
	@test -n "$$TO" || { echo "name the channel: make promote DIGEST=… TO=staging, or TO=prod" >&2; exit 2; }
	$(BIN)/python -m ops promote "$$DIGEST" --to "$$TO" $(if $(URL),--url "$$URL") --note "$$NOTE" \
	  $(if $(BY),--by "$$BY") $(if $(STORE),--store "$$STORE")

rollback: setup ## Put the release before this one back in channel TO (prod); also NOTE, BY, STORE
	$(BIN)/python -m ops rollback $(if $(TO),--channel "$$TO") --note "$$NOTE" $(if $(BY),--by "$$BY") \
	  $(if $(STORE),--store "$$STORE")

history: setup ## Check and print the ledger of releases; also STORE
	$(BIN)/python -m ops history $(if $(STORE),--store "$$STORE")

publish: setup ## Copy reports into docs/ and renew the numbers and tables in the documents
	$(BIN)/python -m ops publish

smoke: setup ## Ask a running service for a prediction and check the answer; CHANNEL=prod: it runs that release
	$(BIN)/python -m ops smoke $(if $(CHANNEL),--channel "$$CHANNEL") $(if $(STORE),--store "$$STORE")

export: setup ## Clean the chapters and write mlops_course from them
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

lock: setup ## Resolve the lock files again; UPGRADE=1 takes the newest allowed versions
	$(BIN)/python -m ops lock $(if $(UPGRADE),--upgrade,--no-upgrade)

clean: ## Remove build/ and the tools' caches; .venv and artifacts/ stay
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
