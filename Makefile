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

# Types are checked while the tests run, also those of the benchmarks, which no test runs, and shown after them. The many processes of the tests compile our code only once.
test: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	{ $(BIN)/mypy && $(BIN)/mypy --explicit-package-bases tests/benchmarks; } >$(VENV)/mypy.log 2>&1 & mypy=$$!; \
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --max-worker-restart 0 --dist loadfile \
	    --no-loadscope-reorder --durations 25; tests=$$?; \
	wait $$mypy; types=$$?; cat $(VENV)/mypy.log; exit $$((tests || types))

INSTALLED_FROM := pyproject.toml constraints.txt hatch_build.py layerwise/sparse/kernel.cpp layerwise/sparse/ranking.cpp

$(VENV)/.ready: $(INSTALLED_FROM)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

# In one step with the packages of the product, because a second installation would repeat half of the first one.
$(VENV)/.ready-test: $(INSTALLED_FROM)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $(VENV)/.ready $@
