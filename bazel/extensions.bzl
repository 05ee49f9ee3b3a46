"""The repositories of MODULE.bazel: the same rules that WORKSPACE calls."""

load("//bazel:cuda_environment.bzl", "cuda_environment")
load("//bazel:python_environment.bzl", "python_environment")

def _python(_ctx):
    python_environment(name = "python_environment")

python = module_extension(implementation = _python)

def _cuda(_ctx):
    cuda_environment(name = "cuda_environment")

cuda = module_extension(implementation = _cuda)
