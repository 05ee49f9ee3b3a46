"""The checks of what is released."""

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
ABI3 = "flashmoe_jax-0.1.0-cp312-abi3-manylinux_2_35_x86_64.whl"
FILES = (
    "flashmoe_jax/__init__.py",
    "flashmoe_jax/_ext.abi3.so",
    "flashmoe_jax/layers/nnx.py",
    "flashmoe_jax/py.typed",
    "flashmoe_jax-0.1.0.dist-info/METADATA",
)


def load(tool: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(tool, TOOLS / f"{tool}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check_wheel() -> ModuleType:
    return load("check_wheel")


def wheel_of(folder: Path, name: str, *files: str) -> Path:
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.writestr(file, "")
    return path


def test_a_wheel_as_it_should_be(check_wheel: ModuleType, tmp_path: Path) -> None:
    assert check_wheel.complaints(wheel_of(tmp_path, ABI3, *FILES), "3.13", ["_ext"]) == []
    wheel = wheel_of(tmp_path, ABI3, *FILES, "flashmoe_jax/_cuda.abi3.so")
    assert check_wheel.complaints(wheel, "3.13", ["_ext", "_cuda"]) == []


@pytest.mark.parametrize(
    ("name", "files", "version", "complaint"),
    [
        (ABI3.replace("manylinux_2_35", "linux"), FILES, "3.13", "its name is"),
        (ABI3, FILES, "3.11", "not one for cp311-cp311"),
        (ABI3, [f for f in FILES if not f.endswith(".so")], "3.13", r"its libraries are \[\]"),
        (ABI3, [*FILES, "flashmoe_jax.libs/libnvshmem_host.so.3"], "3.13", "libnvshmem_host"),
        (ABI3, [*FILES, "flashmoe_jax/_cuda.abi3.so"], "3.13", "_cuda"),
        (ABI3, [f for f in FILES if not f.endswith("typed")], "3.13", "py.typed is missing"),
        (ABI3, [*FILES, "tests/conftest.py"], "3.13", "files outside the package"),
    ],
)
def test_a_wheel_with_a_fault(
    check_wheel: ModuleType,
    tmp_path: Path,
    name: str,
    files: list[str],
    version: str,
    complaint: str,
) -> None:
    found = check_wheel.complaints(wheel_of(tmp_path, name, *files), version, ["_ext"])
    assert any(re.search(complaint, line) for line in found), found


def test_the_command_fails_on_a_wheel_with_a_fault(tmp_path: Path) -> None:
    path = wheel_of(tmp_path, ABI3, "flashmoe_jax/__init__.py")
    command = [sys.executable, str(TOOLS / "check_wheel.py"), str(path), "3.13", "_ext"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "its libraries are []" in process.stderr


@pytest.fixture(scope="module")
def lowest_versions() -> ModuleType:
    return load("lowest_versions")


def test_lower_bounds_become_pins(lowest_versions: ModuleType) -> None:
    wanted = ["jax[cuda13]>=0.10.1", "orbax-checkpoint>=0.11.30", "jax>=0.10.1"]
    assert lowest_versions.pins(wanted) == ["jax==0.10.1", "orbax-checkpoint==0.11.30"]


@pytest.mark.parametrize("requirement", ["jax", "jax>0.10", "jax>=0.10,<0.13", "jax==0.10.1"])
def test_a_requirement_without_a_plain_lower_bound(
    lowest_versions: ModuleType, requirement: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(requirement))):
        lowest_versions.pins(["numpy>=2.0", requirement])


def test_every_dependency_of_the_project_has_a_lower_bound(lowest_versions: ModuleType) -> None:
    pins = lowest_versions.read()
    assert {pin.split("==")[0] for pin in pins} >= {"flax", "jax", "numpy", "optax"}
