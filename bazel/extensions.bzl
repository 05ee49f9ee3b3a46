"""The repositories of MODULE.bazel: the same rules that WORKSPACE calls."""

load("//bazel:python_environment.bzl", "python_environment")

def _python(_ctx):
    python_environment(name = "python_environment")

python = module_extension(implementation = _python)
