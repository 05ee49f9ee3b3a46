#!/bin/sh
# Prints the newest usable CPython from version MIN to version MAX; says why there is none.
#
# usage: tools/find_python.sh [MIN [MAX]]        for example: tools/find_python.sh 3.12
#
# Usable: it really runs (a pyenv shim may exist for a version that is not selected), is a released
# 64-bit CPython with a GIL, can make a virtual environment with pip in it, and has its C headers.
# The ends of the range are the versions that the oldest supported jaxlib has wheels for.
set -eu

min=${1:-3.11}
max=${2:-3.14}

probe='
import importlib.util, os, struct, sys, sysconfig
low, high = (tuple(map(int, v.split("."))) for v in sys.argv[1:3])
version = sys.version_info[:2]
if not low <= version <= high:
    sys.exit(2)
name = "python%d.%d" % version
if sys.implementation.name != "cpython" or struct.calcsize("P") != 8:
    sys.exit("not a 64-bit CPython")
if sys.version_info.releaselevel != "final" or sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit("a pre-release or free-threaded build")
if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
    sys.exit("no venv or ensurepip (Debian, Ubuntu: apt-get install %s-venv)" % name)
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit("no Python.h (Debian, Ubuntu: apt-get install %s-dev)" % name)
print("%03d %03d %s" % (*sys.version_info[1:3], sys.executable))
'

rejected=''
found=$(mktemp)
trap 'rm -f "$found" "$found.err"' EXIT
consider() {
  code=0
  "$1" -c "$probe" "$min" "$max" >>"$found" 2>"$found.err" </dev/null || code=$?
  if [ "$code" -ne 0 ] && [ "$code" -ne 2 ]; then
    rejected="$rejected
  $1: $(grep . "$found.err" | head -n 1)"
  fi
}

for name in python3.14 python3.13 python3.12 python3.11 python3 python; do
  # Every one on PATH, not only the first: a broken shim may hide a good interpreter.
  oldifs=$IFS
  IFS=:
  for folder in $PATH; do
    IFS=$oldifs
    if [ -x "$folder/$name" ]; then consider "$folder/$name"; fi
  done
  IFS=$oldifs
done
for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python; do
  if [ -x "$candidate" ]; then consider "$candidate"; fi
done

if [ -s "$found" ]; then
  # Of equal versions the first found, which PATH prefers.
  sort -s -r -k1,2 "$found" | head -n 1 | cut -d ' ' -f 3-
  exit 0
fi
{
  echo "No usable CPython from $min to $max was found on PATH or among pyenv's versions."
  if [ -n "$rejected" ]; then echo "Looked at and not usable:$rejected"; fi
  echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev; others:"
  echo "python.org, pyenv, Homebrew), or name one:  make ... PYTHON=/path/to/python3"
} >&2
exit 1
