"""CMake and Bazel describe the same build."""

import re
import tomllib
from pathlib import Path

import pytest

from flashmoe_jax._compat import OLDEST_JAX

ROOT = Path(__file__).resolve().parent.parent
_CMAKE = {
    "kernels": ROOT / "kernels" / "CMakeLists.txt",
    "kernels/emulator": ROOT / "kernels" / "emulator" / "CMakeLists.txt",
    "tests/emulator": ROOT / "tests" / "emulator" / "CMakeLists.txt",
    "kernels/cpu/simd": ROOT / "kernels" / "cpu" / "simd" / "CMakeLists.txt",
    "tests/native": ROOT / "CMakeLists.txt",
}


def cmake_sources(text: str) -> set[str]:
    return set(re.findall(r"[\w/]+\.(?:cc|cu)\b", re.sub(r"#.*", "", text)))


def bazel_sources(text: str) -> set[str]:
    return set(re.findall(r'"([\w/]+\.(?:cc|cu))"', re.sub(r"#.*", "", text)))


def flags(text: str, pattern: str) -> dict[str, list[str]]:
    """The options of each instruction set, with names of other sets resolved."""
    found: dict[str, list[str]] = {}
    for name, body in re.findall(pattern, text, re.DOTALL | re.MULTILINE):
        base = re.search(r"\$\{(\w+)\}|_(AVX\w+) \+", body)
        start = found[(base[1] or base[2]).lower()] if base else []
        found[name.lower()] = [*start, *re.findall(r"-m[\w=-]+", body)]
    return found


def assert_the_same_sources(package: str, cmake_text: str, bazel_text: str) -> None:
    cmake = {source.removeprefix(f"{package}/") for source in cmake_sources(cmake_text)}
    bazel = bazel_sources(bazel_text)
    assert bazel == cmake
    assert bazel, "nothing was found"


def texts(package: str) -> tuple[str, str]:
    return _CMAKE[package].read_text(), (ROOT / package / "BUILD.bazel").read_text()


@pytest.mark.parametrize("package", _CMAKE)
def test_the_same_sources(package: str) -> None:
    assert_the_same_sources(package, *texts(package))


@pytest.mark.parametrize("package", _CMAKE)
def test_a_source_that_one_build_lacks_is_found(package: str) -> None:
    cmake_text, bazel_text = texts(package)
    for source in bazel_sources(bazel_text):
        without = re.sub(rf'"{re.escape(source)}",?', "", bazel_text)
        with pytest.raises(AssertionError):
            assert_the_same_sources(package, cmake_text, without)
        without = re.sub(rf"(?<![\w])({package}/)?{re.escape(source)}\b", "", cmake_text)
        with pytest.raises(AssertionError):
            assert_the_same_sources(package, without, bazel_text)


@pytest.mark.parametrize("package", _CMAKE)
def test_every_source_is_in_the_build(package: str) -> None:
    """Sources of the folder that no build names would never be compiled."""
    named = {ROOT / package / source for source in bazel_sources(texts(package)[1])}
    folders = {source.parent for source in named}
    there = {path for folder in folders for path in folder.iterdir()}
    assert {path for path in there if path.suffix in (".cc", ".cu")} == named


def test_every_source_for_a_gpu_is_built() -> None:
    # By CMake alone: Bazel's `//...` would compile kernels that few machines can run.
    folder = ROOT / "tests" / "gpu"
    built = cmake_sources((folder / "CMakeLists.txt").read_text())
    own = {path.name for path in folder.iterdir() if path.suffix in (".cc", ".cu")}
    assert own == {source for source in built if "/" not in source}
    others = {source.removeprefix("/") for source in built if "/" in source}
    assert others
    assert all((ROOT / source).exists() for source in others)


def test_the_same_compiler_options() -> None:
    def options(text: str) -> set[str]:
        found = set(re.findall(r"(?<=[\s\"])-[Wf][\w=-]+", text))
        return {f for f in found if not re.match("-Werror|-fsanitize|-fno-sanitize|-fno-omit", f)}

    # CMake has properties for these.
    properties = {"-fvisibility=hidden", "-fvisibility-inlines-hidden"}
    cmake = (ROOT / "cmake" / "compile_options.cmake").read_text()
    bazel = (ROOT / "bazel" / "options.bzl").read_text()
    assert options(bazel) == options(cmake) | properties


def test_the_same_options_of_the_instruction_sets() -> None:
    simd = ROOT / "kernels" / "cpu" / "simd"
    cmake_text = (simd / "CMakeLists.txt").read_text()
    cmake = flags(cmake_text, r"^\s*set\((\w+) ([^)]*)\)")
    cmake |= {
        name: [*cmake[base], *re.findall(r"-m[\w=-]+", rest)]
        for name, base, rest in re.findall(
            r"flashmoe_simd_level\((\w+) \w+\.cc \$\{(\w+)\}([^)]*)\)", cmake_text
        )
    }
    bazel_text = (simd / "BUILD.bazel").read_text()
    bazel = flags(bazel_text, r"^_(\w+) = (.*?)\]$")
    bazel |= flags_of_levels(bazel_text, bazel)
    assert bazel == cmake
    assert set(cmake) == {"avx2", "avx512", "avx512_bf16", "amx"}


def test_the_same_architecture_of_each_kernel_source() -> None:
    cmake = [
        (source, architectures.split())
        for source, architectures in re.findall(
            # What checks on a GPU add is not for Bazel.
            r"flashmoe_cuda_(?:object|network_image)\((\S+) ([\w ]+?)(?: \$\{\w+\})?\)",
            (ROOT / "kernels" / "CMakeLists.txt").read_text(),
        )
    ]
    bazel = [
        (source, re.findall(r'"(\w+)"', architectures))
        for source, architectures in re.findall(
            r'src = "(\S+\.cu)",[^)]*(architecture = [^)]*)\)',
            (ROOT / "kernels" / "BUILD.bazel").read_text(),
        )
    ]
    assert bazel == cmake
    assert {tuple(architectures) for _, architectures in cmake} == {("80",), ("80", "90"), ("90a",)}


def test_the_same_options_of_nvcc() -> None:
    cmake_text = (ROOT / "cmake" / "cuda.cmake").read_text()
    bazel_text = (ROOT / "bazel" / "cuda.bzl").read_text()
    (cmake,) = re.findall(r"set\(flags (.*?)-gencode", cmake_text, re.DOTALL)
    (bazel,) = re.findall(r"NVCC_OPTS = \[(.*?)\]", bazel_text, re.DOTALL)
    assert re.findall(r'[^\s",]+', bazel) == re.findall(r'[^\s",]+', cmake)
    assert "-lineinfo" in cmake
    # Both add PTX for later GPUs to what is not for one architecture alone.
    assert "list(APPEND code compute_${architecture})" in cmake_text
    assert 'code.append("compute_" + architecture)' in bazel_text


def test_the_oldest_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = project["project"]["optional-dependencies"]["cuda13"]
    header = (ROOT / "kernels" / "cuda" / "nvshmem.h").read_text()
    (nvshmem,) = re.findall(r"kNvshmemBuiltFor\{(\d+), (\d+), (\d+)\}", header)
    assert f"nvidia-nvshmem-cu13>={'.'.join(nvshmem)}" in requirements
    overrides = project["tool"]["scikit-build"]["overrides"]
    (cuda,) = (override["build"]["requires"] for override in overrides if "build" in override)
    assert f"nvidia-nvshmem-cu13=={'.'.join(nvshmem)}" in cuda
    found = (ROOT / "cmake" / "nvshmem.cmake").read_text()
    assert f"(flashmoe_oldest_nvshmem {'.'.join(nvshmem)})" in found

    jax = ".".join(map(str, OLDEST_JAX))
    assert f"jax>={jax}" in project["project"]["dependencies"]
    assert f"jax[cuda13]>={jax}" in requirements
    assert f"jaxlib=={jax}" in project["build-system"]["requires"]
    assert f"(flashmoe_oldest_jaxlib {jax})" in (ROOT / "cmake" / "xla_ffi.cmake").read_text()


def flags_of_levels(text: str, known: dict[str, list[str]]) -> dict[str, list[str]]:
    found = {}
    for name, options in re.findall(
        r'simd_level\(\s*name = "(\w+)",\s*src = "\w+\.cc",\s*options = (.*?),\n\)', text, re.DOTALL
    ):
        base = re.match(r"_(\w+)", options)
        assert base is not None
        found[name] = [*known[base[1].lower()], *re.findall(r'"(-m[\w=-]+)"', options)]
    return found
