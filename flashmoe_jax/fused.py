"""`implementation="fused"`: the XLA FFI custom call, and its derivative.

Forward returns what backward needs as ordinary values, so that `jit`, `jax.checkpoint`, `scan` and
donation treat it like any other operation. Backward routes, plans and dispatches again with the
same indices: the plan is a function of them, so it is the same one.
"""

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flashmoe_jax import _ffi
from flashmoe_jax.config import deadline_seconds
from flashmoe_jax.local_call import LocalCall
from flashmoe_jax.params import MoEParams

# In the order of the C++ enum Activation (kernels/cpu/activation.h).
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

# Residuals hold rows that nobody wrote. As integers they pass jax_debug_nans.
_BITS = {2: jnp.uint16, 4: jnp.uint32}


@dataclasses.dataclass(frozen=True)
class _Statics:
    """What is known of a call when it is traced, hashable."""

    num_pes: int
    num_experts: int
    activation: int
    capacity: int
    max_rows: int
    deadline_seconds: float
    check_weights: bool
    save_rows: bool
    save_preactivations: bool

    def attributes(self) -> dict[str, Any]:
        """The attributes of the custom calls; their types are those of the C++ CallAttributes."""
        return {
            "num_pes": np.int64(self.num_pes),
            "num_experts": np.int64(self.num_experts),
            "activation": np.int64(self.activation),
            "capacity": np.int64(self.capacity),
            "max_rows": np.int64(self.max_rows),
            "deadline_seconds": np.float64(self.deadline_seconds),
            "check_weights": np.bool_(self.check_weights),
        }


def fused_local(
    x: jax.Array, indices: jax.Array, weights: jax.Array, params: MoEParams, call: LocalCall
) -> tuple[jax.Array, jax.Array]:
    """The experts' part of the layer on this PE's tokens; see `reference.xla.xla_local`.

    Args:
        x: Tokens, [T, H], float32, bfloat16 or float16.
        indices: Global expert of each slot, [T, K] int32; -1 masks a slot.
        weights: Weight of each slot, [T, K] float32.
        params: Local experts, El = E / P of them, in the dtype of x.
        call: The call.

    Returns:
        y [T, H] in the dtype of x, and the number [] int32 of this PE's rows that were dropped.

    Raises:
        ValueError: The symmetric heaps would not fit into memory.
    """
    _ffi.register()
    check_heap(call, x.shape[0], x.dtype)
    config = call.config
    statics = _Statics(
        num_pes=call.num_pes,
        num_experts=config.num_experts,
        activation=_ACTIVATIONS.index(config.activation),
        capacity=-1 if call.capacity is None else call.capacity,
        max_rows=call.max_rows,
        deadline_seconds=deadline_seconds(config),
        check_weights=call.check_routing,
        save_rows=config.save_rows,
        save_preactivations=config.save_preactivations,
    )
    absent = _empty(x, x.dtype)
    experts = (
        params.gate,
        params.up,
        params.down,
        params.gate_bias,
        params.up_bias,
        params.down_bias,
    )
    operands = [absent if part is None else part for part in experts]
    y, dropped = _experts(statics, _coordinates(x, call), x, indices, weights, *operands)
    return y, dropped[0]


def check_heap(call: LocalCall, tokens: int, dtype: Any) -> None:
    """Raises ValueError if the heaps and residuals of this process would not fit into its memory.

    Args:
        call: The call.
        tokens: T, tokens of one PE.
        dtype: Of x.
    """
    config = call.config
    itemsize = jnp.dtype(dtype).itemsize
    rows = recv_rows(call, tokens)
    heap = functools.partial(
        _ffi.extension().heap_bytes,
        call.num_pes,
        tokens,
        config.hidden_size,
        config.num_experts,
        config.experts_per_token,
        call.max_rows,
        itemsize,
    )
    residual_width = config.hidden_size * config.save_rows
    residual_width += config.intermediate_size * (1 + config.gated) * config.save_preactivations
    per_pe = (
        heap(False, False) + heap(True, not config.save_rows) + rows * residual_width * itemsize
    )
    total = per_pe * jax.local_device_count() if call.num_pes > 1 else per_pe
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if total > memory:
        raise ValueError(
            f"the symmetric heaps and residuals of one call would take up to {total / 2**30:.1f} "
            f"GiB ({per_pe / 2**30:.1f} GiB for each PE, whose receive buffer has {rows} rows), "
            f"but this machine has {memory / 2**30:.1f} GiB. {_how_to_bound(call, tokens)}"
        )
    if max(rows, tokens * config.experts_per_token * call.num_pes) >= 2**31:
        raise ValueError(
            f"one call may move fewer than 2**31 rows; this one has {tokens} tokens on each of "
            f"{call.num_pes} PEs, {config.experts_per_token} slots each, and receive buffers of "
            f"{rows} rows. {_how_to_bound(call, tokens)}"
        )


def _how_to_bound(call: LocalCall, tokens: int) -> str:
    return (
        f"Set MoEConfig.max_received_rows (now {call.config.max_received_rows}; the call could "
        f"bring one PE {call.max_rows} rows, and {tokens * call.config.experts_per_token} when the "
        "experts are in balance), or pass fewer tokens at once"
    )


def recv_rows(call: LocalCall, tokens: int) -> int:
    """R, rows of the receive buffer of a PE with T = `tokens`."""
    config = call.config
    return _ffi.extension().recv_rows(
        call.num_pes, tokens, config.num_experts, config.experts_per_token, call.max_rows
    )


def _empty(like: jax.Array, dtype: Any) -> jax.Array:
    """The operand that stands for a part that this call does not have."""
    return _vary_as(jnp.zeros((0,), dtype), like)


def _varying(value: jax.Array) -> frozenset[str]:
    """The mesh axes over which a value varies; empty with check_vma off."""
    return jax.typeof(value).manual_axis_type.varying


def _vary_as(value: jax.Array, like: jax.Array) -> jax.Array:
    """`value`, varying over the axes that `like` varies over: operands must be alike in that."""
    missing = _varying(like) - _varying(value)
    return lax.pcast(value, tuple(missing), to="varying") if missing else value


def _coordinates(x: jax.Array, call: LocalCall) -> jax.Array:
    """Which expert group this PE is in, and its rank there, [2] int32.

    Groups differ in the position along the axes, besides the expert axis, that the call varies
    over. Along another axis the devices hold the same values, and any of them may meet.
    """
    if call.axis is None:
        return jnp.zeros((2,), jnp.int32)
    rank = lax.axis_index(call.axis)
    axes = _varying(x)
    if not _varying(rank):  # check_vma is off: anything may vary
        axes = frozenset(jax.sharding.get_abstract_mesh().axis_names)
    others = tuple(sorted(axes - {call.axis}))
    group = lax.axis_index(others) if others else jnp.int32(0)
    coordinates = [_vary_as(jnp.asarray(i, jnp.int32), x) for i in (group, rank)]
    return jnp.stack(coordinates)


def _result(like: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """The type of a result, which varies over the mesh axes that `like` varies over."""
    return jax.typeof(like).update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False)


def _forward_call(statics: _Statics, save: bool, *operands: jax.Array) -> list[jax.Array]:
    """y, dropped, and the residuals: rows, gate and up pre-activations, each empty if not saved."""
    _, x, indices, _, gate, up, *_ = operands
    rows = _ffi.extension().recv_rows(
        statics.num_pes, x.shape[0], statics.num_experts, indices.shape[1], statics.max_rows
    )
    bits = _BITS[x.dtype.itemsize]
    intermediate = up.shape[2]

    def kept(width: int, wanted: bool) -> Any:
        return _result(x, (rows, width) if save and wanted else (0,), bits)

    results = [
        _result(x, x.shape, x.dtype),
        _result(x, (1,), jnp.int32),
        kept(x.shape[1], statics.save_rows),
        kept(intermediate, statics.save_preactivations and gate.ndim == 3),
        kept(intermediate, statics.save_preactivations),
    ]
    return _ffi_call("flashmoe_forward", results, statics, operands)


def _backward_call(statics: _Statics, *operands: jax.Array) -> list[jax.Array]:
    """Gradients of x, the slot weights, and the parameters."""
    _, x, _, weights, *params = operands[:10]
    results = [_result(x, like.shape, like.dtype) for like in (x, weights, *params)]
    return _ffi_call("flashmoe_backward", results, statics, operands)


def _ffi_call(
    target: str,
    results: list[Any],
    statics: _Statics,
    operands: tuple[jax.Array, ...],
) -> list[jax.Array]:
    @jax.custom_batching.custom_vmap
    def call(*operands: jax.Array) -> list[jax.Array]:
        return list(jax.ffi.ffi_call(target, results)(*operands, **statics.attributes()))

    @call.def_vmap
    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            "vmap over flashmoe_jax.moe with implementation='fused': one call is one exchange "
            "between all PEs and cannot be batched. Put the batch into the leading dimensions of x "
            "([..., H] is allowed), loop with jax.lax.map, or use implementation='xla'"
        )

    return call(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(statics: _Statics, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Y [T, H] and dropped [1] from coordinates, x, indices, weights and the experts."""
    y, dropped, *_ = _forward_call(statics, False, *operands)
    return y, dropped


def _experts_forward(
    statics: _Statics, *operands: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    y, dropped, *residuals = _forward_call(statics, True, *operands)
    return (y, dropped), (*operands, *residuals)


def _experts_backward(
    statics: _Statics,
    saved: tuple[jax.Array, ...],
    gradients: tuple[jax.Array, Any],
) -> tuple[jax.Array | None, ...]:
    dy, _ = gradients
    dx, d_weights, *d_params = _backward_call(statics, *saved, dy)
    return None, dx, None, d_weights, *d_params


_experts.defvjp(_experts_forward, _experts_backward)
