"""Products and vector loops for one instruction set."""

load("@rules_cc//cc:defs.bzl", "cc_library")
load("//bazel:options.bzl", "COPTS")

def simd_level(name, src, options = []):
    """A library of its own, because its options must reach nothing else.

    Args:
        name: Of the instruction set.
        src: The source.
        options: The compiler's options for it.
    """
    cc_library(
        name = name,
        srcs = [src],
        copts = COPTS + ["-ffp-contract=fast"] + options,
        local_defines = ["FLASHMOE_SIMD_LEVEL=" + name],
        deps = [":scratch"],
    )
