#!/bin/sh
# Prints a Bazel; installs Debian's where it may; says what to do if there is none.
set -eu

find_one() { command -v bazelisk || command -v bazel; }

find_one && exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  {
    apt-get update -q || true
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends bazel-bootstrap
  } >&2 || true
  find_one && exit 0
fi
{
  echo "No Bazel was found. Install it (Debian, Ubuntu: apt-get install bazel-bootstrap) or Bazelisk"
  echo "(https://github.com/bazelbuild/bazelisk), and try again."
} >&2
exit 1
