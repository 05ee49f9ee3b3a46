"""What the build takes from the active Python: its headers, and those of its packages.

The interpreter is that of the environment variable PYTHON, else .venv/bin/python (make venv).
"""

_PACKAGES = "python, nanobind, pybind11, ffi"

_BUILD = """
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

exports_files(["pytest.sh"])

cc_library(
    name = "python",
    hdrs = glob(["python/**/*.h"]),
    includes = ["python"],
)

# XLA's FFI headers, those of the oldest supported jaxlib.
cc_library(
    name = "ffi",
    hdrs = glob(["ffi/**/*.h"]),
    includes = ["ffi"],
)

cc_library(
    name = "nanobind",
    srcs = ["nanobind/src/nb_combined.cpp"],
    hdrs = glob(["nanobind/include/**/*.h", "robin_map/**/*.h"]),
    textual_hdrs = glob(
        ["nanobind/src/*.cpp", "nanobind/src/*.h"],
        exclude = ["nanobind/src/nb_combined.cpp"],
    ),
    # Those of nanobind's own CMake file.
    copts = [
        "-O3",
        "-fno-strict-aliasing",
        "-ffunction-sections",
        "-fdata-sections",
        "-fvisibility=hidden",
        "-std=c++17",
        "-w",
    ],
    includes = ["nanobind/include", "robin_map"],
    local_defines = ["NB_COMPACT_ASSERTIONS"],
    deps = [":python"],
)

cc_library(
    name = "pybind11",
    hdrs = glob(["pybind11/**/*.h"]),
    includes = ["pybind11"],
    deps = [":python"],
)
"""

_PYTEST = """#!/bin/sh
exec {python} bazel/run_pytest.py "$@"
"""

_PROBE = """
import sys, sysconfig
try:
    import nanobind, pybind11
except ImportError as error:
    sys.exit("%s. Run `make venv` first, or let PYTHON name an interpreter that has it." % error)
print(sysconfig.get_path("include"))
print(nanobind.include_dir())
print(pybind11.get_include())
"""

def _run(ctx, arguments, what):
    result = ctx.execute(arguments)
    if result.return_code != 0:
        fail("%s: %s%s" % (what, result.stdout, result.stderr))
    return result.stdout.strip().splitlines()

def _python_environment(ctx):
    root = ctx.path(Label("//:WORKSPACE")).dirname
    python = ctx.os.environ.get("PYTHON") or str(root.get_child(".venv").get_child("bin").get_child("python"))
    if not ctx.path(python).exists:
        fail("There is no %s. Run `make venv` first, or set PYTHON." % python)
    headers, nanobind, pybind11 = _run(ctx, [python, "-c", _PROBE], "looking for " + _PACKAGES)
    (ffi,) = _run(ctx, [python, str(root.get_child("tools").get_child("fetch_ffi_headers.py"))], "the FFI headers")
    nanobind = ctx.path(nanobind).dirname
    ctx.symlink(headers, "python")
    ctx.symlink(nanobind.get_child("include"), "nanobind/include")
    ctx.symlink(nanobind.get_child("src"), "nanobind/src")
    ctx.symlink(nanobind.get_child("ext").get_child("robin_map").get_child("include"), "robin_map")
    ctx.symlink(pybind11, "pybind11")
    ctx.symlink(ffi, "ffi")
    ctx.file("pytest.sh", _PYTEST.format(python = python), executable = True)
    ctx.file("BUILD.bazel", _BUILD)

python_environment = repository_rule(
    implementation = _python_environment,
    environ = ["PYTHON"],
    local = True,
)
