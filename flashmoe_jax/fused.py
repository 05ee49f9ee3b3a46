"""`implementation="fused"` on CPU: the XLA FFI custom call, and its derivative.

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
from flashmoe_jax.custom_call import ACTIVATIONS, custom_call, or_empty, result, vary_as, varying
from flashmoe_jax.local_call import LocalCall
from flashmoe_jax.params import MoEParams

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
        activation=ACTIVATIONS.index(config.activation),
        capacity=-1 if call.capacity is None else call.capacity,
        max_rows=call.max_rows,
        deadline_seconds=deadline_seconds(config),
        check_weights=call.check_routing,
        save_rows=config.save_rows,
        save_preactivations=config.save_preactivations,
    )
    experts = (
        params.gate,
        params.up,
        params.down,
        params.gate_bias,
        params.up_bias,
        params.down_bias,
    )
    operands = [or_empty(part, x, x.dtype) for part in experts]
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
            f"but this machine has {memory / 2**30:.1f} GiB. {call.how_to_bound(tokens)}"
        )
    call.check_rows(tokens, rows)


def recv_rows(call: LocalCall, tokens: int) -> int:
    """R, rows of the receive buffer of a PE with T = `tokens`."""
    config = call.config
    return _ffi.extension().recv_rows(
        call.num_pes, tokens, config.num_experts, config.experts_per_token, call.max_rows
    )


def _coordinates(x: jax.Array, call: LocalCall) -> jax.Array:
    """Which expert group this PE is in, and its rank there, [2] int32.

    Groups differ in the position along the axes, besides the expert axis, that the call varies
    over. Along another axis the devices hold the same values, and any of them may meet.
    """
    if call.axis is None:
        return jnp.zeros((2,), jnp.int32)
    rank = lax.axis_index(call.axis)
    axes = varying(x)
    if not varying(rank):  # check_vma is off: anything may vary
        axes = frozenset(jax.sharding.get_abstract_mesh().axis_names)
    others = tuple(sorted(axes - {call.axis}))
    group = lax.axis_index(others) if others else jnp.int32(0)
    coordinates = [vary_as(jnp.asarray(i, jnp.int32), x) for i in (group, rank)]
    return jnp.stack(coordinates)


def _forward_call(statics: _Statics, save: bool, *operands: jax.Array) -> list[jax.Array]:
    """y, dropped, and the residuals: rows, gate and up pre-activations, each empty if not saved."""
    _, x, indices, _, gate, up, *_ = operands
    rows = _ffi.extension().recv_rows(
        statics.num_pes, x.shape[0], statics.num_experts, indices.shape[1], statics.max_rows
    )
    bits = _BITS[x.dtype.itemsize]
    intermediate = up.shape[2]

    def kept(width: int, wanted: bool) -> Any:
        return result(x, (rows, width) if save and wanted else (0,), bits)

    results = [
        result(x, x.shape, x.dtype),
        result(x, (1,), jnp.int32),
        kept(x.shape[1], statics.save_rows),
        kept(intermediate, statics.save_preactivations and gate.ndim == 3),
        kept(intermediate, statics.save_preactivations),
    ]
    return custom_call("flashmoe_forward", results, statics.attributes(), operands)


def _backward_call(statics: _Statics, *operands: jax.Array) -> list[jax.Array]:
    """Gradients of x, the slot weights, and the parameters."""
    _, x, _, weights, *params = operands[:10]
    results = [result(x, like.shape, like.dtype) for like in (x, weights, *params)]
    return custom_call("flashmoe_backward", results, statics.attributes(), operands)


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
