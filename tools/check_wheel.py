"""Checks what is in a wheel: python tools/check_wheel.py WHEEL PYTHON_VERSION MODULE..."""

import re
import sys
import zipfile
from pathlib import Path


def complaints(wheel: Path, version: str, modules: list[str]) -> list[str]:
    """What is wrong with a wheel of these modules that was built with this version of Python."""
    found = []
    tag = "cp311-cp311" if version == "3.11" else "cp312-abi3"
    if not re.fullmatch(rf"flashmoe_jax-[\w.]+-{tag}-manylinux_\w+(\.\w+)*\.whl", wheel.name):
        found.append(f"its name is {wheel.name}, not one for {tag} and manylinux")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    libraries = sorted(name for name in names if name.endswith(".so") or ".so." in name)
    suffix = ".cpython-311" if version == "3.11" else ".abi3.so"
    expected = sorted(f"flashmoe_jax/{module}{suffix}" for module in modules)
    if len(libraries) != len(expected) or not all(map(str.startswith, libraries, expected)):
        found.append(f"its libraries are {libraries}, not {expected}")
    for wanted in ("flashmoe_jax/py.typed", "flashmoe_jax/layers/nnx.py"):
        if wanted not in names:
            found.append(f"{wanted} is missing")
    foreign = [name for name in names if not re.match(r"flashmoe_jax(-[\w.]+\.dist-info)?/", name)]
    if foreign:
        found.append(f"it has files outside the package: {foreign}")
    return found


if __name__ == "__main__":
    wrong = complaints(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    if wrong:
        sys.exit("\n".join(f"{sys.argv[1]}: {line}" for line in wrong))
