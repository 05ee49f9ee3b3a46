"""CMake and Bazel describe the same build."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_CMAKE = {
    "kernels": ROOT / "kernels" / "CMakeLists.txt",
    "kernels/cpu/simd": ROOT / "kernels" / "cpu" / "simd" / "CMakeLists.txt",
    "tests/native": ROOT / "CMakeLists.txt",
}


def cmake_sources(text: str) -> set[str]:
    return set(re.findall(r"[\w/]+\.cc\b", re.sub(r"#.*", "", text)))


def bazel_sources(text: str) -> set[str]:
    return set(re.findall(r'"([\w/]+\.cc)"', re.sub(r"#.*", "", text)))


def flags(text: str, pattern: str) -> dict[str, list[str]]:
    """The options of each instruction set, with names of other sets resolved."""
    found: dict[str, list[str]] = {}
    for name, body in re.findall(pattern, text, re.DOTALL | re.MULTILINE):
        base = re.search(r"\$\{(\w+)\}|_(AVX\w+) \+", body)
        start = found[(base[1] or base[2]).lower()] if base else []
        found[name.lower()] = [*start, *re.findall(r"-m[\w=-]+", body)]
    return found


@pytest.mark.parametrize("package", _CMAKE)
def test_the_same_sources(package: str) -> None:
    cmake = {
        source.removeprefix(f"{package}/") for source in cmake_sources(_CMAKE[package].read_text())
    }
    bazel = bazel_sources((ROOT / package / "BUILD.bazel").read_text())
    assert bazel == cmake
    assert bazel, "nothing was found"


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


def flags_of_levels(text: str, known: dict[str, list[str]]) -> dict[str, list[str]]:
    found = {}
    for name, options in re.findall(
        r'simd_level\(\s*name = "(\w+)",\s*src = "\w+\.cc",\s*options = (.*?),\n\)', text, re.DOTALL
    ):
        base = re.match(r"_(\w+)", options)
        assert base is not None
        found[name] = [*known[base[1].lower()], *re.findall(r'"(-m[\w=-]+)"', options)]
    return found


@pytest.mark.parametrize("package", _CMAKE)
def test_a_source_that_only_one_names_is_found(package: str) -> None:
    text = (ROOT / package / "BUILD.bazel").read_text()
    without = re.sub(r'"[\w/]+\.cc"', '""', text, count=1)
    assert bazel_sources(without) != bazel_sources(text)
