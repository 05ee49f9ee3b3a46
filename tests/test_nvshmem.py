"""The NVSHMEM host library that is found must fit the one that the kernel was built for.

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
extern "C" void {function}(int* major, int* minor, int* patch) {{
  *major = {version[0]}, *minor = {version[1]}, *patch = {version[2]};
}}
"""
_PROGRAM = """
#include <cstdio>
#include <exception>

#include "kernels/cuda/nvshmem.h"

int main(int, char** arguments) try {
  const flashmoe::cuda::NvshmemVersion version = flashmoe::cuda::Nvshmem(arguments[1]).version();
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
        version: tuple[int, int, int], function: str = "nvshmemx_vendor_get_version_info"
    ) -> "subprocess.CompletedProcess[str]":
        library = folder / f"libnvshmem_host_{'_'.join(map(str, version))}_{function}.so"
        text = _LIBRARY.format(function=function, version=version)
        compile_source(text, library, "-shared", "-fPIC")
        return subprocess.run(
            [str(program), str(library)], capture_output=True, text=True, check=False
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
  nvshmem.start({{}}, 3, 5);
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
