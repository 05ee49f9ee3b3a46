"""The CUDA toolchain from PyPI, where the environment variable FLASHMOE_CUDA is 1.

Elsewhere @cuda_environment says that there is none, and the targets that need it do not exist.
"""

_BUILD = """
load("@rules_cc//cc:defs.bzl", "cc_import", "cc_library")

package(default_visibility = ["//visibility:public"])

exports_files(["nvcc.sh"])

# What nvcc reads, so that a change of it is noticed.
filegroup(
    name = "files",
    srcs = glob(["cu13/bin/*", "cu13/include/**", "cu13/nvvm/**", "nvshmem/include/**"]),
)

filegroup(
    name = "bin2c",
    srcs = ["cu13/bin/bin2c"],
)

filegroup(
    name = "nvshmem_device",
    srcs = ["nvshmem/lib/libnvshmem_device.a"],
)

# The CUDA runtime, linked statically.
cc_library(
    name = "cuda",
    srcs = ["cu13/lib/libcudart_static.a"],
    hdrs = glob(["cu13/include/**"]),
    includes = ["cu13/include"],
    linkopts = ["-lrt", "-ldl", "-pthread"],
)
"""

_NVCC = """#!/bin/sh
exec {nvcc} "$@"
"""

def _cuda_environment(ctx):
    wanted = ctx.os.environ.get("FLASHMOE_CUDA") == "1"
    ctx.file("defs.bzl", "CUDA = %s\n" % wanted)
    if not wanted:
        ctx.file("BUILD.bazel", "")
        return
    root = ctx.path(Label("//:WORKSPACE")).dirname
    python = ctx.os.environ.get("PYTHON") or str(root.get_child(".venv").get_child("bin").get_child("python"))
    tool = root.get_child("tools").get_child("cuda_toolchain.py")
    result = ctx.execute([python, str(tool)], timeout = 1800)
    if result.return_code != 0:
        fail("the CUDA toolchain: %s%s" % (result.stdout, result.stderr))
    packages = ctx.path(result.stdout.strip()).get_child("nvidia")
    ctx.symlink(packages.get_child("cu13"), "cu13")
    ctx.symlink(packages.get_child("nvshmem"), "nvshmem")
    nvcc = packages.get_child("cu13").get_child("bin").get_child("nvcc")
    ctx.file("nvcc.sh", _NVCC.format(nvcc = nvcc), executable = True)
    ctx.file("BUILD.bazel", _BUILD)

cuda_environment = repository_rule(
    implementation = _cuda_environment,
    environ = ["FLASHMOE_CUDA", "PYTHON"],
    local = True,
)
