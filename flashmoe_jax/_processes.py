"""What the processes of a program tell each other before the CUDA kernel spans their GPUs.

What fails in one process is raised in all: one that raised alone would leave the others waiting.
"""

import collections
import json
import socket
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flashmoe_jax import _ffi

_REASON_CHARACTERS = 1000


class Gpu(NamedTuple):
    """The GPU of a process.

    Attributes:
        host: Name of its host.
        pci_bus_id: Tells it from the others of its host.
        compute_capability: As CUDA writes it, such as 9.0.
    """

    host: str
    pci_bus_id: str
    compute_capability: str


def gpu_of_this_process(ordinal: int) -> Gpu:
    """The GPU with this ordinal of CUDA."""
    properties = _ffi.cuda_extension().gpu(ordinal)
    return Gpu(socket.gethostname(), properties["pci_bus_id"], properties["compute_capability"])


def check_one_gpu_each() -> None:
    """Checks that every process has one GPU, which all of them know of all.

    Raises:
        RuntimeError: One has none, or several.
    """
    try:
        devices = jax.devices("cuda")
    except RuntimeError:  # JAX has no such backend.
        devices = []
    gpus = collections.Counter(device.process_index for device in devices)
    for process in range(jax.process_count()):
        if gpus[process] != 1:
            raise RuntimeError(
                f"process {process} has {gpus[process]} GPUs, and {_ffi.ONE_PROCESS_PER_GPU}"
            )


def of_all(ask: Callable[[], Any]) -> list[Any]:
    """What `ask` returns in every process, in their order. All processes must call it.

    Args:
        ask: Returns what JSON can hold, no more than a hundred numbers and a few for each process.

    Raises:
        RuntimeError: It has raised in some processes, which the message names with their reasons.
    """
    answer, reason = None, None
    try:
        answer = ask()
    except Exception as error:  # Whatever it is, the other processes wait to hear of it.
        reason = f"{error}"[:_REASON_CHARACTERS] or repr(error)
    told = _gather([answer, reason])
    processes: dict[str, list[int]] = {}
    for process, (_, failed) in enumerate(told):
        if failed is not None:
            processes.setdefault(failed, []).append(process)
    if processes:
        raise RuntimeError(
            "the processes cannot start NVSHMEM: "
            + "; ".join(f"{_named(who)}: {why}" for why, who in processes.items())
        )
    return [answer for answer, _ in told]


def check_alike(gpus: Sequence[Gpu]) -> None:
    """Checks that the kernel is the same on all GPUs: PEs count each other's tiles in signals.

    Args:
        gpus: Of all processes, in their order.

    Raises:
        RuntimeError: Their compute capabilities differ.
    """
    processes: dict[str, list[int]] = {}
    for process, gpu in enumerate(gpus):
        processes.setdefault(gpu.compute_capability, []).append(process)
    if len(processes) > 1:
        found = "; ".join(f"{_named(who)}: {what}" for what, who in processes.items())
        raise RuntimeError(
            "the CUDA kernel spans GPUs of one compute capability only, and here they differ "
            f"({found}); use implementation='xla'"
        )


def check_atomics(gpus: Sequence[Gpu], ordinal: int) -> None:
    """Checks that signals between GPUs of one host are not lost. All processes must call it.

    Args:
        gpus: Of all processes, in their order.
        ordinal: CUDA's, of this process's GPU.

    Raises:
        RuntimeError: There are GPUs without native atomics between them.
    """
    mine = gpus[jax.process_index()]

    def without() -> list[int]:
        return [
            process
            for process, gpu in enumerate(gpus)
            if gpu.host == mine.host
            and gpu.pci_bus_id != mine.pci_bus_id
            and not _ffi.cuda_extension().peer_atomics(ordinal, gpu.pci_bus_id)
        ]

    told = enumerate(of_all(without))
    pairs = sorted({(min(a, b), max(a, b)) for a, others in told for b in others})
    if pairs:
        raise RuntimeError(
            "GPUs that address each other's memory must have native atomics between them, as over "
            f"NVLink, and those of processes {', '.join(f'{a} and {b}' for a, b in pairs)} have "
            "none; use implementation='xla'"
        )


def _gather(value: Any) -> list[Any]:
    """`value` of every process, in their order."""
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode().ljust(2**14 + 16 * jax.process_count())
    rows = multihost_utils.process_allgather(np.frombuffer(text, np.uint8))
    return [json.loads(np.asarray(row).tobytes()) for row in rows]


def _named(processes: Sequence[int]) -> str:
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes))}"
