"""The CUDA kernel's state in this process: symmetric heaps, NVSHMEM, and how calls failed.

Memory for a call is reserved while it is traced, never inside it. On GPUs a call that fails cannot
raise: its y is NaN, the calls after it on the same symmetric heap raise, and so does `check`.
"""

import concurrent.futures
import dataclasses
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from flashmoe_jax import _ffi
from flashmoe_jax.local_call import LocalCall

# With these values of jax_default_matmul_precision, float32 products may be TF32.
_TF32_PRECISIONS = ("default", "fastest", "bfloat16", "tensorfloat32", "TF32_TF32_F32")


class CallError(RuntimeError):
    """A call of the fused implementation failed on a GPU."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where this process stands in its expert group."""

    gpu: int
    rank: int
    processes: tuple[int, ...]


_lock = threading.Lock()
_reserved: dict[tuple[Any, ...], int] = {}
_started = False


def check() -> None:
    """Waits for the GPUs and raises if a call has failed since the last `reset`.

    Raises:
        CallError: One has; says which PE failed in which phase, and what it awaited.
    """
    messages = _ffi.cuda_extension().failures()
    if messages:
        raise CallError("; ".join(messages))


def reset() -> None:
    """Makes all symmetric heaps anew after a failure, so that they can be used again.

    With several processes all of them must call it.
    """
    with _lock:
        _ffi.cuda_extension().reset()


def start() -> None:
    """Starts NVSHMEM, which calls that span several GPUs need; they do it by themselves if need be.

    All processes must call it, each with one GPU. Later calls do nothing.

    Raises:
        RuntimeError: NVSHMEM is missing, too old, or does not start.
    """
    with _lock:
        _start()


def _start() -> None:
    global _started
    if _started:
        return
    reason = _ffi.why_not_several_gpus()
    if reason is not None:
        raise RuntimeError(reason)
    # A thread of its own has no trace and no mesh around it.
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as executor:
        unique_id = executor.submit(_agree_on_unique_id).result()
    gpu = jax.local_devices()[0].local_hardware_id
    _ffi.cuda_extension().start_nvshmem(unique_id, jax.process_index(), jax.process_count(), gpu)
    _started = True


def _agree_on_unique_id() -> bytes:
    from jax.experimental import multihost_utils

    mine = bytes(128)
    if jax.process_index() == 0:
        mine = _ffi.cuda_extension().nvshmem_unique_id()
    agreed = multihost_utils.broadcast_one_to_all(np.frombuffer(mine, np.uint8))
    return np.asarray(agreed, np.uint8).tobytes()


def reserve(
    call: LocalCall, tokens: int, dtype: jax.typing.DTypeLike, mesh: Mesh | AbstractMesh | None
) -> int:
    """Makes room for a call on this process's GPU, once for all calls of the same sizes.

    Collective, in program order, where the call spans several processes.

    Args:
        call: The call.
        tokens: T, tokens of one PE.
        dtype: Of x.
        mesh: Of the call, or None.

    Returns:
        What names the memory in the attributes of the custom call.

    Raises:
        ValueError: The memory does not fit, or the devices of the expert group are not known.
        RuntimeError: CUDA or NVSHMEM refuses.
    """
    module = _ffi.cuda_extension()
    config = call.config
    sizes = {
        "num_pes": call.num_pes,
        "tokens": tokens,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "num_experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "capacity": -1 if call.capacity is None else call.capacity,
        "max_rows": call.max_rows,
        "dtype": jnp.dtype(dtype).name,
        "exact": jax.config.jax_default_matmul_precision not in _TF32_PRECISIONS,
    }
    place = _place(call, mesh)
    key = (*sizes.values(), place)
    with _lock:
        if key not in _reserved:
            call_sizes = module.CallSizes(**sizes)
            _check_memory(call, tokens, call_sizes, place.gpu)
            if call.num_pes > 1:
                _start()
            _reserved[key] = module.reserve(
                call_sizes, place.gpu, place.rank, list(place.processes)
            )
        return _reserved[key]


def _place(call: LocalCall, mesh: Mesh | AbstractMesh | None) -> _Place:
    devices = _concrete_devices(mesh)
    if call.num_pes == 1:
        mine = [] if devices is None else _local(devices)
        return _Place((mine[0] if mine else _default_gpu()).local_hardware_id, 0, ())
    if devices is None:
        raise ValueError(
            "the CUDA kernel must know which devices are in an expert group, and the mesh of this "
            "call is abstract; pass mesh=jax.make_mesh(...) to moe, or make the mesh current with "
            "jax.set_mesh around the program"
        )
    axis = mesh.axis_names.index(call.axis)  # type: ignore[union-attr]
    return _place_in_group(devices, axis)


def _place_in_group(devices: np.ndarray, axis: int) -> _Place:
    """The place of this process, whose group is the line of devices along an axis through its own.

    Raises:
        ValueError: Not exactly one device of the mesh belongs to this process.
    """
    mine = _local(devices)
    if len(mine) != 1:
        raise ValueError(
            f"{len(mine)} devices of the mesh belong to process {jax.process_index()}; a call of "
            "the CUDA kernel that spans several GPUs needs one process for each"
        )
    place = [int(i) for i in np.argwhere(devices == mine[0])[0]]
    rank = place[axis]
    others = tuple(place[:axis] + place[axis + 1 :])
    group = np.moveaxis(devices, axis, -1)[others]
    return _Place(mine[0].local_hardware_id, rank, tuple(d.process_index for d in group))


def _local(devices: np.ndarray) -> list[Any]:
    return [device for device in devices.flat if device.process_index == jax.process_index()]


def _default_gpu() -> Any:
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.local_devices()[0]


def _concrete_devices(mesh: Mesh | AbstractMesh | None) -> np.ndarray | None:
    """The devices of a mesh; of an abstract one, those of the current mesh if it is the same."""
    if isinstance(mesh, Mesh):
        return mesh.devices
    if mesh is None:
        return None
    # jax.sharding.get_mesh refuses to answer while a program is traced.
    from jax._src.mesh import get_concrete_mesh

    current = get_concrete_mesh()
    if current is None or current.empty or current.shape_tuple != mesh.shape_tuple:
        return None
    return current.devices


def _check_memory(call: LocalCall, tokens: int, sizes: Any, gpu: int) -> None:
    module = _ffi.cuda_extension()
    heap, workspace, rows = module.required_memory(sizes, gpu)
    call.check_rows(tokens, rows)
    free, total = module.free_and_total_memory(gpu)
    if heap + workspace > free:
        gib = 2**30
        raise ValueError(
            f"the symmetric heap and the workspace of one call would take "
            f"{(heap + workspace) / gib:.1f} GiB (the receive buffer of a PE has {rows} rows), but "
            f"{free / gib:.1f} of the {total / gib:.1f} GiB of GPU {gpu} are free beside what XLA "
            "has taken for itself; XLA_PYTHON_CLIENT_MEM_FRACTION makes that less. "
            f"{call.how_to_bound(tokens)}"
        )
