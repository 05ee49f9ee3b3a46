"""Prints the lowest versions that pyproject.toml allows, as constraints for pip, one a line.

Of what users install: the package itself and the extras that its features need. What only
developers use may be newer.
"""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
EXTRAS = ("flax", "examples", "bench")


def pins(requirements: list[str]) -> list[str]:
    """Returns "name==version" of each "name>=version".

    Raises:
        ValueError: one has no lower bound, or one that cannot be read.
    """
    found = set()
    for requirement in requirements:
        match = re.fullmatch(r"([\w.-]+)(\[[\w,]+\])?>=([\w.]+)", requirement)
        if match is None:
            raise ValueError(f"{requirement!r} in pyproject.toml is not of the form name>=version")
        found.add(f"{match[1]}=={match[3]}")
    return sorted(found)


def read() -> list[str]:
    """Returns the pins of this project."""
    with open(PYPROJECT, "rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    return pins(project["dependencies"] + [r for extra in EXTRAS for r in extras[extra]])


if __name__ == "__main__":
    print("\n".join(read()))
