#!/bin/sh
# Makes a virtual environment with this project installed in it for development, or brings an
# existing one up to date. Does nothing, quickly, when nothing it depends on has changed.
#
# usage: tools/venv.sh FOLDER
# environment: PYTHON  the interpreter (default: the newest usable one)
#              CXX     the C++20 compiler (default: the first that works)
#              WERROR  1: compiler warnings are errors
#              LOWEST  1: the lowest versions that pyproject.toml allows, instead of the newest
#              FLASHMOE_CUDA  1: with the CUDA module, for which a toolchain comes from PyPI
set -eu

venv=$1
cd "$(dirname "$0")/.."
say() { echo "==> $*"; }

# What the environment depends on. The path is part of it: neither a virtual environment nor an
# editable install survives a move.
key=$({
  pwd
  cat pyproject.toml Makefile tools/*.sh tools/*.py
  echo "${WERROR:-} ${LOWEST:-} ${FLASHMOE_CUDA:-}"
} | cksum)
identify='import sys; print(sys.version)'
python=''
if [ -n "${PYTHON:-}" ]; then
  if ! wanted=$("$PYTHON" -c "$identify"); then
    echo "PYTHON=$PYTHON does not run." >&2
    exit 1
  fi
  python=$PYTHON
fi
have=$("$venv/bin/python" -c "$identify" 2>/dev/null) || have=''

if [ -n "$have" ] && [ "${wanted:-$have}" = "$have" ] && [ -x "$venv/bin/pip" ]; then
  if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$key" ]; then exit 0; fi
  say "Updating $venv (Python ${have%% *})"
else
  if [ -z "$python" ]; then python=$(tools/find_python.sh); fi
  say "Creating $venv with $("$python" --version) ($python)"
  rm -rf "$venv" "build/$(basename "$venv")"
  "$python" -m venv "$venv"
fi
rm -f "$venv/.installed"
CXX=$(tools/find_compiler.sh)
PATH=$(cd "$venv/bin" && pwd):$PATH
export CXX PATH
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

say "1/4 Build tools"
"$venv/bin/python" tools/build_requirements.py >"$venv/build_requirements.txt"
pip install -r "$venv/build_requirements.txt" cmake ninja

say "2/4 XLA FFI headers of the oldest supported jaxlib"
headers=$("$venv/bin/python" tools/fetch_ffi_headers.py)

say "3/4 JAX, Flax and the development tools, then the C++ with $CXX (a minute or two)"
werror=OFF
if [ "${WERROR:-}" = 1 ]; then werror=ON; fi
: >"$venv/constraints.txt"
if [ "${LOWEST:-}" = 1 ]; then
  "$venv/bin/python" tools/lowest_versions.py >"$venv/constraints.txt"
fi
# Without being asked, kernels that nothing here could run are not compiled. Said either way, so
# that a build folder does not keep what an earlier run asked for.
toolchain=''
if [ "${FLASHMOE_CUDA:-}" = 1 ]; then
  cuda=ON
  toolchain=$("$venv/bin/python" tools/cuda_toolchain.py)
elif [ -e /dev/nvidiactl ]; then
  cuda=AUTO
else
  cuda=OFF
fi
# Without build isolation, since the import hook that rebuilds the C++ needs the build tools later.
pip install --no-build-isolation \
  --config-settings=build-dir="build/$(basename "$venv")" \
  --config-settings=editable.rebuild=true \
  --config-settings=cmake.define.FLASHMOE_FFI_INCLUDE_DIR="$headers" \
  --config-settings=cmake.define.FLASHMOE_WERROR="$werror" \
  --config-settings=cmake.define.FLASHMOE_CUDA="$cuda" \
  --config-settings=cmake.define.FLASHMOE_CUDA_TOOLCHAIN="$toolchain" \
  --constraint "$venv/constraints.txt" \
  --editable '.[flax,examples,bench,docs,dev]'

say "4/4 Checking that it imports"
"$venv/bin/python" -c 'import flashmoe_jax, jax
print("flashmoe_jax", flashmoe_jax.__version__, "with jax", jax.__version__)'
echo "$key" >"$venv/.installed"
