# One command for each job; `make help` lists them. Needs Python 3.10 to 3.12 and make, nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo tables report test test-gpu test-faults test-export audit lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(STAMP)  ## virtual environment with everything, and the project itself (editable)

# The stamp is written last: an interrupted installation is taken up again.
$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: install  ## pretrain a tiny M2-BERT on English text that Python brings along, and let it fill in words
	$(BIN)/python -m bert.data.prepare --source embedded --out data/demo --train-tokenizer 4096 --seq-len 128
	$(BIN)/composer main.py yamls/pretrain/m2-demo.yaml
	$(BIN)/python -m bert.fill_mask runs/m2-demo \
	    "Return a [MASK] of the object." \
	    "If the argument is [MASK] a string, raise an exception." \
	    "The default value is [MASK]." \
	    "This method is called [MASK] the file is closed."
	@echo "loss curve: runs/m2-demo/loss.png"

tables: install  ## the paper's tables beside ours: results/tables/tables.md, .json and a picture
	$(BIN)/python -m bert.tables

report: install  ## docs/results.md from the studies' files in results/ (python -m bert.study makes them)
	$(BIN)/python -m bert.report

test: install  ## the whole test suite, on the CPU, with all its cores
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test-gpu: install  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu -n 4

test-faults: install  ## fault injection, all of it (docs/reliability.md); some minutes to half an hour
	$(BIN)/python -m pytest tests/faults -m "not gpu" --durations=0

# Environments without this project, kept outside of the clone by the hash of what is to be in them.
EXPORT_ENVS ?= $(HOME)/.cache/monarch-mixer-export
export_env   = $(EXPORT_ENVS)/v$(1)-$(firstword $(shell sha256sum tests/export/transformers-$(1).txt | cut -c1-12))
EXPORT_4    := $(call export_env,4)
EXPORT_5    := $(call export_env,5)
$(EXPORT_4)/.installed: REQUIREMENTS := tests/export/transformers-4.txt
$(EXPORT_5)/.installed: REQUIREMENTS := tests/export/transformers-5.txt
$(EXPORT_4)/.installed $(EXPORT_5)/.installed:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	touch $@

test-export: install $(EXPORT_4)/.installed $(EXPORT_5)/.installed  ## exported folders with transformers 4 and 5 alone
	EXPORT_4=$(EXPORT_4) EXPORT_5=$(EXPORT_5) $(BIN)/python -m pytest tests/export -m export

audit: install  ## known vulnerabilities of the requirements (needs pypi.org); fails where a package cannot be looked up
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	grep -v '^-e' requirements.txt > $(VENV)/audited.txt
	$(BIN)/python -m pip_audit --strict -r $(VENV)/audited.txt

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## let ruff format and mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what demo and tests left (not the virtual environment)
	rm -rf data/demo runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
