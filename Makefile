PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STORE ?= .layerwise

.PHONY: demo test

# The best of seven betas on a real model of 135M parameters and the text that comes with Python; some minutes on two cores.
# In float32, which every CPU has instructions for. Then how fast the pruned model is beside the dense one.
demo: $(VENV)/.ready
	$(BIN)/layerwise search --model demo --sparsity 0.6 --store $(STORE) --beta-count 6 --dtype float32 \
	    --seqlen 512 --calibration-windows 16 --selection-windows 12 --test-windows 12
	$(BIN)/layerwise bench $(STORE)

test: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder --durations 25

$(VENV)/.ready: pyproject.toml constraints.txt hatch_build.py layerwise/sparse/kernel.cpp \
    layerwise/sparse/ranking.cpp
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@
