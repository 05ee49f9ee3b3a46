"""How a custom call of this package takes its operands and types its results, on any platform."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# In the order of the C++ enum Activation (kernels/core/types.h).
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def custom_call(
    target: str, results: list[Any], attributes: dict[str, Any], operands: tuple[jax.Array, ...]
) -> list[jax.Array]:
    """Calls the handler registered as `target`, once for all PEs, so never under `vmap`."""

    def call(*operands: jax.Array) -> Any:
        return jax.ffi.ffi_call(target, results)(*operands, **attributes)

    made: list[jax.Array] = refuse_vmap(call)(*operands)
    return made


def refuse_vmap(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, whose results become a list, with a clear error under `vmap`."""

    @jax.custom_batching.custom_vmap
    def wrapped(*operands: jax.Array) -> list[jax.Array]:
        return list(call(*operands))

    @wrapped.def_vmap
    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            "vmap over flashmoe_jax.moe with implementation='fused': one call is one exchange "
            "between all PEs and cannot be batched. Put the batch into the leading dimensions of x "
            "([..., H] is allowed), loop with jax.lax.map, or use implementation='xla'"
        )

    return wrapped


def on_collective_stream(call: Callable[..., Any]) -> Callable[..., Any]:
    """Puts a call that meets its peers on the stream on which XLA runs its own collectives.

    On two streams, a collective of XLA and the kernel could each hold processors that the other
    waits for, on different GPUs. Before jax 0.11.1 the stream has no name.
    """
    if jax.__version_info__ < (0, 11, 1):
        return call
    from jax.experimental import compute_on as module

    compute_on = getattr(module, "compute_on2", module.compute_on)
    wrapped: Callable[..., Any] = compute_on(
        call,
        compute_type="gpu_stream:collective",
        out_memory_spaces=jax.memory.Space.Device,
    )
    return wrapped


def result(like: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """The type of a result, which varies over the mesh axes that `like` varies over."""
    return jax.typeof(like).update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False)


def or_empty(part: jax.Array | None, like: jax.Array, dtype: Any) -> jax.Array:
    """The operand for a part of a call: the empty vector stands for one that it does not have."""
    return vary_as(jnp.zeros((0,), dtype), like) if part is None else part


def varying(value: jax.Array) -> frozenset[str]:
    """The mesh axes over which a value varies; empty with check_vma off."""
    return jax.typeof(value).manual_axis_type.varying


def vary_as(value: jax.Array, like: jax.Array) -> jax.Array:
    """`value`, varying over the axes that `like` varies over: operands must be alike in that."""
    missing = varying(like) - varying(value)
    return lax.pcast(value, tuple(missing), to="varying") if missing else value
