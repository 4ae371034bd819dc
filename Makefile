# Everything happens in .venv, which is built once and again only when a requirements file changes.

PYTHON ?= python3
VENV ?= .venv
# Index of the torch wheels: PyTorch's CPU builds. Empty means PyPI alone, whose Linux wheels bring gigabytes of CUDA.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUNTIME := $(VENV)/.runtime
TOOLS := $(VENV)/.tools
DEMO_SHARDS := data/demo/demo_val_000000.bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(RUNTIME) $(DEMO_SHARDS)  ## tiny arms A and C on the CPU, with needle eval and a table (under 5 minutes on 2 cores)
	PYTHON=$(BIN)/python NPROC=1 CUDA_VISIBLE_DEVICES= ARMS='A C' ABLATION_NAME=demo \
	TRAIN_FILES='data/demo/demo_train_*.bin' VAL_FILES='data/demo/demo_val_*.bin' VOCAB_SIZE=257 DOC_DELIMITER=256 \
	NUM_LAYERS=4 NUM_HEADS=2 HEAD_DIM=64 MODEL_DIM=128 TRAIN_SEQ_LEN=2048 BATCH_TOKENS=2048 NUM_ITERATIONS=80 \
	VAL_SEQ_LEN=2048 VAL_TOKENS=32768 VAL_LOSS_EVERY=0 SCOPE_LOG_EVERY=20 \
	SPECTRAL_POINTER_LOCAL_BLOCKS=2 SPECTRAL_POINTER_HALF_BLOCKS=1 SPECTRAL_L_MAX=16384 \
	NEEDLE_SEQ_LEN=2048 NEEDLE_DISTANCES=256,512,1024 NEEDLE_SAMPLES_PER_DISTANCE=4 \
	./run_ablations.sh

test: lint  ## the linters, then the whole test suite
	$(BIN)/python -m pytest -n 3 --dist worksteal

lint: $(TOOLS)  ## the linters alone, offline
	$(BIN)/ruff check .
	$(BIN)/shellcheck run_ablations.sh .ci/run
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows

clean:  ## remove the environment, the caches and the demo's shards and runs
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis data/demo logs/demo
	find . -name __pycache__ -prune -exec rm -rf {} +

$(RUNTIME): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, and " \
		+ sys.executable + " is " + sys.version.split()[0] + "; name another with PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements-dev.txt)"
	$(PIP) install -r requirements.txt -c requirements-dev.txt
	touch $@

$(TOOLS): $(RUNTIME)
	$(PIP) install -r requirements-dev.txt
	touch $@

$(DEMO_SHARDS): data/make_demo_data.py | $(RUNTIME)
	$(BIN)/python data/make_demo_data.py
