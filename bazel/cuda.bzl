"""Targets of the CUDA module; they exist where its toolchain does.

cmake/cuda.cmake has the reasons of the options.
"""

load("@cuda_environment//:defs.bzl", "CUDA")
load("@rules_cc//cc:defs.bzl", "cc_binary", "cc_library")

NVCC_OPTS = [
    "-std=c++20",
    "-O3",
    "-lineinfo",
    "-Xptxas -v",
    "-Xcompiler -fPIC,-fvisibility=hidden,-Wall",
]

def cuda_object(name, src, hdrs, architecture, later = []):
    """A library of one source, compiled for one architecture.

    Args:
        name: Of the library.
        src: The source.
        hdrs: Every header that it may include.
        architecture: Such as "90a".
        later: Architectures that it is compiled into machine code for too.
    """
    if not CUDA:
        return
    code = ["sm_" + target for target in [architecture] + later]
    if architecture.isdigit():
        code.append("compute_" + architecture)
    native.genrule(
        name = name + "_object",
        srcs = [src] + hdrs,
        outs = [name + ".cu.o"],
        cmd = " ".join(
            ["$(location @cuda_environment//:nvcc.sh) -ccbin $(CC)"] + NVCC_OPTS + [
                "-gencode arch=compute_%s,code=[%s]" % (architecture, ",".join(code)),
                "-I. -c $(location %s) -o $@" % src,
            ],
        ),
        toolchains = ["@bazel_tools//tools/cpp:current_cc_toolchain"],
        tools = [
            "@cuda_environment//:files",
            "@cuda_environment//:nvcc.sh",
        ],
    )
    cc_library(
        name = name,
        srcs = [name + ".cu.o"],
    )

def cuda_network_image(name, src, hdrs, architecture):
    """A library with a header NAME.inc: one source, linked with NVSHMEM's device library.

    Args:
        name: Of the library, and of the array in the header.
        src: The source.
        hdrs: Every header that it may include.
        architecture: Such as "90a".
    """
    if not CUDA:
        return
    target = "-gencode arch=compute_%s,code=sm_%s" % (architecture, architecture)
    nvcc = "$(location @cuda_environment//:nvcc.sh) -ccbin $(CC) " + target
    native.genrule(
        name = name + "_inc",
        srcs = [src] + hdrs,
        outs = [name + ".inc"],
        cmd = " && ".join([
            "NVSHMEM=$$(dirname $(location @cuda_environment//:nvshmem_device))/..",
            nvcc + " -std=c++20 -O3 -rdc=true -I. -isystem $$NVSHMEM/include" +
            " -c $(location %s) -o $(@D)/%s.o" % (src, name),
            nvcc + " -dlink -fatbin --compress-mode=size $(@D)/%s.o" % name +
            " $(location @cuda_environment//:nvshmem_device) -o $(@D)/%s.fatbin" % name,
            "$(location @cuda_environment//:bin2c) --const --static --type longlong" +
            " --name %s $(@D)/%s.fatbin > $@" % (name, name),
        ]),
        toolchains = ["@bazel_tools//tools/cpp:current_cc_toolchain"],
        tools = [
            "@cuda_environment//:bin2c",
            "@cuda_environment//:files",
            "@cuda_environment//:nvcc.sh",
            "@cuda_environment//:nvshmem_device",
        ],
    )
    cc_library(
        name = name,
        hdrs = [name + ".inc"],
        includes = ["."],
    )

def cuda_binary(**attributes):
    """A cc_binary.

    Args:
        **attributes: Of the cc_binary.
    """
    if CUDA:
        cc_binary(**attributes)
