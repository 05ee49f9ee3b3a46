"""The sharded operator in plain JAX: XLA collectives, no custom call, every platform.

Dropless, every PE gathers all tokens of its group and computes the rows of its own experts. With a
capacity, rows travel in a buffer that has a place for every row an expert may keep.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from flashmoe_jax.local_call import LocalCall
from flashmoe_jax.params import MoEParams
from flashmoe_jax.reference.drops import KeptRows, invalid_tokens, kept_rows
from flashmoe_jax.reference.ffn import ACTIVATIONS
from flashmoe_jax.routing import accumulation_dtype


def xla_local(
    x: jax.Array, indices: jax.Array, weights: jax.Array, params: MoEParams, call: LocalCall
) -> tuple[jax.Array, jax.Array]:
    """The operator on one PE, inside a shard_map over `call.axis` (or anywhere when it is None).

    Args:
        x: [T, H] tokens of this PE.
        indices: [T, K] int32.
        weights: [T, K] float32 (float64 for float64 tokens).
        params: Of the experts of this PE, in the dtype of x.
        call: The call.

    Returns:
        y [T, H] in the dtype of x, NaN for a token whose routing is invalid; and the number of
        dropped rows of this PE's tokens, [] int32.
    """
    if call.check_routing:
        invalid = invalid_tokens(indices, weights, call.config.num_experts)
        indices = jnp.where(invalid[:, None], -1, indices)
    if call.may_drop:
        rows = kept_rows(indices, call)
        indices = jnp.where(rows.keep, indices, -1)
    weights = jnp.where(indices >= 0, weights, 0)
    if call.capacity is None:
        y = _through_gathered_tokens(x, indices, weights, params, call)
    else:
        y = _through_buffers(x, indices, weights, params, rows, call)
    if call.check_routing:
        y = jnp.where(invalid[:, None], jnp.nan, y)
    dropped = rows.dropped if call.may_drop else jnp.zeros((), jnp.int32)
    return y.astype(x.dtype), dropped


def _through_gathered_tokens(
    x: jax.Array, indices: jax.Array, weights: jax.Array, params: MoEParams, call: LocalCall
) -> jax.Array:
    """[T, H] in the accumulation dtype, without a limit on the rows of one expert."""
    dtype = accumulation_dtype(x.dtype)
    if call.axis is None:
        first_expert: jax.Array | int = 0
    else:
        first_expert = lax.axis_index(call.axis) * call.local_experts
        x, indices, weights = (
            lax.all_gather(value, call.axis, tiled=True) for value in (x, indices, weights)
        )
    local_expert = indices - first_expert
    mine = (indices >= 0) & (local_expert >= 0) & (local_expert < call.local_experts)
    expert = jnp.where(mine, local_expert, call.local_experts).reshape(-1)
    # Rows of other PEs sort behind the last expert, beyond what any group covers.
    order = jnp.argsort(expert, stable=True)[: call.max_rows]
    expert = expert[order]
    group_sizes = (expert[:, None] == jnp.arange(call.local_experts)).sum(0, dtype=jnp.int32)
    covered = (expert < call.local_experts)[:, None]

    # ragged_dot leaves rows beyond all groups, and their gradients, undefined on some platforms.
    received = jnp.where(covered, x[order // indices.shape[1]], 0)
    outputs = _ffn(
        received,
        params,
        call,
        product=lambda rows, weight: lax.ragged_dot(
            rows, weight, group_sizes, preferred_element_type=dtype
        ),
        per_row=lambda bias: bias.at[expert].get(mode="fill", fill_value=0),
    )
    outputs = jnp.where(covered, outputs, 0)
    by_slot = jnp.zeros((indices.size, x.shape[1]), x.dtype)
    by_slot = by_slot.at[order].set(outputs, unique_indices=True)
    y = _combine(by_slot.reshape(*indices.shape, x.shape[1]), weights)
    return y if call.axis is None else lax.psum_scatter(y, call.axis, tiled=True)


def _through_buffers(
    x: jax.Array,
    indices: jax.Array,
    weights: jax.Array,
    params: MoEParams,
    rows: KeptRows,
    call: LocalCall,
) -> jax.Array:
    """[T, H] in the accumulation dtype, with at most `call.capacity` rows for every expert."""
    dtype = accumulation_dtype(x.dtype)
    hidden, experts = call.config.hidden_size, call.config.num_experts
    places = min(call.capacity, call.max_rows)  # type: ignore[type-var]
    token = jnp.arange(indices.size) // indices.shape[1]
    expert = jnp.where(indices >= 0, indices, experts).reshape(-1)
    place = rows.position.reshape(-1)

    buffer = jnp.zeros((experts, places, hidden), x.dtype)
    buffer = buffer.at[expert, place].set(x[token], mode="drop")
    if call.axis is not None:
        # Every place has one sender; adding the zeros of the others changes nothing.
        buffer = lax.psum_scatter(buffer, call.axis, tiled=True)
    outputs = _ffn(
        buffer,
        params,
        call,
        product=lambda rows, weight: jnp.einsum(
            "ecm,emn->ecn", rows, weight, preferred_element_type=dtype
        ),
        per_row=lambda bias: bias[:, None],
    )
    if call.axis is not None:
        outputs = lax.all_gather(outputs, call.axis, tiled=True)
    by_slot = outputs.at[expert, place].get(mode="fill", fill_value=0)
    return _combine(by_slot.reshape(*indices.shape, x.shape[1]), weights)


def _ffn(
    rows: jax.Array,
    params: MoEParams,
    call: LocalCall,
    *,
    product: Callable[[jax.Array, jax.Array], jax.Array],
    per_row: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The local experts on their rows [..., H], rounded to the dtype of the rows like `hidden`.

    Args:
        rows: In whatever arrangement `product` multiplies.
        params: Of the local experts.
        call: The call.
        product: Rows of every expert times its matrix, in the accumulation dtype.
        per_row: A bias [El, n] as an array that adds to such a product.
    """

    def project(rows: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        result = product(rows, weight)
        return result if bias is None else result + per_row(bias.astype(result.dtype))

    activation = ACTIVATIONS[call.config.activation]
    hidden = project(rows, params.up, params.up_bias)
    if params.gate is None:
        hidden = activation(hidden)
    else:
        hidden = activation(project(rows, params.gate, params.gate_bias)) * hidden
    return project(hidden.astype(rows.dtype), params.down, params.down_bias).astype(rows.dtype)


def _combine(outputs: jax.Array, weights: jax.Array) -> jax.Array:
    """[T, H]: the weighted sum of outputs [T, K, H], in slot order, in the dtype of the weights."""
    y = jnp.zeros((outputs.shape[0], outputs.shape[2]), weights.dtype)
    for slot in range(weights.shape[1]):
        y = y + weights[:, slot, None] * outputs[:, slot].astype(weights.dtype)
    return y
