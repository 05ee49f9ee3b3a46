"""Checks the machine code of the CUDA kernels: what is slow there is no error to the compiler.

usage: python tools/check_machine_code.py [--log FILE ...] [--network IMAGE ...] FILE ...

A FILE is the module, an object or a cubin; an IMAGE has the kernels with the network transport,
which the module keeps as data; a log is what `ptxas -v` said when one of them was compiled. Prints
a table of all kernels, and ends with status 1 where a kernel lacks the instructions that make it
fast, spills, or needs more than its budget. cuobjdump and nvdisasm are those that
cuda_toolchain.py installs.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import cuda_toolchain
import machine_code
from machine_code import Kernel


@dataclass(frozen=True)
class Budget:
    """What the kernels of an architecture must have and may take."""

    multiply: str  # the matrix instruction
    load: str  # the asynchronous load
    threads: int  # a block, as in __launch_bounds__
    registers: int  # a thread; they and the threads fill the 64 K registers of an SM
    shared: int  # bytes of static shared memory: the stages are dynamic
    stack: int = 0  # bytes a thread
    spills: int = 0  # bytes stored and loaded, outside the main loops


BUDGETS = {
    "sm_80": Budget("HMMA", "LDGSTS", threads=512, registers=128, shared=1024),
    # On sm_90, 1 KB of every block's shared memory is the system's, and counted here.
    "sm_90": Budget("HMMA", "LDGSTS", threads=512, registers=128, shared=2048),
    "sm_90a": Budget("HGMMA", "UTMALDG", threads=384, registers=168, shared=2048),
}
# Kernels with the network transport, launched as the others are. NVSHMEM's functions have a stack.
# On sm_80, where a thread has fewer registers, ptxas also spills in kernels that call them: 1192
# to 1324 bytes, none of them in a main loop.
NETWORK_BUDGETS = {
    "sm_80": replace(BUDGETS["sm_80"], stack=512, spills=1536),
    "sm_90a": replace(BUDGETS["sm_90a"], stack=384),
}
_NETWORK = "network_"
# It has no products; it waits for what others have put.
_QUIET = "network_quiet"
# ptxas does not overlap the products of a kernel that calls functions of another library.
_SERIALIZED = re.compile(rf"\(C7509\).* due to the presence of Extern calls .*'{_NETWORK}\w+'")
_LOCAL = ("LDL", "STL")
_SPILL_ADVICE = (
    "keep fewer values alive (smaller tiles, fewer unrolled steps), index arrays with constants "
    "only, or give the kernel more registers"
)


def complaints(kernel: Kernel, budget: Budget) -> list[str]:
    """What is wrong with a kernel: what was found, what is allowed, what to do."""
    found = []

    def limit(what: str, value: int, allowed: int, advice: str) -> None:
        if value > allowed:
            found.append(f"{value} {what}, allowed are {allowed}: {advice}")

    for name, purpose in ((budget.multiply, "matrix products"), (budget.load, "loads")):
        if kernel.count(name) == 0:
            found.append(
                f"no {name}, at least one must be there: its {purpose} do not use the unit "
                "they are written for; look for a condition that is always false"
            )
    loops = machine_code.main_loops(kernel, budget.multiply)
    if kernel.count(budget.multiply) > 0 and not loops:
        found.append(
            f"no loop around {budget.multiply}, at least one must be there: the loop over the "
            "depth is gone; look for a trip count that is a constant"
        )
    for loop in loops:
        local = sum(i.is_a(*_LOCAL) for i in loop)
        where = f"accesses to local memory in its main loop at {loop[0].address:#x}"
        limit(where, local, 0, _SPILL_ADVICE)
    limit("bytes of stack", max(kernel.stack, kernel.local), budget.stack, _SPILL_ADVICE)
    limit("bytes of spills", kernel.spills or 0, budget.spills, _SPILL_ADVICE)
    limit(
        "registers",
        kernel.registers,
        budget.registers,
        f"{budget.threads} threads with more do not fit on an SM; state them in __launch_bounds__",
    )
    limit(
        "bytes of static shared memory",
        kernel.shared,
        budget.shared,
        "put it into the dynamic shared memory, where the stages are",
    )
    return found


def check(
    kernels: list[Kernel], warnings: Iterable[str], logged: bool, network: bool = False
) -> list[str]:
    """What is wrong with all kernels, one complaint a line.

    Args:
        kernels: Those of the module and of the images.
        warnings: Of ptxas.
        logged: Whether there were logs, which then must be of these kernels.
        network: Whether there were images of kernels with the network transport.
    """
    found = [
        f"ptxas: {w} (allowed is no warning: change what it names)"
        for w in warnings
        if not _SERIALIZED.search(w)
    ]
    for wanted in (False, True) if network else (False,):
        there = {k.architecture for k in kernels if k.name.startswith(_NETWORK) == wanted}
        what = "kernel with the network transport" if wanted else "kernel"
        for architecture in NETWORK_BUDGETS if wanted else BUDGETS:
            if architecture not in there:
                found.append(
                    f"no {what} for {architecture}: check the architectures in "
                    "kernels/CMakeLists.txt"
                )
    for kernel in kernels:
        label = f"{kernel.architecture} {readable(kernel.name)}"
        budgets = NETWORK_BUDGETS if kernel.name.startswith(_NETWORK) else BUDGETS
        budget = budgets.get(kernel.architecture)
        if budget is None:
            found.append(f"{label}: allowed architectures are {', '.join(budgets)}; add a budget")
            continue
        found += [f"{label}: {complaint}" for complaint in complaints(kernel, budget)]
        if logged and kernel.spills is None:
            found.append(f"{label}: is not in the logs of ptxas: pass those of the same build")
    return found


def readable(name: str) -> str:
    """The name of a kernel as in its source, where c++filt is there to say it."""
    if tool := shutil.which("c++filt"):
        process = subprocess.run([tool, "-p", name], capture_output=True, text=True, check=True)
        return process.stdout.strip().replace("flashmoe::cuda::", "")
    return name


def table(kernels: Iterable[Kernel]) -> str:
    """A line for each kernel."""
    head = (
        "arch",
        "regs",
        "stack",
        "spills",
        "shared",
        "multiplies",
        "loads",
        "main loops",
        "bytes",
    )
    rows = [(*head, "kernel")]
    for kernel in kernels:
        budget = BUDGETS.get(kernel.architecture)
        multiply, load = (budget.multiply, budget.load) if budget else ("HMMA", "LDGSTS")
        loops = machine_code.main_loops(kernel, multiply)
        code = kernel.instructions
        step = code[1].address - code[0].address if len(code) > 1 else 0
        rows.append(
            (
                kernel.architecture,
                str(kernel.registers),
                str(max(kernel.stack, kernel.local)),
                "?" if kernel.spills is None else str(kernel.spills),
                str(kernel.shared),
                f"{kernel.count(multiply)} {multiply}",
                f"{kernel.count(load)} {load}",
                "+".join(str(len(loop)) for loop in loops) or "0",
                str(code[-1].address + step if code else 0),
                readable(kernel.name),
            )
        )
    widths = [max(len(row[c]) for row in rows) for c in range(len(head))]
    return "\n".join(
        "  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def _dump(option: str, file: Path) -> str:
    folder = cuda_toolchain.bin_folder(cuda_toolchain.install())
    command = [str(folder / "cuobjdump"), option, str(file)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)}: {process.stderr.strip() or process.stdout.strip()}")
    return process.stdout


def _read(file: Path) -> list[Kernel]:
    return machine_code.parse(_dump("-sass", file), _dump("-res-usage", file))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Checks the machine code of the CUDA kernels.")
    parser.add_argument("files", nargs="+", type=Path, help="module, object or cubin")
    parser.add_argument("--log", action="append", default=[], type=Path, help="what ptxas -v said")
    parser.add_argument(
        "--network", action="append", default=[], type=Path, help="image with the network transport"
    )
    arguments = parser.parse_args()
    kernels = [kernel for file in arguments.files for kernel in _read(file)]
    for image in arguments.network:
        # The others are functions of NVSHMEM's.
        kernels += [k for k in _read(image) if k.name.startswith(_NETWORK) and k.name != _QUIET]
    warnings = [w for log in arguments.log for w in machine_code.read_log(log.read_text(), kernels)]
    print(table(kernels))
    found = check(kernels, warnings, bool(arguments.log), bool(arguments.network))
    if found:
        sys.exit("\n".join(["", *found]))
    print(f"All {len(kernels)} kernels are as they should be.")


if __name__ == "__main__":
    main()
