"""The CUDA kernel's state in this process: NVSHMEM, symmetric heaps, and how calls failed.

A heap is made on a GPU before a program that needs it is executed there for the first time, never
inside a call, and serves all calls of the same sizes. On GPUs a call that fails cannot raise: its y
is NaN, the calls after it on the same heap raise, and so does `check`.
"""

import collections
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from flashmoe_jax import _ffi, _processes
from flashmoe_jax.local_call import LocalCall


class CallError(RuntimeError):
    """A call of the fused implementation failed on a GPU."""


_lock = threading.Lock()
_started = False


def start() -> None:
    """Starts NVSHMEM, which calls that span several GPUs need.

    All processes must call it, each with one GPU, before they trace such a call; after
    `jax.distributed.initialize`. Later calls do nothing, nor does one in a program of one process,
    whose calls cannot span GPUs.

    Raises:
        RuntimeError: In all processes alike: NVSHMEM is missing, too old, or does not start in
            some of them, or the kernel cannot span their GPUs.
    """
    global _started
    with _lock:
        if _started or jax.process_count() == 1:
            return
        _processes.check_one_gpu_each()
        ordinal = _first_gpu()
        told = _processes.of_all(lambda: _before_start(ordinal))
        gpus = [_processes.Gpu(*gpu) for gpu, _ in told]
        _processes.check_alike(gpus)
        _processes.check_atomics(gpus, ordinal)
        unique_id = bytes.fromhex(told[0][1])
        reach = _processes.of_all(lambda: _start_nvshmem(unique_id, ordinal))
        _ffi.cuda_extension().set_nvshmem_reach([reached for row in reach for reached in row])
        _started = True


def _before_start(gpu: int) -> tuple[_processes.Gpu, str]:
    """The GPU of this process and, of process 0, NVSHMEM's unique id in hexadecimal."""
    reason = _ffi.why_not_several_gpus()
    if reason is not None:
        raise RuntimeError(reason)
    unique_id = b""
    if jax.process_index() == 0:
        unique_id = _ffi.cuda_extension().nvshmem_unique_id()
    return _processes.gpu_of_this_process(gpu), unique_id.hex()


def _start_nvshmem(unique_id: bytes, gpu: int) -> list[bool]:
    """Starts it and says, of each process, whether this one's GPU addresses its memory."""
    module = _ffi.cuda_extension()
    module.start_nvshmem(unique_id, jax.process_index(), jax.process_count(), gpu)
    return list(module.nvshmem_reach())


def check() -> None:
    """Waits for the GPUs and raises if a call has failed since the last `reset`.

    Does nothing where the CUDA module is not there.

    Raises:
        CallError: One has; says which PE failed in which phase, and what it awaited.
    """
    module = _ffi.cuda_extension_if_any()
    messages = [] if module is None else module.failures()
    if messages:
        raise CallError("; ".join(messages))


def reset() -> None:
    """Waits for the GPUs and frees all symmetric heaps; calls make new ones.

    For use after a failure, or to have the memory back. With NVSHMEM started, all processes must
    call it. Does nothing where the CUDA module is not there.
    """
    module = _ffi.cuda_extension_if_any()
    if module is not None:
        module.reset()


def why_not_several_gpus() -> str | None:
    """Why calls cannot span several GPUs here, or None if they can."""
    reason = _ffi.why_not_several_gpus()
    if reason is not None or _started:
        return reason
    if jax.process_count() == 1:
        return f"this program has one process, and {_ffi.ONE_PROCESS_PER_GPU}"
    return (
        "NVSHMEM has not been started; call flashmoe_jax.runtime.start() in all processes, "
        "after jax.distributed.initialize"
    )


def process_groups(mesh: Mesh | AbstractMesh, axis: str) -> np.ndarray:
    """[groups, P] int32: the processes of every expert group of a mesh, in the order of ranks.

    Args:
        mesh: Of the call.
        axis: Its axis along which a group lies.

    Raises:
        ValueError: The mesh does not have exactly one device of every process, or does not say
            which devices it has.
    """
    if isinstance(mesh, AbstractMesh):
        raise ValueError(
            "the CUDA kernel must know which devices are in an expert group, and the mesh of this "
            "call is abstract; pass mesh=jax.make_mesh(...) to moe, or make the mesh current with "
            "jax.set_mesh around the program"
        )
    processes = np.vectorize(lambda device: device.process_index, otypes=[np.int32])(mesh.devices)
    devices = collections.Counter(processes.flat)
    for process in range(jax.process_count()):
        if devices[process] != 1:
            raise ValueError(
                f"{devices[process]} devices of the mesh belong to process {process}; calls of the "
                "CUDA kernel that span several GPUs need a mesh with one device of every process"
            )
    by_group = np.moveaxis(processes, mesh.axis_names.index(axis), -1)
    return by_group.reshape(-1, by_group.shape[-1])


def check_memory(call: LocalCall, tokens: int, dtype: jax.typing.DTypeLike, *, exact: bool) -> None:
    """Checks that what a call keeps on a GPU could ever fit there, beside what XLA holds.

    Args:
        call: The call.
        tokens: T, tokens of one PE.
        dtype: Of x.
        exact: See `cuda_call.KernelCall`.

    Raises:
        ValueError: It could not.
    """
    module = _ffi.cuda_extension()
    config = call.config
    sizes = module.CallSizes(
        num_pes=call.num_pes,
        tokens=tokens,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        capacity=-1 if call.capacity is None else call.capacity,
        max_rows=call.max_rows,
        dtype=jnp.dtype(dtype).name,
        exact=exact,
    )
    gpu = _first_gpu()
    heap, workspace, rows = module.required_memory(sizes, gpu)
    call.check_rows(tokens, rows)
    _, total = module.free_and_total_memory(gpu)
    held = _held_by_xla()
    if heap + workspace > total - held:
        has = f"has {total / 2**30:.1f} GiB"
        if heap + workspace <= total:
            has += (
                f", of which XLA holds {held / 2**30:.1f} GiB; a lower "
                "XLA_PYTHON_CLIENT_MEM_FRACTION leaves more"
            )
        raise ValueError(
            f"the symmetric heap and the workspace of one call would take "
            f"{(heap + workspace) / 2**30:.1f} GiB (the receive buffer of a PE has {rows} rows), "
            f"but GPU {gpu} {has}. {call.how_to_bound(tokens)}"
        )


def _held_by_xla() -> int:
    """Bytes of a GPU of this process that are XLA's for good.

    Its pool never shrinks. The limit of the pool says less: in recent versions it is the whole GPU
    by default, and without preallocation the pool may stay far below it.
    """
    gpus = _ffi.gpus()
    statistics = gpus[0].memory_stats() if gpus else None
    return (statistics or {}).get("pool_bytes", 0)


def _first_gpu() -> int:
    """CUDA's ordinal of a GPU of this process; those of one process are alike."""
    return next((gpu.local_hardware_id for gpu in _ffi.gpus()), 0)
