# `make demo` and `make test` need nothing but Python (3.10 to 3.13) and make: they create what they need in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARALLEL := -n 2 --dist worksteal

# Where an NVIDIA driver shows itself. Without one `make gpu` says what it skips, and installs nothing.
NVIDIA := $(wildcard /dev/nvidia0 /dev/nvidiactl /dev/dxg /proc/driver/nvidia/version)
# torch comes from here in `make gpu`: PyPI's CUDA build, or another one for an older driver, such as that of
# https://download.pytorch.org/whl/cu126. Its version is that of constraints.txt, as are all others.
GPU_INDEX ?= https://pypi.org/simple
GPU_VENV := $(if $(NVIDIA),.venv-gpu,$(VENV))

.PHONY: demo notebooks test lint types unit triton docs gpu clean

demo: $(VENV)/.installed
	$(BIN)/python examples/compare.py

# Executes examples/notebooks/*.ipynb, and saves them with their outputs.
notebooks: $(VENV)/.installed
	$(BIN)/python examples/notebooks/execute.py

test: lint types unit docs

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

# Unit, multi-process and trainer tests, and the doctests of the package.
# And those of the trainer once more for a program that imports `pytorch_lightning`.
# Two at a time, since many wait for an import or for another rank.
unit: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL)
	$(BIN)/python tests/other_namespace.py $(PARALLEL) tests/strategies/test_powersgd.py tests/strategies/test_launch.py

# The kernels for GPUs, without one: interpreted, and compiled. Downloads Triton.
triton: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[triton]'
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/compressor/test_fused.py tests/exchange/test_fused_steps.py

docs: $(VENV)/.installed
	$(BIN)/sphinx-build -W --keep-going docs docs/_build

# Tests and benchmarks that need a GPU, into gpu_results/: 20 minutes at most, once the environment is there.
gpu: $(GPU_VENV)/.installed
	$(GPU_VENV)/bin/python examples/benchmarks/gpu.py

# The CUDA build of torch, whatever pip is set to for the CPU's.
.venv-gpu/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip --isolated install --constraint constraints.txt --index-url $(GPU_INDEX) --extra-index-url https://pypi.org/simple torch
	.venv-gpu/bin/pip install --quiet --constraint constraints.txt --editable '.[tests]'
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[examples,tests,docs]'
	touch $@

clean:
	rm -rf $(VENV) .venv-gpu build dist docs/_build docs/jupyter_execute docs/notebooks demo_results gpu_results
