"""Which rows of an expert-parallel group are kept, and which routing is invalid."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flashmoe_jax.local_call import LocalCall


class KeptRows(NamedTuple):
    """Where this PE's rows stand in the whole group.

    Attributes:
        keep: [T, K] bool.
        position: [T, K] int32, place among all rows of the same expert in the group, in global
            token order (PE, then token, then slot). Undefined in a masked slot.
        dropped: [] int32, unmasked slots of this PE that are not kept.
    """

    keep: jax.Array
    position: jax.Array
    dropped: jax.Array


def kept_rows(indices: jax.Array, call: LocalCall) -> KeptRows:
    """An expert keeps its first rows in global token order, up to a cap that all PEs agree on.

    Args:
        indices: [T, K] int32 of this PE; with `call.axis` None, of the whole group.
        call: Of which capacity and max_rows limit the rows.
    """
    experts = call.config.num_experts
    routed = indices >= 0
    expert = jnp.where(routed, indices, experts)
    rank, counts = _rank_and_counts(expert.reshape(-1), experts)
    if call.axis is None:
        group_counts, earlier = counts, jnp.zeros_like(counts)
    else:
        counts_by_pe = lax.all_gather(counts, call.axis)
        group_counts = counts_by_pe.sum(0)
        is_earlier = jnp.arange(call.num_pes) < lax.axis_index(call.axis)
        earlier = jnp.where(is_earlier[:, None], counts_by_pe, 0).sum(0)
    cap = water_fill_cap(group_counts.reshape(call.num_pes, -1), call.max_rows)
    if call.capacity is not None:
        cap = jnp.minimum(cap, call.capacity)
    position = rank.reshape(indices.shape) + earlier.at[expert].get(mode="fill", fill_value=0)
    keep = routed & (position < cap)
    return KeptRows(keep, position, (routed & ~keep).sum(dtype=jnp.int32))


def water_fill_cap(counts: jax.Array, max_rows: int) -> jax.Array:
    """[] int32: the largest c such that no PE receives more than `max_rows` rows.

    A PE receives sum_e min(counts[pe, e], c) rows, piecewise linear in c. With its k smallest
    experts complete and the others cut at c, it is full at c = (max_rows - their rows) / (El - k),
    which is the answer for the k at which c cuts none of the complete and all of the others.

    Args:
        counts: [P, El] int32, rows routed to every expert.
        max_rows: Rows that a PE accepts.
    """
    local_experts = counts.shape[1]
    ascending = jnp.sort(counts, axis=1)
    complete = jnp.cumsum(ascending, axis=1) - ascending
    full_at = (max_rows - complete) // (local_experts - jnp.arange(local_experts))
    # full_at < ascending first holds at that k; at larger k full_at is smaller still.
    cap = jnp.where(full_at < ascending, full_at, -1).max(1)
    return jnp.where(cap < 0, jnp.iinfo(jnp.int32).max, cap).min()


def invalid_tokens(indices: jax.Array, weights: jax.Array, num_experts: int) -> jax.Array:
    """[T] bool: an index [T, K] is no expert, or the weight of an unmasked slot is not finite."""
    bad_index = (indices < -1) | (indices >= num_experts)
    bad_weight = (indices >= 0) & ~jnp.isfinite(weights)
    return (bad_index | bad_weight).any(-1)


def _rank_and_counts(expert: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Rank [N] of every row among the rows of its expert, and rows [E] per expert.

    Args:
        expert: [N] int32 in [0, num_experts]; num_experts stands for no expert.
        num_experts: E.
    """
    counts = jnp.zeros(num_experts + 1, jnp.int32).at[expert].add(1)
    starts = jnp.cumsum(counts) - counts
    order = jnp.argsort(expert, stable=True)
    sorted_rank = jnp.arange(expert.size, dtype=jnp.int32) - starts[expert[order]]
    rank = jnp.zeros_like(expert).at[order].set(sorted_rank, unique_indices=True)
    return rank, counts[:num_experts]
