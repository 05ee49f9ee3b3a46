"""A byte-level decoder-only transformer with a Mixture-of-Experts layer in every block."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import flashmoe_jax as fm

VOCABULARY = 256
Implementation = Literal["auto", "fused", "xla", "dense"]


class Attention(nnx.Module):
    """Causal self-attention with rotary positions (arXiv 2104.09864).

    Args:
        width: Of the model.
        heads: Their number; they share out the width.
        rngs: Stream "params".
    """

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.project_in = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.project_out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the attention to x [batch, length, width]."""
        batch, length, width = x.shape
        projected = self.project_in(x).reshape(batch, length, 3, self.heads, -1)
        query, key, value = jnp.moveaxis(projected, 2, 0)
        attended = jax.nn.dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        return self.project_out(attended.reshape(batch, length, width))


def rotate(x: jax.Array) -> jax.Array:
    """Turns pairs of features of x [batch, length, heads, features] by the position."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nnx.Module):
    """Attention and a Mixture-of-Experts layer, each after a norm, on a residual."""

    def __init__(
        self, config: fm.MoEConfig, heads: int, implementation: Implementation, rngs: nnx.Rngs
    ) -> None:
        width = config.hidden_size
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, rngs)
        self.moe_norm = nnx.RMSNorm(width, rngs=rngs)
        self.moe = fm.MoE(config, implementation=implementation, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, fm.MoEAux]:
        """Applies the block to x [batch, length, width]."""
        x = x + self.attention(self.attention_norm(x))
        y, aux = self.moe(self.moe_norm(x))
        return x + y, aux


class LanguageModel(nnx.Module):
    """Next-byte logits.

    Args:
        config: Of the Mixture-of-Experts layers; its hidden size is the width of the model.
        blocks: Number of blocks.
        heads: Attention heads.
        implementation: Of the Mixture-of-Experts layers.
        rngs: Stream "params".
    """

    def __init__(
        self,
        config: fm.MoEConfig,
        *,
        blocks: int,
        heads: int,
        implementation: Implementation,
        rngs: nnx.Rngs,
    ) -> None:
        width = config.hidden_size
        self.embedding = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.blocks = nnx.List([Block(config, heads, implementation, rngs) for _ in range(blocks)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, fm.MoEAux]:
        """Applies the model.

        Args:
            tokens: int32 [batch, length], bytes.

        Returns:
            Logits [batch, length, 256] of the byte after each byte, and the auxiliary values of the
            Mixture-of-Experts layers, stacked along a new first axis [blocks, ...].
        """
        x = self.embedding(tokens)
        auxes = []
        for block in self.blocks:
            x, aux = block(x)
            auxes.append(aux)
        return self.head(self.norm(x)), jax.tree.map(lambda *a: jnp.stack(a), *auxes)


def cross_entropy(model: LanguageModel, tokens: jax.Array) -> tuple[jax.Array, fm.MoEAux]:
    """Mean loss in nats per byte of windows [batch, length + 1], and the model's aux."""
    logits, aux = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(), aux


def generate(
    model: LanguageModel,
    prompt: jax.Array,
    length: int,
    window: int,
    temperature: float,
    key: jax.Array,
) -> jax.Array:
    """Continues a text, byte by byte.

    Args:
        model: The model.
        prompt: int32 [n], the bytes to begin with; n < length.
        length: Bytes of the whole text.
        window: Bytes that the model looks back, as many as it was trained on.
        temperature: Divides the logits.
        key: A JAX random key.

    Returns:
        int32 [length].
    """
    window = min(window, length)

    def extend(position: jax.Array, text: jax.Array) -> jax.Array:
        start = jnp.maximum(position - window, 0)
        logits, _ = model(jax.lax.dynamic_slice(text, (start,), (window,))[None])
        scaled = logits[0, position - 1 - start] / temperature
        choice = jax.random.categorical(jax.random.fold_in(key, position), scaled)
        return text.at[position].set(choice)

    text = jnp.zeros(length, jnp.int32).at[: prompt.size].set(prompt)
    return jax.lax.fori_loop(prompt.size, length, extend, text)
