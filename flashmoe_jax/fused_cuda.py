"""`implementation="fused"` on NVIDIA GPUs: the XLA FFI custom call, and its derivative.

The kernel computes the forward pass. Gradients are those of the XLA implementation at the same
inputs and the same choice of experts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flashmoe_jax import _ffi, runtime
from flashmoe_jax.config import MoEConfig, deadline_seconds
from flashmoe_jax.cuda_call import KernelCall, call_kernel
from flashmoe_jax.custom_call import on_collective_stream, or_empty, result
from flashmoe_jax.local_call import LocalCall
from flashmoe_jax.params import MoEParams
from flashmoe_jax.reference.xla import xla_local
from flashmoe_jax.routing import Routing, route_from

# With these values of jax_default_matmul_precision, float32 products may be TF32.
_TF32_PRECISIONS = ("default", "fastest", "bfloat16", "tensorfloat32", "TF32_TF32_F32")


def why_not(config: MoEConfig, dtype: jax.typing.DTypeLike, num_pes: int) -> str | None:
    """Why the kernel does not take such a call, or None if it does."""
    limits = _ffi.cuda_extension().limits()
    row = limits["row_bytes"] // jnp.dtype(dtype).itemsize
    for name in ("hidden_size", "intermediate_size"):
        width = getattr(config, name)
        if width % row:
            return (
                f"the CUDA kernel takes a {name} that is a multiple of {row} in "
                f"{jnp.dtype(dtype).name}, and this one is {width}"
            )
    for name in ("num_experts", "experts_per_token"):
        if getattr(config, name) > limits[name]:
            return (
                f"the CUDA kernel takes at most {limits[name]} as {name}, and this one is "
                f"{getattr(config, name)}"
            )
    if num_pes > limits["num_pes"]:
        return (
            f"the CUDA kernel takes expert groups of at most {limits['num_pes']} devices, and this "
            f"one has {num_pes}"
        )
    return runtime.why_not_several_gpus() if num_pes > 1 else None


def fused_cuda_local(
    x: jax.Array,
    indices: jax.Array,
    weights: jax.Array,
    params: MoEParams,
    call: LocalCall,
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
        ValueError: The symmetric heap would not fit into the memory of a GPU.
    """
    y, dropped = _experts(_prepare(call, x, routes=False), x, indices, weights, params)
    return y, dropped[0]


def routed_cuda_local(
    x: jax.Array,
    mask: jax.Array | None,
    params: MoEParams,
    call: LocalCall,
) -> tuple[jax.Array, jax.Array, Routing]:
    """The layer with its router, both in the kernel: as `route_from`, then `fused_cuda_local`.

    Args:
        x: Tokens, [T, H], float32, bfloat16 or float16.
        mask: [T] bool; a token where it is False is routed nowhere. None: all tokens are routed.
        params: Router, selection bias, and local experts.
        call: The call.

    Returns:
        y and dropped as from `fused_cuda_local`, and the routing.

    Raises:
        ValueError: The symmetric heap would not fit into the memory of a GPU.
    """
    results = _routed_experts(_prepare(call, x, routes=True), x, mask, params)
    y, dropped, logits, indices, weights = results
    return y, dropped[0], Routing(indices, weights, logits)


def _prepare(call: LocalCall, x: jax.Array, *, routes: bool) -> KernelCall:
    _ffi.register_cuda()
    exact = jax.config.jax_default_matmul_precision not in _TF32_PRECISIONS
    runtime.check_memory(call, x.shape[0], x.dtype, exact=exact)
    return KernelCall(call, exact, deadline_seconds(call.config), routes)


def _forward(
    kernel: KernelCall,
    x: jax.Array,
    params: MoEParams,
    routing: tuple[jax.Array, ...],
    made: tuple[Any, ...],
) -> list[jax.Array]:
    """Y [T, H], dropped [1], and the results `made` of the gate."""
    parts = (
        params.gate,
        params.up,
        params.down,
        params.gate_bias,
        params.up_bias,
        params.down_bias,
    )
    operands = (x, *(or_empty(part, x, x.dtype) for part in parts), *routing)
    results = (result(x, x.shape, x.dtype), result(x, (1,), jnp.int32), *made)

    run: Callable[..., list[jax.Array]] = functools.partial(call_kernel, kernel, results)
    if kernel.call.num_pes > 1:
        run = on_collective_stream(run)
    return run(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(
    kernel: KernelCall, x: jax.Array, indices: jax.Array, weights: jax.Array, params: MoEParams
) -> tuple[jax.Array, jax.Array]:
    y, dropped = _forward(kernel, x, params, (indices, weights), ())
    return y, dropped


def _experts_forward(kernel: KernelCall, *operands: Any) -> Any:
    return _experts(kernel, *operands), operands


def _experts_backward(kernel: KernelCall, operands: Any, gradients: Any) -> Any:
    x, indices, weights, params = operands

    def layer(x: jax.Array, weights: jax.Array, params: MoEParams) -> jax.Array:
        return xla_local(x, indices, weights, params, kernel.call)[0]

    _, pull_back = jax.vjp(layer, x, weights, params)
    dx, d_weights, d_params = pull_back(gradients[0])
    return dx, None, d_weights, d_params


_experts.defvjp(_experts_forward, _experts_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed_experts(
    kernel: KernelCall, x: jax.Array, mask: jax.Array | None, params: MoEParams
) -> tuple[jax.Array, ...]:
    """Y, dropped, logits [T, E], indices [T, K] and weights [T, K]."""
    config = kernel.call.config
    bias = params.selection_bias
    gate = (
        params.router.astype(jnp.float32),
        or_empty(None if bias is None else bias.astype(jnp.float32), x, jnp.float32),
        or_empty(None if mask is None else mask.astype(jnp.uint8), x, jnp.uint8),
    )
    tokens, slots = x.shape[0], config.experts_per_token
    made = (
        result(x, (tokens, config.num_experts), jnp.float32),
        result(x, (tokens, slots), jnp.int32),
        result(x, (tokens, slots), jnp.float32),
    )
    return tuple(_forward(kernel, x, params, gate, made))


def _routed_experts_forward(
    kernel: KernelCall, x: jax.Array, mask: jax.Array | None, params: MoEParams
) -> Any:
    results = _routed_experts(kernel, x, mask, params)
    indices = results[3]
    return results, (x, mask, params, indices)


def _routed_experts_backward(kernel: KernelCall, saved: Any, gradients: Any) -> Any:
    x, mask, params, indices = saved
    call = kernel.call

    # Chosen again, experts whose scores are almost equal might change places.
    def layer(x: jax.Array, params: MoEParams) -> tuple[jax.Array | None, ...]:
        routing = route_from(
            x, params, call.config, key=None, mask=mask, first_token=0, indices=indices
        )
        y, _ = xla_local(x, routing.indices, routing.weights, params, call)
        return y, routing.logits, routing.weights

    dy, _, d_logits, _, d_weights = gradients
    _, pull_back = jax.vjp(layer, x, params)
    dx, d_params = pull_back((dy, d_logits, d_weights))
    return dx, None, d_params


_routed_experts.defvjp(_routed_experts_forward, _routed_experts_backward)
