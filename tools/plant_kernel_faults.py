#!/usr/bin/env python3
"""Plants faults in a copy of the CUDA kernel, one at a time, and proves that its tests find each.

    tools/plant_kernel_faults.py [--jobs N] build/emulator [name ...]

Needs a build folder of `make emulator-build`. Of a copy only tests/emulator/planted/fault_tests.cc
is compiled, with one engine and the transport that the fault is in. Exit status 1 if a fault is not
found, or if the right kernel fails.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The cases that are run on every copy, and how many schedules of each. The right kernel shows only
# that copies are built as they should be; `make emulator-test` tests it.
CASES = ("schedules: any layer", "schedules: epochs")
SCHEDULES = 30
SCHEDULES_IF_RIGHT = 4
# A copy takes seconds. One that hangs is not found: the emulator must see it.
TIME_LIMIT = 300


@dataclasses.dataclass(frozen=True)
class Fault:
    """An edit of one source, which a test program must find."""

    name: str
    source: str
    right: str  # occurs once in the source
    wrong: str
    test: str = "direct_fault_tests"


FAULTS = (
    Fault(
        "no release before arrived",
        "kernels/cuda/dispatch.h",
        "    context.fence_before_signal();\n",
        "",
    ),
    Fault(
        "no acquire after arrived",
        "kernels/cuda/transport.h",
        "    return wait_for_count<device::Scope::kSystem>("
        "context, context.arrived(context.rank, block),\n"
        "                                                  rows, Failure::kRows, block);\n",
        "    const uint64_t* arrived = context.arrived(context.rank, block);\n"
        "    return wait_until(\n"
        "        context, Failure::kRows, block, rows,\n"
        "        [&] { return device::load_relaxed<device::Scope::kSystem>(arrived); },\n"
        "        [&](uint64_t seen) { return seen >= rows; });\n",
    ),
    Fault(
        "arrived not reset",
        "kernels/cuda/kernel.h",
        "        device::store_relaxed<Scope::kSystem>("
        "context.arrived(context.rank, block), uint64_t{0});\n",
        "",
    ),
    Fault(
        "first_done not reset",
        "kernels/cuda/kernel.h",
        "        device::store_relaxed<Scope::kGpu>(context.first_done(block), 0u);\n",
        "",
    ),
    Fault("ticket not reset", "kernels/cuda/kernel.h", "      control->ticket = 0;\n", ""),
    Fault("barrier not reset", "kernels/cuda/kernel.h", "      control->barrier = 0;\n", ""),
    Fault(
        "came_back not reset",
        "kernels/cuda/transport.h",
        "    device::store_relaxed<device::Scope::kSystem>(came_back, uint64_t{0});\n",
        "",
    ),
    Fault(
        "counts of one parity",
        "kernels/cuda/context.h",
        "const int32_t row = core::parity(epoch) * s.num_pes + source;",
        "const int32_t row = source;",
    ),
    Fault(
        "no proxy fence before TMA reads",
        "kernels/cuda/tiles.h",
        "      device::fence_proxy_async();\n",
        "",
    ),
    Fault(
        "stage reused one iteration early",
        "kernels/cuda/engine_sm90.h",
        "if (begin > 0) release(shared, previous);",
        "release(shared, position.stage());",
    ),
    Fault(
        "second stage does not wait for the last first-stage tile",
        "kernels/cuda/tiles.h",
        "static_cast<uint64_t>(first_stage_tiles()) * kPiecesOfTile",
        "static_cast<uint64_t>(first_stage_tiles() - 1) * kPiecesOfTile",
    ),
    Fault(
        "tickets in reverse order",
        "kernels/cuda/tiles.h",
        "order.at(ticket)",
        "order.at(count - 1 - ticket)",
    ),
    Fault(
        "combine one piece early",
        "kernels/cuda/combine.h",
        "uint64_t{pieces} * device::count_bits(mask));",
        "uint64_t{pieces} * device::count_bits(mask) - (mask != 0));",
    ),
    Fault(
        "results returned to the neighbouring slot",
        "kernels/cuda/transport.h",
        "returned) + origin.slot * returned.stride;",
        "returned) + (origin.slot ^ 1) * returned.stride;",
    ),
    Fault(
        "network: no fence before a put",
        "kernels/cuda/network_transport.h",
        "    device::fence<device::Scope::kSystem>();\n",
        "",
        "network_fault_tests",
    ),
    Fault(
        "network: rows do not wait for their origins",
        "kernels/cuda/network_transport.h",
        "                         kSignalsOfRow, rows, Failure::kRows, block);",
        "                         1, rows, Failure::kRows, block);",
        "network_fault_tests",
    ),
    Fault(
        "network: no acquire of the signals of puts",
        "kernels/cuda/network_transport.h",
        "return came && (signals == 0 || device::signal_reached(network, signals));",
        "return came;",
        "network_fault_tests",
    ),
    Fault(
        "network: no acquire of the signals of counts",
        "kernels/cuda/route.h",
        "      if (came) Transport::saw_counts(context, pe, last);\n",
        "",
        "network_fault_tests",
    ),
    Fault(
        "network: signals of rows not reset",
        "kernels/cuda/network_transport.h",
        "      device::store_relaxed<device::Scope::kSystem>("
        "own<uint64_t>(context, layout.arrived) + i,\n"
        "                                                    uint64_t{0});\n",
        "",
        "network_fault_tests",
    ),
    Fault(
        "network: results sent one piece early",
        "kernels/cuda/network_transport.h",
        "second_done(context, part), pieces,",
        "second_done(context, part), pieces - 1,",
        "network_fault_tests",
    ),
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the tests say of a copy."""

    passed: bool
    seconds: float
    says: str  # the first failure; "" if they passed, or ended without a word


class Copies:
    """Copies of the sources, compiled as the build folder says."""

    def __init__(self, build: Path, folder: Path) -> None:
        self.build = build
        self.folder = folder
        self.commands = json.loads((build / "compile_commands.json").read_text())

    def run(self, test: str, fault: Fault | None, number: int) -> Verdict:
        """Runs a test program of a copy of its own with that fault, or without any."""
        started = time.monotonic()
        sources = self.folder / str(number)
        for part in ("kernels", "tests"):
            shutil.copytree(ROOT / part, sources / part)
        if fault is not None:
            plant(fault, sources)
        program = self.compile(test, sources)
        says = ""
        schedules = SCHEDULES_IF_RIGHT if fault is None else SCHEDULES
        command = [str(program), f"--schedules={schedules}", *CASES]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tests:
            assert tests.stdout is not None
            limit = threading.Timer(TIME_LIMIT, tests.kill)
            limit.start()
            for line in tests.stdout:
                if line.startswith("FAILED"):
                    says = line.strip()
                    tests.terminate()  # one failure is enough
                    break
            limit.cancel()
        shutil.rmtree(sources)
        return Verdict(tests.returncode == 0, time.monotonic() - started, says)

    def compile(self, test: str, sources: Path) -> Path:
        """Builds a test program of a copy, with the other objects of the build folder."""
        objects = {}
        for entry in self.commands:
            if f"/{test}.dir/" not in entry["output"]:
                continue
            command = shlex.split(entry["command"])
            output = command.index("-o") + 1
            compiled = str(sources / Path(command[output]).name)
            objects[command[output]] = compiled
            command = [part.replace(str(ROOT), str(sources)) for part in command]
            command[output] = compiled
            # A copy runs for seconds: what takes time is its compilation.
            subprocess.run([*command, "-O1"], check=True)
        if not objects:
            raise SystemExit(f"{self.build} has no {test}: run `make emulator-build` first")
        link = subprocess.run(
            [
                "ninja",
                "-C",
                str(self.build),
                "-t",
                "commands",
                "-s",
                f"tests/emulator/planted/{test}",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        program = sources / test
        command = shlex.split(link.strip())
        command = command[command.index("&&") + 1 : len(command) - command[::-1].index("&&") - 1]
        command[command.index("-o") + 1] = str(program)
        if not objects.keys() <= set(command):
            raise SystemExit(f"the link command of {test} lacks objects that were compiled for it")
        command = [objects.get(part, part) for part in command]
        subprocess.run(command, check=True, cwd=self.build)
        return program


def plant(fault: Fault, sources: Path) -> None:
    """Edits a copy. Exits if what is to be changed is not there exactly once."""
    path = sources / fault.source
    text = path.read_text()
    if text.count(fault.right) != 1:
        raise SystemExit(
            f"{fault.name}: {fault.source} has {text.count(fault.right)} times what is to be "
            f"changed, {fault.right!r}; adapt {Path(__file__).name}"
        )
    path.write_text(text.replace(fault.right, fault.wrong))


def main() -> int:
    """Tests the copies and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="the build folder of the emulator's tests")
    parser.add_argument("--jobs", type=int, default=1, help="copies at a time")
    parser.add_argument("names", nargs="*", help="parts of the names of the faults; all without")
    arguments = parser.parse_args()
    wanted = [
        fault
        for fault in FAULTS
        if not arguments.names or any(name in fault.name for name in arguments.names)
    ]
    if not wanted:
        parser.error("no fault has such a name")
    missed = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool,
    ):
        copies = Copies(arguments.build.resolve(), Path(folder))
        right = {fault.test: None for fault in wanted}
        planned = [*right.items(), *((fault.test, fault) for fault in wanted)]
        runs = [
            (fault, pool.submit(copies.run, test, fault, number))
            for number, (test, fault) in enumerate(planned)
        ]
        for fault, run in runs:
            verdict = run.result()
            good = verdict.passed if fault is None else verdict.says != ""
            missed += not good
            name = "the kernel as it is" if fault is None else fault.name
            outcome = "passed" if verdict.passed else "found" if verdict.says else "crash"
            print(f"{'  ' if good else '! '}{outcome:6} {verdict.seconds:6.1f} s  {name}")
            if verdict.says:
                print(f"           {verdict.says[:300]}")
            sys.stdout.flush()
    print(f"{len(runs) - missed} of {len(runs)} as it must be")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
