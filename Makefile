# `make demo` runs the whole job on a small model, `make test` the tests, `make check` the linters and type checks.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
INSTALLED := .venv/installed
DEMO_MODEL := results/demo-model

# for example, BENCH="--runs 1 --only 'job;unsloth'"
BENCH :=

.PHONY: help demo test test-slow test-real test-export torture bench-gpu check audit docs picture lock image push image-test system-packages clean
IMAGE := finetune-job:0.2.0
SYSTEM_PACKAGES := g++ slurmctld slurmd slurm-client munge buildah podman runc catatonit debootstrap iptables netavark prometheus
# PyPI's last build of PyTorch for CUDA 12
CUDA_12_TORCH := 2.10.0
# where uv finds PyTorch's CPU build
CPU_WHEELS := https://download.pytorch.org/whl/cpu/torch/
# for CPUs with AMX in virtual machines that do not allow it: llama.cpp would use it, and crash
LLAMA_CPP := -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON
KILLS := 20
SEED := 0

help:
	@echo "make demo   run the whole job on SmolLM2-135M, on the CPU, in under 10 minutes"
	@echo "make test   run the tests: some 25 minutes on 2 cores, without root"
	@echo "make test-slow   run the slow tests: lost nodes, signals, torture"
	@echo "make test-real   (root) run the tests on a real Slurm, in real containers and with a real Prometheus"
	@echo "make system-packages   (root, Debian) install Slurm, buildah, podman and Prometheus for the tests that need them"
	@echo "make test-export   build llama.cpp and run the tests of FT_EXPORT with it"
	@echo "make torture KILLS=20 SEED=0   kill the job KILLS times, then compare with an undisturbed run"
	@echo "make bench-gpu   (needs a GPU) compare training speed with the other trainers installed"
	@echo "make check  run ruff, mypy, shellcheck, hadolint, the manifest schemas and the audit"
	@echo "make audit  look for known vulnerabilities in what the image installs"
	@echo "make image  build the image with docker"
	@echo "make push IMAGE=registry/name:tag   build it and push it with its SBOM and provenance (PLATFORMS=linux/amd64,linux/arm64)"
	@echo "make image-test   build the CPU image with buildah and run its tests"
	@echo "make docs   write the tables of the docs that the code decides"
	@echo "make picture   run the demo and draw the picture of the README"
	@echo "make lock   resolve requirements.in into the three lock files"
	@echo "make clean  remove .venv and all results"

$(INSTALLED): requirements.in requirements-dev.txt
	@echo "Creating the Python environment in .venv. This takes a minute or two."
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(DEMO_MODEL)/config.json: examples/fetch_demo_model.py | $(INSTALLED)
	$(PYTHON) examples/fetch_demo_model.py $(DEMO_MODEL)

demo: $(INSTALLED) $(DEMO_MODEL)/config.json
	set -a; source examples/demo.env; set +a; $(PYTHON) entrypoint.py

test: $(INSTALLED)
	$(PYTHON) -m pytest

test-slow: $(INSTALLED)
	$(PYTHON) -m pytest -m slow

test-real: $(INSTALLED)
	$(PYTHON) -m pytest -m "real and not export" tests/real

# builds llama.cpp: five minutes on 2 cores, and a C++ compiler and cmake
test-export: $(INSTALLED)
	CMAKE_ARGS="$(LLAMA_CPP)" $(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-export.txt
	$(PYTHON) -m pytest -m export tests/real/test_export.py

torture: $(INSTALLED)
	$(PYTHON) -m tests.torture --kills $(KILLS) --seed $(SEED)

bench-gpu: $(INSTALLED)
	$(PYTHON) -m benchmarks.training_speed $(BENCH)

check: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	.venv/bin/shellcheck slurm/*.sh .ci/run
	.venv/bin/hadolint Dockerfile
	for version in 1.30 1.37; do for file in k8s/finetune-*.yaml; do \
	  .venv/bin/kubernetes-validate --strict -k $$version $$file; done; done
	$(MAKE) --no-print-directory audit

# A mirror of PyPI may lack the vulnerability data. pip-audit would then skip every package, which would look like a pass.
AUDIT := .venv/audit/bin/python
AUDITED := https://pypi.org/pypi/torch/$$(sed -n 's/^torch==//p' requirements.in)/json
audit: $(INSTALLED)
	if $(PYTHON) -c "import sys, urllib.request as web; web.urlopen(sys.argv[1], timeout=10)" $(AUDITED) 2>/dev/null; then \
	  test -x $(AUDIT) || python3 -m venv .venv/audit; \
	  $(AUDIT) -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1; \
	  $(AUDIT) -m pip_audit --strict --disable-pip --no-deps --progress-spinner off --requirement requirements.txt; \
	else echo "Not audited: PyPI's vulnerability data cannot be reached from here."; fi

image:
	docker build --build-arg REVISION=$$(git rev-parse HEAD) --tag $(IMAGE) .

PLATFORMS := linux/amd64
push:
	docker buildx build --platform $(PLATFORMS) --sbom=true --provenance=mode=max \
	  --build-arg REVISION=$$(git rev-parse HEAD) --tag $(IMAGE) --push .

docs: $(INSTALLED)
	$(PYTHON) docs/generate.py

picture: $(INSTALLED) $(DEMO_MODEL)/config.json
	$(PYTHON) examples/record_demo.py

image-test: $(INSTALLED)
	ALL_TESTS_MUST_RUN=1 $(PYTHON) -m pytest -n 1 -m "real and not export" tests/real/test_image.py

# The last lines prove that each kind of machine finds a wheel with one of the hashes for every line of its lock.
lock: $(INSTALLED)
	$(PYTHON) -m pip install --quiet uv==0.13.9
	$(LOCK) requirements.in --output-file requirements.txt
	mkdir -p results
	echo torch==$$(sed -n 's/^torch==//p' requirements.in)+cpu > results/cpu.override
	$(LOCK) --override results/cpu.override --find-links $(CPU_WHEELS) requirements.in --output-file requirements-cpu.txt
	echo torch==$(CUDA_12_TORCH) > results/cu128.override
	cp requirements.txt requirements-cu128.txt  # uv keeps what it finds, where it can
	$(LOCK) --override results/cu128.override requirements.in --output-file requirements-cu128.txt
	for case in requirements.txt:x86_64 requirements.txt:aarch64 requirements-cu128.txt:x86_64; do \
	  .venv/bin/uv pip install --dry-run --quiet --no-deps --require-hashes --only-binary :all: --python-version 3.12 \
	  --python-platform $${case#*:}-manylinux_2_28 --target results/lock --requirement $${case%:*}; done
LOCK = .venv/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --quiet --custom-compile-command "make lock"

system-packages:
	apt-get update --quiet=2
	DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet=2 --no-install-recommends $(SYSTEM_PACKAGES) \
	  $$(command -v kubectl >/dev/null || echo kubernetes-client)

clean:
	rm -rf .venv results
