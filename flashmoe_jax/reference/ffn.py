"""Activations and the shared experts, in plain JAX."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from flashmoe_jax.config import Activation, MoEConfig
from flashmoe_jax.params import SharedParams
from flashmoe_jax.routing import accumulation_dtype


@jax.custom_jvp
def _gelu(x: jax.Array) -> jax.Array:
    return x * _normal_cdf(x)


@_gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # jax 0.12 cannot differentiate erf or erfc, hence jax.nn.gelu, in a shard_map with check_vma.
    (x,), (dx,) = primals, tangents
    cdf = _normal_cdf(x)
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return x * cdf, dx * (cdf + x * density)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": _gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def shared_experts(x: jax.Array, params: SharedParams, config: MoEConfig) -> jax.Array:
    """The FFN of the shared experts.

    Args:
        x: [..., H].
        params: The shared experts, in the dtype of x.
        config: Of which the activation is read.

    Returns:
        [..., H] in the dtype of x; sums in float32 (float64 for float64).
    """
    product = functools.partial(jnp.matmul, preferred_element_type=accumulation_dtype(x.dtype))
    activation = ACTIVATIONS[config.activation]
    up = product(x, params.up)
    hidden = activation(up) if params.gate is None else activation(product(x, params.gate)) * up
    return product(hidden.astype(x.dtype), params.down).astype(x.dtype)
