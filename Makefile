# Each target sets up its own virtual environment on first use. PY=/path/to/python runs on an interpreter that
# already has the packages instead, such as that of a GPU machine without a network.

.PHONY: demo test test-hf-oldest lint gpu bench clean

ifdef PY
export PYTHONPATH := $(CURDIR)
else
PY = $(VENV)/bin/python
SETUP = $(VENV)/installed
endif

demo test test-hf-oldest lint: VENV = .venv
gpu bench: VENV = .venv-gpu

.SECONDEXPANSION:

demo: $$(SETUP)  ## a real model's keys scored by both frameworks, and text from compressed caches; CPU
	$(PY) examples/demo.py $(DEMO)

test: $$(SETUP)  ## the whole suite; kernels interpreted, and compiled without a GPU
	$(PY) -m pytest -n auto -q

test-hf-oldest: $$(SETUP)  ## caches of Hugging Face models with the oldest transformers that is supported
	test -d .hf-oldest/transformers || $(PY) -m pip install -q --target .hf-oldest transformers==5.0.0 numpy==2.4.6
	PYTHONPATH=$(CURDIR):$(CURDIR)/.hf-oldest $(PY) -m pytest -n auto -q tests/test_transformers.py

lint: $$(SETUP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

gpu: $$(SETUP)  ## the whole suite on a CUDA device; skipped but for want of a CPU or a second device: failed
	$(PY) -m pytest -n 14 -q --require -p no:benchmark

bench: $$(SETUP)  ## gate, then time; what changed since the committed results; plots; CUDA
	$(PY) benchmarks/bench.py
	$(PY) benchmarks/plot.py

.venv/installed: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

.venv-gpu/installed: pyproject.toml
	python3 -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install -q --disable-pip-version-check -e ".[cuda,test]"
	touch $@

clean:
	rm -rf .venv .venv-gpu .hf-oldest demo.png
