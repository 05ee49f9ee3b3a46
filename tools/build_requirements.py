"""Prints the build requirements of pyproject.toml, one a line, without the pinned jaxlib.

An editable install that rebuilds its C++ on import needs them in the environment itself. jaxlib
stays out, because there it is the newest one: see fetch_ffi_headers.py.
"""

import tomllib
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def _load() -> dict[str, Any]:
    with open(PYPROJECT, "rb") as file:
        return tomllib.load(file)


def read() -> tuple[str, list[str]]:
    """Returns the pin "jaxlib==VERSION" of [build-system] and all its other requirements."""
    requires: list[str] = _load()["build-system"]["requires"]
    (jaxlib,) = (r for r in requires if r.startswith("jaxlib=="))
    return jaxlib, [r for r in requires if r != jaxlib]


def read_cuda() -> list[str]:
    """Returns what a build with FLASHMOE_CUDA=1 requires in addition."""
    overrides = _load()["tool"]["scikit-build"]["overrides"]
    (cuda,) = (o for o in overrides if "FLASHMOE_CUDA" in o["if"].get("env", {}))
    requires: list[str] = cuda["build"]["requires"]
    return requires


if __name__ == "__main__":
    print("\n".join(read()[1]))
