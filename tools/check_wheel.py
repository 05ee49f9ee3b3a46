"""Checks what is in a wheel: python tools/check_wheel.py WHEEL PYTHON_VERSION."""

import re
import sys
import zipfile
from pathlib import Path


def complaints(wheel: Path, version: str) -> list[str]:
    """What is wrong with a wheel that was built with this version of Python."""
    found = []
    tag = "cp311-cp311" if version == "3.11" else "cp312-abi3"
    if not re.fullmatch(rf"flashmoe_jax-[\w.]+-{tag}-manylinux_\w+(\.\w+)*\.whl", wheel.name):
        found.append(f"its name is {wheel.name}, not one for {tag} and manylinux")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    libraries = [name for name in names if name.endswith(".so") or ".so." in name]
    expected = "_ext.cpython-311" if version == "3.11" else "_ext.abi3.so"
    if len(libraries) != 1 or not libraries[0].startswith(f"flashmoe_jax/{expected}"):
        found.append(f"its libraries are {libraries}, not only flashmoe_jax/{expected}")
    for wanted in ("flashmoe_jax/py.typed", "flashmoe_jax/layers/nnx.py"):
        if wanted not in names:
            found.append(f"{wanted} is missing")
    foreign = [name for name in names if not re.match(r"flashmoe_jax(-[\w.]+\.dist-info)?/", name)]
    if foreign:
        found.append(f"it has files outside the package: {foreign}")
    return found


if __name__ == "__main__":
    wrong = complaints(Path(sys.argv[1]), sys.argv[2])
    if wrong:
        sys.exit("\n".join(f"{sys.argv[1]}: {line}" for line in wrong))
