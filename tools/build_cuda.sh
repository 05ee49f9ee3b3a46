#!/bin/sh
# Compiles the CUDA module with a toolchain from PyPI, tests what needs no GPU, and checks its
# machine code.
# Needs neither a GPU nor CUDA on the machine.
#
# usage: tools/build_cuda.sh PYTHON     the interpreter of an environment that venv.sh has made
# environment: CXX     the C++20 compiler (default: the first that works)
#              WERROR  1: compiler warnings are errors
set -eu

python=$1
cd "$(dirname "$0")/.."
build=build/cuda
PATH=$(cd "$(dirname "$python")" && pwd):$PATH
say() { echo "==> $*"; }
seconds() { date +%s; }

start=$(seconds)
CXX=$(tools/find_compiler.sh)
export CXX
toolchain=$("$python" tools/cuda_toolchain.py)
say "CUDA toolchain: $toolchain ($(du -sh "$toolchain" | cut -f 1), $(($(seconds) - start)) s)"

start=$(seconds)
werror=OFF
if [ "${WERROR:-}" = 1 ]; then werror=ON; fi
cmake -G Ninja -S . -B $build -DFLASHMOE_CUDA=ON -DFLASHMOE_CUDA_TOOLCHAIN="$toolchain" \
  -DFLASHMOE_INTROSPECTION=OFF -DFLASHMOE_WERROR=$werror -DPython_EXECUTABLE="$python" \
  -DFLASHMOE_FFI_INCLUDE_DIR="$("$python" tools/fetch_ffi_headers.py)" \
  -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)"
cmake --build $build --target _cuda
say "Compiled in $(($(seconds) - start)) s"

PYTHONPATH=$build/kernels "$python" -c 'import _cuda; print("==> It imports:", _cuda.__file__)'
# With FLASHMOE_CUDA=1 its tests are not skipped.
FLASHMOE_CUDA=1 PYTHONPATH=$build/kernels:tools "$python" -m pytest -q -p built_cuda \
  tests/test_cuda_module.py
(cd $build/kernels && ls -l _cuda*.so ./*.cu.o network_*.fatbin)
say "Machine code"
set --
for log in $build/kernels/*.cu.o.log $build/kernels/network_*.log; do set -- "$@" --log "$log"; done
for image in $build/kernels/network_*.fatbin; do set -- "$@" --network "$image"; done
"$python" tools/check_machine_code.py "$@" $build/kernels/_cuda*.so
