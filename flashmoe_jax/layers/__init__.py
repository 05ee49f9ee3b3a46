"""Flax layers: `flashmoe_jax.layers.nnx.MoE`, also `flashmoe_jax.MoE`, and `.linen.MoE`.

Both hold the same parameters under the same names, in the layout of `flashmoe_jax.MoEParams`.
"""
