"""The NVSHMEM that is found must fit: where the module is built, and where it is loaded.

A library that only says its version plays the part; the loader is compiled from its own source, so
that no CUDA is needed.
"""

import functools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "kernels" / "cuda" / "nvshmem.h"

_LIBRARY = """
extern "C" {{
void {function}(int* major, int* minor, int* patch) {{
  *major = {version[0]}, *minor = {version[1]}, *patch = {version[2]};
}}
int nvshmemx_culibrary_init(void*) {{ return 7; }}
}}
"""
_PROGRAM = """
#include <cstdio>
#include <exception>

#include "kernels/cuda/nvshmem.h"

// usage: LIBRARY [initialize]
int main(int count, char** arguments) try {
  const flashmoe::cuda::Nvshmem nvshmem(arguments[1]);
  if (count > 2) nvshmem.initialize(nullptr);
  const flashmoe::cuda::NvshmemVersion version = nvshmem.version();
  std::printf("%d.%d.%d\\n", version.major, version.minor, version.patch);
} catch (const std::exception& error) {
  std::fputs(error.what(), stderr);
  return 1;
}
"""

Load = Callable[..., "subprocess.CompletedProcess[str]"]


@functools.cache
def compiler() -> str:
    tool = [ROOT / "tools" / "find_compiler.sh"]
    return subprocess.run(tool, capture_output=True, text=True, check=True).stdout.strip()


def compile_source(text: str, target: Path, *options: str) -> None:
    source = target.with_suffix(".cc")
    source.write_text(text)
    command = [compiler(), "-std=c++20", f"-I{ROOT}", str(source), *options, "-o", str(target)]
    subprocess.run(command, check=True)


def built_for() -> tuple[int, int, int]:
    found = re.search(r"kNvshmemBuiltFor\{(\d+), (\d+), (\d+)\}", HEADER.read_text())
    assert found is not None
    major, minor, patch = (int(number) for number in found.groups())
    return major, minor, patch


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Loads a library of the given version."""
    folder = tmp_path_factory.mktemp("nvshmem")
    program = folder / "load"
    compile_source(_PROGRAM, program, str(HEADER.with_suffix(".cc")), "-ldl")

    def run(
        version: tuple[int, int, int],
        *arguments: str,
        function: str = "nvshmemx_vendor_get_version_info",
    ) -> "subprocess.CompletedProcess[str]":
        library = folder / f"libnvshmem_host_{'_'.join(map(str, version))}_{function}.so"
        text = _LIBRARY.format(function=function, version=version)
        compile_source(text, library, "-shared", "-fPIC")
        return subprocess.run(
            [str(program), str(library), *arguments], capture_output=True, text=True, check=False
        )

    return run


@pytest.mark.parametrize(
    "change", [(0, 0, 0), (0, 0, 1), (0, 5, -24)], ids=["equal", "patch", "minor"]
)
def test_a_version_that_fits(load: Load, change: tuple[int, int, int]) -> None:
    major, minor, patch = (a + b for a, b in zip(built_for(), change, strict=True))
    process = load((major, minor, patch))
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == f"{major}.{minor}.{patch}"


@pytest.mark.parametrize(
    "change",
    [(0, 0, -1), (0, -1, 50), (-1, 8, 0), (1, 0, 0)],
    ids=["patch", "minor", "older major", "newer major"],
)
def test_a_version_that_does_not_fit(load: Load, change: tuple[int, int, int]) -> None:
    wanted = built_for()
    major, minor, patch = (a + b for a, b in zip(wanted, change, strict=True))
    process = load((major, minor, patch))
    assert process.returncode == 1
    assert f"NVSHMEM {major}.{minor}.{patch} was found" in process.stderr
    numbers = ".".join(map(str, wanted))
    assert f"this package was built for {numbers}" in process.stderr
    assert f'pip install "nvidia-nvshmem-cu13>={numbers}"' in process.stderr


def test_a_library_without_a_version(load: Load) -> None:
    process = load(built_for(), function="something_else")
    assert process.returncode == 1
    assert "has no function nvshmemx_vendor_get_version_info" in process.stderr


def test_a_library_that_refuses_the_kernels(load: Load) -> None:
    process = load(built_for(), "initialize")
    assert process.returncode == 1
    numbers = ".".join(map(str, built_for()))
    assert f"NVSHMEM {numbers} refused the kernels" in process.stderr
    assert "nvshmemx_culibrary_init returned 7" in process.stderr
    assert "pip install --upgrade nvidia-nvshmem-cu13" in process.stderr


_FIND = """
include(nvshmem)
set(missing)
flashmoe_find_nvshmem(missing ${ROOTS})
if(missing)
  message(FATAL_ERROR "there is ${missing}")
endif()
message("${FLASHMOE_NVSHMEM_VERSION} ${FLASHMOE_NVSHMEM_INCLUDE} ${FLASHMOE_NVSHMEM_DEVICE}")
"""


def install(root: Path, version: tuple[int, int, int] | None, device: bool = True) -> Path:
    """Something that looks like an NVSHMEM to a build."""
    (root / "include" / "non_abi").mkdir(parents=True)
    (root / "lib").mkdir()
    (root / "include" / "nvshmem.h").touch()
    if version is not None:
        names = zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)
        text = "".join(f"#define NVSHMEM_VENDOR_{name}_VERSION {part}\n" for name, part in names)
        (root / "include" / "non_abi" / "nvshmem_version.h").write_text(text)
    if device:
        (root / "lib" / "libnvshmem_device.a").touch()
    return root


def find(folder: Path, *roots: Path) -> "subprocess.CompletedProcess[str]":
    """What the build finds in the folders."""
    script = folder / "find.cmake"
    script.write_text(_FIND)
    command = [
        "cmake",
        f"-DCMAKE_MODULE_PATH={ROOT / 'cmake'}",
        f"-DROOTS={';'.join(map(str, roots))}",
        "-P",
        str(script),
    ]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    # CMake wraps what it says of errors.
    process.stderr = " ".join(process.stderr.split())
    return process


@pytest.mark.parametrize("change", [(0, 0, 0), (0, 0, 1), (0, 5, -24)])
def test_a_build_finds_an_nvshmem_that_fits(tmp_path: Path, change: tuple[int, int, int]) -> None:
    major, minor, patch = (a + b for a, b in zip(built_for(), change, strict=True))
    root = install(tmp_path / "there", (major, minor, patch))
    process = find(tmp_path, tmp_path / "not there", root)
    assert process.returncode == 0, process.stderr
    version, include, device = process.stderr.split()
    assert version == f"{major}.{minor}.{patch}"
    assert Path(include) == root / "include"
    assert Path(device) == root / "lib" / "libnvshmem_device.a"


@pytest.mark.parametrize("change", [(0, 0, -1), (0, -1, 50), (-1, 8, 0), (1, 0, 0), (27, 0, 0)])
def test_a_build_refuses_an_nvshmem_of_another_version(
    tmp_path: Path, change: tuple[int, int, int]
) -> None:
    major, minor, patch = (a + b for a, b in zip(built_for(), change, strict=True))
    process = find(tmp_path, install(tmp_path / "there", (major, minor, patch)))
    assert process.returncode != 0
    assert f"there is only NVSHMEM {major}.{minor}.{patch} in {tmp_path}" in process.stderr
    assert f"it must be {'.'.join(map(str, built_for()))} or a later one" in process.stderr


def test_a_build_refuses_an_nvshmem_without_a_version(tmp_path: Path) -> None:
    process = find(tmp_path, install(tmp_path / "there", None))
    assert process.returncode != 0
    assert "there is only NVSHMEM of an unknown version" in process.stderr


def test_a_build_without_nvshmem(tmp_path: Path) -> None:
    process = find(tmp_path, tmp_path / "a", tmp_path / "b")
    assert process.returncode != 0
    assert f"there is no include/nvshmem.h in {tmp_path}/a or {tmp_path}/b" in process.stderr


def test_a_build_does_not_mix_two_nvshmems(tmp_path: Path) -> None:
    headers = install(tmp_path / "headers", built_for(), device=False)
    process = find(tmp_path, headers, install(tmp_path / "whole", built_for()))
    assert process.returncode != 0
    assert f"there is no {headers}/lib/libnvshmem_device.a" in process.stderr


# PEs 0 and 1 are on one node, 2 and 3 on another; 4 is only reached by 3.
_PAIRS = ((0, 1), (2, 3), (3, 4))
_STARTED = """
#include <cstddef>

namespace {{
char memory[16];
bool reach[5][5] = {reach};
}}  // namespace
extern "C" {{
void nvshmemx_vendor_get_version_info(int* major, int* minor, int* patch) {{
  *major = {version[0]}, *minor = {version[1]}, *patch = {version[2]};
}}
int nvshmemx_hostlib_init_attr(unsigned, void*) {{ return 0; }}
int nvshmem_my_pe() {{ return 3; }}
int nvshmem_n_pes() {{ return 5; }}
void* nvshmem_malloc(size_t) {{ return memory; }}
void* nvshmem_ptr(void* data, int pe) {{ return reach[3][pe] ? data : nullptr; }}
}}
"""
_REACH_PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/cuda/nvshmem.h"

// usage: LIBRARY PES_OF_GROUP PE...
int main(int count, char** arguments) {{
  flashmoe::cuda::Nvshmem nvshmem(arguments[1]);
  nvshmem.start({{}}, 3, 5, 0);
  for (int pe = 0; pe < 5; ++pe) std::printf("%d", nvshmem.reaches(pe));
  nvshmem.set_reach({{{reach}}});
  std::vector<int32_t> groups;
  for (int i = 3; i < count; ++i) groups.push_back(std::atoi(arguments[i]));
  std::printf(" %d\\n", nvshmem.reach_each_other(groups, std::atoi(arguments[2])));
}}
"""


@pytest.fixture(scope="module")
def reach(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """What PE 3 reaches itself, and whether the PEs of groups reach each other."""
    folder = tmp_path_factory.mktemp("reach")
    matrix = [[a == b or (a, b) in _PAIRS or (b, a) in _PAIRS for b in range(5)] for a in range(5)]
    rows = [", ".join(str(reached).lower() for reached in row) for row in matrix]
    library = folder / "libnvshmem_host.so"
    nested = "{{" + "}, {".join(rows) + "}}"
    compile_source(_STARTED.format(reach=nested, version=built_for()), library, "-shared", "-fPIC")
    program = folder / "reach"
    compile_source(
        _REACH_PROGRAM.format(reach=", ".join(rows)),
        program,
        str(HEADER.with_suffix(".cc")),
        "-ldl",
    )

    def run(pes_of_group: int, *groups: int) -> str:
        command = [str(program), str(library), str(pes_of_group), *map(str, groups)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return run


@pytest.mark.parametrize(
    ("pes_of_group", "groups", "each_other"),
    [
        (2, (0, 1), True),
        (2, (0, 2), False),
        (2, (1, 0, 3, 2), True),
        (2, (1, 0, 4, 2), False),
        (3, (2, 3, 4), False),
        (1, (4,), True),
    ],
)
def test_who_reaches_whom(
    reach: Callable[..., str], pes_of_group: int, groups: tuple[int, ...], each_other: bool
) -> None:
    assert reach(pes_of_group, *groups) == f"00111 {int(each_other)}"
