"""The oracle: every expert computes every token, and one-hot routing picks what counts."""

import functools

import jax
import jax.numpy as jnp

from flashmoe_jax.local_call import LocalCall
from flashmoe_jax.params import MoEParams
from flashmoe_jax.reference.drops import invalid_tokens, kept_rows
from flashmoe_jax.reference.ffn import ACTIVATIONS
from flashmoe_jax.routing import accumulation_dtype


def dense(
    x: jax.Array, indices: jax.Array, weights: jax.Array, params: MoEParams, call: LocalCall
) -> tuple[jax.Array, jax.Array]:
    """The operator on the tokens of a whole expert-parallel group, with no rounding in between.

    Args:
        x: [N, H], tokens of all PEs in their order; any floating dtype.
        indices: [N, K] int32.
        weights: [N, K] floating.
        params: Of all experts.
        call: The call of the group, with axis None; num_pes still counts its PEs, for which
            max_rows is meant.

    Returns:
        y [N, H] in the dtype of x, NaN for a token whose routing is invalid; and the number of
        dropped rows, [] int32.
    """
    dtype = accumulation_dtype(x.dtype)
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    tokens, p = x.astype(dtype), jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    invalid = invalid_tokens(indices, weights, call.config.num_experts)
    indices = jnp.where(invalid[:, None], -1, indices)
    keep, _, dropped = kept_rows(indices, call)
    # A token that goes nowhere may hold anything, and NaN times no weight would be NaN.
    tokens = jnp.where(keep.any(-1, keepdims=True), tokens, 0)
    weights = jnp.where(keep, weights, 0).astype(dtype)
    chosen = (indices[..., None] == jnp.arange(call.config.num_experts)).astype(dtype)

    def project(
        equation: str, rows: jax.Array, weight: jax.Array, bias: jax.Array | None
    ) -> jax.Array:
        product = einsum(equation, rows, weight)
        return product if bias is None else product + bias

    activation = ACTIVATIONS[call.config.activation]
    up = project("nh,ehd->ned", tokens, p.up, p.up_bias)
    if p.gate is None:
        hidden = activation(up)
    else:
        hidden = activation(project("nh,ehd->ned", tokens, p.gate, p.gate_bias)) * up
    outputs = project("ned,edh->neh", hidden, p.down, p.down_bias)
    y = einsum("nk,nke,neh->nh", weights, chosen, outputs)
    return jnp.where(invalid[:, None], jnp.nan, y).astype(x.dtype), dropped
