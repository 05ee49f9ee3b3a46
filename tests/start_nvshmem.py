"""One process of a program that starts NVSHMEM, as far as a machine without GPUs shows it.

usage: python -m tests.start_nvshmem ADDRESS PROCESS FILE; writes what comes of each case, as JSON.
"""

import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from flashmoe_jax import _ffi, runtime
from tests.fake_cuda import FakeExtension, FakeGpu

PROCESSES = 3


class Machine(FakeExtension):
    """The fake, whose functions named in `failing` raise."""

    def __init__(self, process: int, failing: str = "") -> None:
        super().__init__()
        self.pci_bus_id = f"0000:0{process}:00.0"

        def fail(*_: Any) -> Any:
            raise RuntimeError(f"{failing} fails: it says 'no', \u2026")

        if failing:
            setattr(self, failing, fail)


def machine(case: str, process: int) -> Machine:
    failing = {
        ("without NVSHMEM", 1): "load_nvshmem",
        ("without NVSHMEM", 2): "load_nvshmem",
        ("without an id", 0): "nvshmem_unique_id",
        ("does not start", 2): "start_nvshmem",
        ("atomics unknown", 1): "peer_atomics",
    }
    made = Machine(process, failing.get((case, process), ""))
    if case == "unlike" and process == 2:
        made.compute_capability = "8.0"
    if case in ("without atomics", "other hosts") and process == 1:
        made.without_atomics = ("0000:00:00.0", "0000:02:00.0")
    return made


def outcome(case: str, process: int) -> Any:
    made = machine(case, process)
    _ffi._cuda_extension = lambda: made
    _ffi.load_nvshmem.cache_clear()
    host = f"host {process}" if case == "other hosts" else "host"
    socket.gethostname = lambda: host
    counts = [2 if case == "two GPUs" and p == 1 else 1 for p in range(PROCESSES)]
    _ffi.gpus = lambda: [FakeGpu()] * counts[process]
    gpus = [SimpleNamespace(process_index=p) for p in range(PROCESSES) for _ in range(counts[p])]
    devices = jax.devices
    jax.devices = lambda backend=None: gpus if backend == "cuda" else devices(backend)
    runtime._started = False
    try:
        runtime.start()
        runtime.start()
    except RuntimeError as error:
        return str(error)
    finally:
        jax.devices = devices
    return {"started": made.started, "reach": made.reach}


CASES = (
    "two GPUs",
    "without NVSHMEM",
    "without an id",
    "unlike",
    "without atomics",
    "atomics unknown",
    "does not start",
    "other hosts",
    "well",
)


def main(address: str, process: int, file: Path) -> None:
    jax.distributed.initialize(address, num_processes=PROCESSES, process_id=process)
    file.write_text(json.dumps({case: outcome(case, process) for case in CASES}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
