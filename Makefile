# Every target makes what it needs by itself and may be run again at any time. Settings:
#   PYTHON=python3.12    the interpreter, instead of the newest one found (3.11 to 3.14)
#   CXX=clang++          the C++20 compiler, instead of the first one found
#   VENV=.venv           the folder of the virtual environment
#   ARGS="..."           more arguments for the demo or for pytest
#   WERROR=1             compiler warnings are errors
#   LOWEST=1             the lowest versions of JAX and the like, instead of the newest
#   FLASHMOE_CUDA=1      with the CUDA module too (venv, wheel, bazel-test)
VENV ?= .venv
ARGS ?=
PYTEST_WORKERS ?= 2

BIN := $(abspath $(VENV))/bin
# The import hook of the editable install runs `cmake` from PATH when a C++ source has changed.
export PATH := $(BIN):$(PATH)

CXX_SOURCES = $(shell find kernels tests -name '*.h' -o -name '*.cc' -o -name '*.cu*')
# GCC's ThreadSanitizer cannot place its shadow memory on kernels with much address randomisation.
NO_ASLR = $(shell setarch -R true 2>/dev/null && echo setarch -R)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-smoke soak bench native-test native-tsan native-asan emulator-build emulator-test emulator-soak cuda gpu-check bazel-test docs wheel lint format clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20
	@echo "Settings, such as PYTHON=python3.12, are at the top of the Makefile."

venv:  ## make or update the virtual environment that all the others use
	@tools/venv.sh $(VENV)

demo: venv  ## train a small MoE language model on 8 virtual CPU devices
	$(BIN)/python examples/train_lm.py $(ARGS)

test: native-test emulator-test  ## run all tests
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup $(ARGS)

test-smoke: venv  ## run the part of the tests that every supported Python runs
	FLASHMOE_TESTS_AS_USERS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup -m smoke $(ARGS)

soak: venv  ## compare every combination of cases with the oracle (about an hour)
	FLASHMOE_SOAK=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup tests/equivalence $(ARGS)

bench: venv  ## measure the operator against its alternatives (minutes)
	$(BIN)/python -m benchmarks $(ARGS)

native-test: native-tsan native-asan  ## run the native stress test under the sanitizers

native-tsan: SANITIZER = thread
native-tsan: RUN = $(NO_ASLR)
native-asan: SANITIZER = address
native-tsan native-asan: native-%: venv
	@echo "==> Native stress test under the $(SANITIZER) sanitizer"
	@CXX=$$(tools/find_compiler.sh) && export CXX && cmake -G Ninja -S . -B build/$* \
	    -DFLASHMOE_PYTHON_MODULES=OFF -DFLASHMOE_NATIVE_TESTS=ON \
	    -DFLASHMOE_SANITIZE=$(SANITIZER) -DFLASHMOE_WERROR=$(if $(filter 1,$(WERROR)),ON,OFF) \
	    -DFLASHMOE_FFI_INCLUDE_DIR="$$($(BIN)/python tools/fetch_ffi_headers.py)" \
	    -DPython_EXECUTABLE=$(BIN)/python
	cmake --build build/$*
	$(RUN) ctest --test-dir build/$* --verbose

emulator-build: venv
	@echo "==> Emulator"
	@CXX=$$(tools/find_compiler.sh) && export CXX && cmake -G Ninja -S . -B build/emulator \
	    -DFLASHMOE_PYTHON_MODULES=OFF -DFLASHMOE_NATIVE_TESTS=ON -DFLASHMOE_CUDA=OFF \
	    -DCMAKE_EXPORT_COMPILE_COMMANDS=ON \
	    -DFLASHMOE_WERROR=$(if $(filter 1,$(WERROR)),ON,OFF) \
	    -DFLASHMOE_FFI_INCLUDE_DIR="$$($(BIN)/python tools/fetch_ffi_headers.py)" \
	    -DPython_EXECUTABLE=$(BIN)/python
	cmake --build build/emulator --target emulator_tests kernel_tests network_tests

emulator-test: emulator-build  ## run the CUDA kernel in the emulator, on the CPU
	build/emulator/tests/emulator/emulator_tests --jobs=$(PYTEST_WORKERS)
	build/emulator/tests/emulator/kernel_tests --jobs=$(PYTEST_WORKERS)
	build/emulator/tests/emulator/network_tests --jobs=$(PYTEST_WORKERS)
	$(BIN)/python tools/plant_kernel_faults.py build/emulator --jobs=$(PYTEST_WORKERS)

emulator-soak: emulator-build  ## the same with 20,000 schedules of each protocol case (hours)
	for program in kernel_tests network_tests; do \
	  build/emulator/tests/emulator/$$program --jobs=$$(nproc) --schedules=20000 schedules $(ARGS) || exit; \
	done

cuda: venv  ## compile the CUDA module with a toolchain from PyPI, and check its machine code
	tools/build_cuda.sh $(BIN)/python

# Without `venv`: such a machine may have no network. PYTHON's environment has what is needed.
gpu-check:  ## check the CUDA kernel on this machine's GPU, and measure it
	$(or $(PYTHON),$(wildcard $(BIN)/python),python3) tools/gpu_check.py $(ARGS)

bazel-test: venv  ## build everything with Bazel too, and run the native and the smoke tests on it
	bazel=$$(tools/find_bazel.sh) && PYTHON=$(BIN)/python $$bazel test //... --test_output=errors

docs: venv  ## build the documentation, warnings are errors
	$(BIN)/python -m mkdocs build --strict

wheel:  ## build the sdist and the wheels, check them, and try them in empty environments
	tools/build_wheels.sh

lint: venv  ## check style, types and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format:  venv  ## rewrite the sources in the project's format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:  ## remove everything that make made, the virtual environments included
	rm -rf $(VENV) .venv* build dist .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
