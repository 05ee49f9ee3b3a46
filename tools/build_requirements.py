"""Prints the build requirements of pyproject.toml, one a line, without the pinned jaxlib.

An editable install that rebuilds its C++ on import needs them in the environment itself. jaxlib
stays out, because there it is the newest one: see fetch_ffi_headers.py.
"""

import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def read() -> tuple[str, list[str]]:
    """Returns the pin "jaxlib==VERSION" of [build-system] and all its other requirements."""
    with open(PYPROJECT, "rb") as file:
        requires: list[str] = tomllib.load(file)["build-system"]["requires"]
    (jaxlib,) = (r for r in requires if r.startswith("jaxlib=="))
    return jaxlib, [r for r in requires if r != jaxlib]


if __name__ == "__main__":
    print("\n".join(read()[1]))
