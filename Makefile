# `make demo` runs the whole job on a small model; `make test` runs the tests; `make check` the linters and types.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
INSTALLED := .venv/installed
DEMO_MODEL := results/demo-model

.PHONY: help demo test torture check clean
KILLS := 20
SEED := 0

help:
	@echo "make demo   run the whole job on SmolLM2-135M, on the CPU, in under 10 minutes"
	@echo "make test   all tests"
	@echo "make torture KILLS=20 SEED=0   kill the job so many times, and compare with a run left alone"
	@echo "make check  ruff, mypy, shellcheck, hadolint, manifest schemas"
	@echo "make clean  remove the environment and all results"

$(INSTALLED): requirements.in requirements-dev.txt
	@echo "Making the Python environment in .venv; this takes a minute or two."
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(DEMO_MODEL)/config.json: $(INSTALLED) examples/fetch_demo_model.py
	$(PYTHON) examples/fetch_demo_model.py $(DEMO_MODEL)

demo: $(INSTALLED) $(DEMO_MODEL)/config.json
	set -a; source examples/demo.env; set +a; $(PYTHON) entrypoint.py

test: $(INSTALLED)
	$(PYTHON) -m pytest

torture: $(INSTALLED)
	$(PYTHON) -m tests.torture --kills $(KILLS) --seed $(SEED)

check: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	.venv/bin/shellcheck slurm/*.sh .ci/run
	.venv/bin/hadolint Dockerfile
	for version in 1.30 1.37; do for file in k8s/finetune-*.yaml; do \
	  .venv/bin/kubernetes-validate --strict -k $$version $$file; done; done

clean:
	rm -rf .venv results
