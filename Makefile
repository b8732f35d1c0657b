# The environment is .venv: pyproject.toml lists what goes in, constraints.txt pins the versions.
# pip's own settings (indexes, proxies, caches) are left as the machine has them.

VENV := .venv
STAMP := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

# The first of these that is Python 3.11 or 3.12 is used to make the environment.
PYTHON ?= python3 python3.11 python3.12

# Jupyter and papermill prefer this environment's kernel "python3" to the user's own.
export JUPYTER_PREFER_ENV_PATH := 1
# What a first import compiles is kept, even where this is set to 1: otherwise every import takes 20 seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help reproduce reference studies test test-vllm test-smollm2 lab clean-venv

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

reproduce: $(STAMP)  ## run the whole loop with the tiny model (CPU, offline)
	HF_HUB_OFFLINE=1 $(VENV)/bin/sao run --recipe tiny

reference: $(STAMP)  ## rerun the committed reference: the same loop with five seeds
	HF_HUB_OFFLINE=1 $(VENV)/bin/sao run --recipe tiny --run reference --set 'seeds=[0, 1, 2, 3, 4]'

# Two at a time, with one thread each: they share no files, whereas two threads of one model wait for each other.
studies: $(STAMP)  ## rerun all studies of notebook 07, two at a time (50 minutes on two cores)
	printf '%s\n' size break-even labels prompts responses sensitivity algorithms lengths | \
	  OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 xargs -n 1 -P 2 $(VENV)/bin/sao study

test: $(STAMP)  ## run the tests
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test-vllm: $(STAMP) $(VLLM_STAMP)  ## run the tests that need vLLM, with a build for CPUs (4 minutes)
	HF_HUB_OFFLINE=1 SAO_VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python $(VENV)/bin/python -m pytest -q -m vllm tests/engines

test-smollm2: $(STAMP)  ## run the tests that need SmolLM2-135M-Instruct, which they download once (93 to 270 MB; 6 minutes)
	HF_HUB_OFFLINE=0 SAO_SMOLLM2=1 $(VENV)/bin/python -m pytest -q -m smollm2 -rs tests/test_smollm2.py

lab: $(STAMP)  ## open JupyterLab on the notebooks
	$(VENV)/bin/jupyter lab --ServerApp.root_dir=. notebooks/00_start_here.ipynb

clean-venv:  ## remove .venv, and .venv-vllm
	rm -rf $(VENV) $(VLLM_VENV)

# $(call install,VENV,ARGUMENTS): with uv, which takes seconds where pip takes minutes, or else with pip.
# uv does not read pip's settings, so it is given the wheel folders that pip searches. Neither compiles all of
# the 24,000 files: most of them are never imported, and the others are compiled when they first are.
define install
	@uv=$$(command -v uv) && links=$$($(1)/bin/python -m pip config list | sed -n "s/.*find-links='\(.*\)'/\1/p" | tr ' ' '\n' | sort -u | paste -sd ,) && \
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$links}" "$$uv" pip install -q --python $(1)/bin/python $(2) || { \
	  test -z "$$uv" || echo "uv could not do it (see above); pip does, in more than a minute."; \
	  $(1)/bin/python -m pip install -q --no-compile $(2); }
endef

$(STAMP): pyproject.toml constraints.txt
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { \
	  for python in $(PYTHON); do \
	    if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
	      echo "Making $(VENV) with $$python"; \
	      exec "$$python" -m venv $(VENV); \
	    fi; \
	  done; \
	  echo "This project needs Python 3.11 or 3.12, and none of these is one: $(PYTHON)." >&2; \
	  echo "Install one, or name it: make test PYTHON=/path/to/python3.12" >&2; \
	  exit 1; }
	@echo "Installing into $(VENV), once: seconds with uv, more than a minute with pip"
	$(call install,$(VENV),-c constraints.txt -e '.[dev]')
	@touch $@

# vLLM's CPU build is for tests only and stays out of .venv. All of it except torch is pinned by hash: pip
# takes the CPU build of torch if the machine has one, and its hash differs from machine to machine.
$(VLLM_STAMP): tests/vllm-requirements.txt | $(STAMP)
	@echo "Installing vLLM for its tests into $(VLLM_VENV), once: half a minute with uv, two with pip"
	@$(VENV)/bin/python -m venv --clear $(VLLM_VENV)
	$(call install,$(VLLM_VENV),--no-deps -c constraints.txt torch)
	$(call install,$(VLLM_VENV),--no-deps --require-hashes -r tests/vllm-requirements.txt)
	@touch $@
