"""The check of the CUDA kernels' machine code finds what it is there for."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture(scope="module", autouse=True)
def _tools_on_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        yield


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    import check_machine_code

    return check_machine_code


@dataclass
class Fake:
    """A kernel as cuobjdump and ptxas would print it."""

    architecture: str
    code: str  # instructions, one a line; "name:" is a place to branch to
    resources: dict[str, int] = field(default_factory=dict)
    spilled: int = 0
    step: int = 16
    name: str = "moe"

    def sass(self) -> str:
        lines = [line.strip() for line in self.code.strip().splitlines()]
        places, instructions = {}, []
        for line in lines:
            if line.endswith(":"):
                places[line[:-1]] = f"{len(instructions) * self.step:#x}"
            else:
                instructions.append(line)
        text = [f"arch = {self.architecture}", f"\tcode for {self.architecture}"]
        text += [f"\t\tFunction : {self.name}"]
        for i, line in enumerate(instructions):
            words = [places.get(word, word) for word in line.split()]
            text.append(f"        /*{i * self.step:04x}*/    {' '.join(words)} ;   /* 0x0000 */")
            text.append("                                       /* 0x000fe20003820000 */")
        return "\n".join(text)

    def usage(self) -> str:
        found = {"REG": 96, "STACK": 0, "SHARED": 1024, "LOCAL": 0} | self.resources
        listed = " ".join(f"{key}:{value}" for key, value in found.items())
        return f"arch = {self.architecture}\n Function {self.name}:\n  {listed} CONSTANT[0]:548\n"

    def log(self) -> str:
        return (
            f"ptxas info    : Compiling entry function '{self.name}' for '{self.architecture}'\n"
            f"ptxas info    : Function properties for {self.name}\n"
            f"    0 bytes stack frame, {self.spilled} bytes spill stores, 0 bytes spill loads\n"
        )


# A loop over tiles around one over the depth, whose wait is tried again behind the kernel.
SM90 = """
    S2R R0, SR_TID.X
    tile:
    @!UP1 UTMALDG.2D [UR8], [UR12]
    depth:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR7], R2
    @!P1 BRA again
    ready:
    HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], R24, gsb0
    @P0 BRA depth
    STG.E.64 [R2.64], R24
    @P2 BRA tile
    EXIT
    again:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR7], R2
    @!P1 BRA again
    BRA ready
    end:
    BRA end
"""
SM80 = """
    depth:
    LDGSTS.E.BYPASS.128 [R21], [R6.64]
    HMMA.16816.F32.BF16 R16, R8, R4, R16
    @P0 BRA depth
    EXIT
"""
GOOD = (Fake("sm_80", SM80), Fake("sm_90", SM80), Fake("sm_90a", SM90))


def found(
    checker: ModuleType, *fakes: Fake, log: str | None = None, network: bool = False
) -> list[str]:
    import machine_code

    kernels = machine_code.parse(
        "\n".join(fake.sass() for fake in fakes), "\n".join(fake.usage() for fake in fakes)
    )
    text = "".join(fake.log() for fake in fakes) if log is None else log
    warnings = machine_code.read_log(text, kernels)
    return checker.check(kernels, warnings, logged=True, network=network)


def test_kernels_as_they_should_be(checker: ModuleType) -> None:
    assert found(checker, *GOOD) == []


SPILL = "STL [R1], R24"
AFTER_READY = "ready:\n"
BEHIND = "again:\n"


@pytest.mark.parametrize(
    ("fake", "complaint"),
    [
        (Fake("sm_90a", SM90.replace("HGMMA.64x8x16", "HMMA.16816")), "no HGMMA"),
        (Fake("sm_90a", SM90.replace("UTMALDG.2D", "LDG.E")), "no UTMALDG"),
        (Fake("sm_80", SM80.replace("HMMA.16816", "FFMA")), "no HMMA"),
        (Fake("sm_90", SM80.replace("HMMA.16816", "FFMA")), "no HMMA"),
        (Fake("sm_80", SM80.replace("LDGSTS", "LDG")), "no LDGSTS"),
        (Fake("sm_80", SM80.replace("@P0 BRA depth", "")), "no loop around HMMA"),
        (Fake("sm_80", SM80.replace("@P0 BRA depth", "BRA done\ndone:")), "no loop around HMMA"),
        (
            Fake("sm_90a", SM90.replace(AFTER_READY, f"{AFTER_READY}{SPILL}\n")),
            "1 accesses to local memory in its main loop at 0x20, allowed are 0",
        ),
        (
            Fake("sm_90a", SM90.replace(BEHIND, f"{BEHIND}LDL.64 R24, [R1]\n{SPILL}\n")),
            "2 accesses to local memory in its main loop at 0x20",
        ),
        (Fake("sm_90a", SM90, {"STACK": 32}), "32 bytes of stack, allowed are 0"),
        (Fake("sm_90a", SM90, {"LOCAL": 8}), "8 bytes of stack, allowed are 0"),
        (Fake("sm_90a", SM90, spilled=40), "40 bytes of spills, allowed are 0"),
        (Fake("sm_90a", SM90, {"REG": 169}), "169 registers, allowed are 168: 384 threads"),
        (Fake("sm_80", SM80, {"REG": 129}), "129 registers, allowed are 128: 512 threads"),
        (Fake("sm_90", SM80, {"REG": 129}), "129 registers, allowed are 128: 512 threads"),
        (Fake("sm_90", SM80, spilled=40), "40 bytes of spills, allowed are 0"),
        (Fake("sm_90a", SM90, {"SHARED": 4096}), "4096 bytes of static shared memory"),
        (Fake("sm_75", SM80), "allowed architectures are sm_80, sm_90, sm_90a"),
    ],
)
def test_a_kernel_with_a_fault(checker: ModuleType, fake: Fake, complaint: str) -> None:
    good = [replace(fake, name="good") for fake in GOOD]
    lines = found(checker, *good, fake)
    assert any(complaint in line for line in lines), lines
    assert all("moe" in line for line in lines), "a complaint about a good kernel"


def test_limits_are_inclusive(checker: ModuleType) -> None:
    full = {"REG": 168, "SHARED": 2048}
    half = {"REG": 128, "SHARED": 1024}
    newer = {"REG": 128, "SHARED": 2048}
    fakes = (Fake("sm_90a", SM90, full), Fake("sm_90", SM80, newer), Fake("sm_80", SM80, half))
    assert found(checker, *fakes) == []


def test_local_memory_outside_the_main_loops_is_no_fault_of_theirs(checker: ModuleType) -> None:
    code = SM90.replace("STG.E.64 [R2.64], R24", SPILL)
    assert found(checker, *GOOD, Fake("sm_90a", code, name="other")) == []


@pytest.mark.parametrize("missing", GOOD, ids=lambda fake: fake.architecture)
def test_a_missing_architecture(checker: ModuleType, missing: Fake) -> None:
    assert found(checker, *(fake for fake in GOOD if fake is not missing)) == [
        f"no kernel for {missing.architecture}: check the architectures in kernels/CMakeLists.txt"
    ]


def test_a_warning_of_ptxas(checker: ModuleType) -> None:
    serialized = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources in function 'moe'\n"
    )
    log = "".join(fake.log() for fake in GOOD)
    (line,) = found(checker, *GOOD, log=serialized + log)
    assert "C7510" in line
    assert found(checker, *GOOD, log=log) == []


# What ptxas says of each kernel that calls functions of NVSHMEM's on sm_90a.
SERIALIZED = (
    "ptxas info    : (C7509) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to the presence of Extern calls in the function '{name}'\n"
)


def network(architecture: str, spilled: int = 0, **resources: int) -> Fake:
    code = SM80 if architecture == "sm_80" else SM90
    return Fake(architecture, code, resources, spilled, name="network_float16")


SENDS = (network("sm_90a", STACK=384), network("sm_80", 1536, STACK=512))


def test_kernels_that_send_over_a_network(checker: ModuleType) -> None:
    fakes = (*GOOD, *SENDS)
    log = SERIALIZED.format(name="network_float16") + "".join(fake.log() for fake in fakes)
    assert found(checker, *fakes, log=log, network=True) == []


@pytest.mark.parametrize(
    ("fakes", "complaint"),
    [
        ((network("sm_90a", STACK=385), SENDS[1]), "385 bytes of stack, allowed are 384"),
        ((network("sm_90a", 1), SENDS[1]), "1 bytes of spills, allowed are 0"),
        ((network("sm_90a", REG=169), SENDS[1]), "169 registers, allowed are 168"),
        ((network("sm_90a", SHARED=4096), SENDS[1]), "4096 bytes of static shared memory"),
        ((SENDS[0], network("sm_80", STACK=513)), "513 bytes of stack, allowed are 512"),
        ((SENDS[0], network("sm_80", 1537)), "1537 bytes of spills, allowed are 1536"),
        ((SENDS[0], network("sm_80", REG=129)), "129 registers, allowed are 128"),
        (SENDS[:1], "no kernel with the network transport for sm_80"),
        (SENDS[1:], "no kernel with the network transport for sm_90a"),
        (
            (*SENDS, replace(SENDS[1], architecture="sm_90")),
            "sm_90 network_float16: allowed architectures are sm_80, sm_90a",
        ),
    ],
)
def test_a_kernel_that_sends_with_a_fault(
    checker: ModuleType, fakes: tuple[Fake, ...], complaint: str
) -> None:
    (line,) = found(checker, *GOOD, *fakes, network=True)
    assert complaint in line


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (SM90.replace("HGMMA.64x8x16", "HMMA.16816"), "no HGMMA"),
        (SM90.replace("UTMALDG.2D", "LDG.E"), "no UTMALDG"),
        (SM90.replace("ready:\n", "ready:\nSTL [R1], R24\n"), "1 accesses to local memory"),
    ],
)
def test_a_kernel_that_sends_without_what_makes_it_fast(
    checker: ModuleType, code: str, complaint: str
) -> None:
    (line,) = found(
        checker, *GOOD, Fake("sm_90a", code, name="network_float16"), SENDS[1], network=True
    )
    assert complaint in line


def test_only_calls_of_nvshmem_may_serialize_products(checker: ModuleType) -> None:
    fakes = (*GOOD, *SENDS)
    log = "".join(fake.log() for fake in fakes)
    direct = SERIALIZED.format(name="moe")
    (line,) = found(checker, *fakes, log=direct + log, network=True)
    assert "C7509" in line
    other = SERIALIZED.format(name="network_float16").replace("C7509", "C7510")
    (line,) = found(checker, *fakes, log=other + log, network=True)
    assert "C7510" in line


@pytest.mark.parametrize(
    ("function", "counts"), [("_Z14nvshmemi_quietv", False), ("_Z7combinev", True)]
)
def test_spills_of_functions(checker: ModuleType, function: str, counts: bool) -> None:
    fakes = (*GOOD, *SENDS)
    spills = (
        f"ptxas info    : Function properties for {function}\n"
        "    8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads\n"
    )
    log = "".join(fake.log() + spills for fake in fakes)
    lines = found(checker, *fakes, log=log, network=True)
    assert len(lines) == (len(fakes) if counts else 0), lines


def test_the_log_of_another_build(checker: ModuleType) -> None:
    missing, *others = GOOD
    (line,) = found(checker, *GOOD, log="".join(fake.log() for fake in others))
    assert line.startswith(f"{missing.architecture} moe: is not in the logs")


def test_main_loops() -> None:
    import machine_code

    (kernel,) = machine_code.parse(Fake("sm_90a", SM90).sass(), Fake("sm_90a", SM90).usage())
    (loop,) = machine_code.main_loops(kernel, "HGMMA")
    # The loop over the depth, with the second try of its wait, and not the one over tiles.
    assert [i.address // 16 for i in loop] == [2, 3, 4, 5, 9, 10, 11]


def test_a_branch_on_a_uniform_predicate_may_fall_through() -> None:
    import machine_code

    code = SM80.replace("@P0 BRA depth", "BRA.U UP0, depth")
    (kernel,) = machine_code.parse(Fake("sm_80", code).sass(), "")
    (loop,) = machine_code.main_loops(kernel, "HMMA")
    assert len(loop) == 3
    code = code.replace("LDGSTS.E.BYPASS.128 [R21], [R6.64]", "BRA.U UP1, out")
    (kernel,) = machine_code.parse(Fake("sm_80", code.replace("EXIT", "out:\nEXIT")).sass(), "")
    (loop,) = machine_code.main_loops(kernel, "HMMA")
    assert len(loop) == 3


def test_the_table_names_every_kernel(checker: ModuleType) -> None:
    import machine_code

    fakes = [Fake("sm_90a", SM90, {"REG": 77}, name="one"), Fake("sm_80", SM80, name="two")]
    kernels = machine_code.parse(
        "\n".join(fake.sass() for fake in fakes), "\n".join(fake.usage() for fake in fakes)
    )
    head, one, two = checker.table(kernels).splitlines()
    assert head.split()[:3] == ["arch", "regs", "stack"]
    assert one.split()[:4] == ["sm_90a", "77", "0", "?"]
    assert one.endswith("one")
    assert "1 HMMA   1 LDGSTS" in two


def test_the_command_fails_without_a_file() -> None:
    command = [sys.executable, str(TOOLS / "check_machine_code.py")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "FILE" in process.stderr.upper()
