"""Bazel 4's own rule under the name that newer Bazel loads."""

sh_test = native.sh_test
