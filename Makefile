# Every command of the study; the README says what each prints and how long it takes.

# The interpreter that .venv is built with; to change it later, delete .venv first.
PYTHON ?= python3
# More arguments for pip, such as an index with another build of torch.
PIP_ARGS ?=
# A file of params/studies/, without .yaml, and how many of its runs go side by side.
STUDY ?= quick
CORES ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

RUN := .venv/bin/python
STAMP := .venv/.setup-complete

# Run by the interpreter in question, so the syntax is that of any Python.
define CHECK_PYTHON
import sys
found = sys.version_info[:2]
if not (3, 11) <= found <= (3, 13):
    sys.exit("This study needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is %d.%d: "
             "name another one, as in `make setup PYTHON=python3.12`." % found)
endef
export CHECK_PYTHON

define REPORT
import platform
from importlib.metadata import version
print(f"Ready in .venv: Python {platform.python_version()}, torch {version('torch')}, kernel python3.")
endef
export REPORT

.DEFAULT_GOAL := help
.PHONY: help setup study test lab bench book publish

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## build .venv with the pinned packages and this project (PYTHON=python3.12, PIP_ARGS=...)
	@$(RUN) -c "$$REPORT"

# Rebuilt only where no working pip is found (never set up, interrupted, or an interpreter that is gone), else brought
# up to date in place.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(RUN) -m pip --version >/dev/null 2>&1; then \
	    command -v $(PYTHON) >/dev/null || { \
	        echo "No interpreter $(PYTHON) is on this machine: name one, as in \`make setup PYTHON=python3.12\`." >&2; \
	        exit 1; }; \
	    $(PYTHON) -c "$$CHECK_PYTHON" && $(PYTHON) -m venv --clear .venv; \
	fi
	@echo "Installing the pinned packages into .venv: some minutes the first time ..."
	@$(RUN) -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[test,pipeline,embedding,book]'
	@touch $@

study: $(STAMP) ## run a study end to end, or what is missing of it (STUDY=ml-100k, CORES=4)
	$(RUN) -m causaldpo_lib.study $(STUDY) --cores $(CORES)

test: export HF_HUB_OFFLINE := 1
test: $(STAMP) ## pytest, then every notebook at its default parameters
	$(RUN) -m pytest
	$(RUN) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 900 notebooks/

lab: $(STAMP) ## JupyterLab in notebooks/
	$(RUN) -m jupyterlab notebooks/

bench: $(STAMP) ## the benchmarks: a table here, json in results/bench/
	$(RUN) -m benchmarks.run

book: $(STAMP) ## all notebooks as linked HTML pages in results/book/html; executes nothing, needs no network
	$(RUN) -m sphinx -n -W --keep-going -q -b html -d results/book/doctrees -c book . results/book/html
	@echo "Open results/book/html/index.html"

publish: $(STAMP) ## copy a finished study's tables and figures to figures/, renew README and notebooks (STUDY=ml-100k)
	$(RUN) -m causaldpo_lib.study $(STUDY) --publish
